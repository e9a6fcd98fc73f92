"""What the ranks of `test_cuda_ranks` run: engines one after the other; what rank 0 computes goes to RESULTS.pt.

Each with sums and norms in kernels of their own, and in one.

python ranks_script.py RESULTS.pt ENGINE_DIR [ENGINE_DIR ...]
"""

from __future__ import annotations

import faulthandler
import sys
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path

import numpy as np
import torch
from trtc.runtime import cuda_stage, gpu_communicator
from trtc.runtime.executor import DecodeLoop, Executor, GreedyChooser, StepStarter
from trtc.runtime.llm import LLM
from trtc.runtime.sampling_params import SamplingParams
from trtc.runtime.step_input import StepInput
from trtc.tests.packed_steps import PagedSequences

TOKENS = [5, 17, 1, 90, 0, 23, 64, 2, 11, *range(20, 60)]
CHUNKS = (9, 20, *[1] * (len(TOKENS) - 29))
"""A prompt, a chunk of it, then token by token: prefill, prefill on a cache, CUDA graphs."""
PROMPTS = [list(range(3, 3 + size)) for size in (9, 1, 33, 16, 2, 57)]
"""More than a batch of the engines, so that prefill and decode mix in one step."""
cuda_stage.MICRO_STEP_TOKENS = (
    8  # so that steps of these short prompts are split over the stages of a pipeline
)
LIMIT_S = 100
"""A rank that is not done then says where it is and ends."""
GREEDY = SamplingParams(max_tokens=32, temperature=0, ignore_eos=True)


def steps_of(executor: Executor) -> Iterator[StepInput]:
    """TOKENS, in CHUNKS."""
    sequence = PagedSequences(executor.page_size, executor.num_pages)
    start = 0
    for size in CHUNKS:
        inputs = sequence.step({"a": TOKENS[start : start + size]})
        yield StepInput(**{name: np.ascontiguousarray(value.numpy()) for name, value in inputs.items()})
        start += size


def logits(executor: Executor) -> torch.Tensor:
    """[tokens, vocab] of TOKENS, in CHUNKS."""
    return torch.cat([executor.execute(step).float().cpu() for step in steps_of(executor)])


def chosen(executor: GreedyChooser, steps: Iterable[StepInput]) -> list[int]:
    """What the device chooses where guesses are verified: the token behind each of TOKENS."""
    return [token for step in steps for token in executor.choose(step).tolist()]


def compute(engine_dir: str | Path) -> dict[str, object]:
    """The logits of TOKENS, the greedy tokens of PROMPTS together (run ahead of the host), and those of the first alone."""
    with LLM(engine_dir, enable_prefix_cache=False) as llm:
        executor = llm.core.executor
        assert isinstance(executor, DecodeLoop) and isinstance(executor, GreedyChooser)
        found: dict[str, object] = {
            "logits": logits(executor),
            "chosen": chosen(executor, steps_of(executor)),
        }
        assert isinstance(executor, StepStarter)  # prompts are planned while the devices compute those before
        found["together"] = [list(o.outputs[0].token_ids) for o in llm.generate(PROMPTS, GREEDY)]
        found["alone"] = list(llm.generate([PROMPTS[0]], GREEDY)[0].outputs[0].token_ids)
    return found


def main(results: Path, *engine_dirs: str) -> None:
    found = {}
    for engine_dir, normed in product(engine_dirs, (False, True)):
        gpu_communicator.normed_bytes = lambda *_, end=normed << 30: range(1, end)  # type: ignore[misc]
        try:
            found[engine_dir, normed] = compute(engine_dir)
        except (
            SystemExit
        ):  # a rank that has followed rank 0 to the end of one engine can follow it to the next
            continue
    if found:
        torch.save(found, results)


if __name__ == "__main__":
    faulthandler.dump_traceback_later(LIMIT_S, exit=True)
    main(Path(sys.argv[1]), *sys.argv[2:])
