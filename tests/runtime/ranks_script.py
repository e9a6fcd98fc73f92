"""What the ranks of tests run under `mpirun`: engines one after the other, greedy tokens of rank 0 as JSON.

    python ranks_script.py RESULTS.json MAX_TOKENS ENGINE_DIR [ENGINE_DIR ...]

RESULTS.json is there, and empty, from the first token on.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from trtc.runtime import stage_executor
from trtc.runtime.llm import LLM
from trtc.runtime.outputs import RequestOutput
from trtc.runtime.sampling_params import SamplingParams

PROMPTS = [[2, 11, 12, 13, 14], [2, 21], [2, *range(30, 70)], [2, 90, 80], [2, 5]]
"""More than a batch of the engines, of lengths that mix prefill and decode in one step."""


stage_executor.MICRO_STEP_TOKENS = 8  # so that the steps of these short prompts are split too


def generate(engine_dir: str | Path, max_tokens: int, first_token: Path | None = None) -> list[list[int]]:
    """The greedy tokens of every prompt. first_token: a file to make when there is one."""

    def mark(_: RequestOutput) -> None:
        if first_token is not None:
            first_token.touch()

    with LLM(engine_dir) as llm:
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, params, on_output=mark)]


def main(results: Path, max_tokens: int, *engine_dirs: str) -> None:
    found = {}
    for engine_dir in engine_dirs:
        try:
            found[engine_dir] = generate(engine_dir, max_tokens, results)
        except (
            SystemExit
        ):  # a rank that has followed rank 0 to the end of one engine can follow it to the next
            continue
    if found:
        results.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
