"""Prompt lookup against plain greedy decoding: the tiny OPT summarizes the held-out articles of examples/news.jsonl on the CPU.

It is so small that a step is mostly Python. A second model is the same one with rows of zeros added to its feed-forward layers:
it writes the same text, and its steps are bound by reading weights, as those of models of real size are.

python bench/prompt_lookup.py --json bench/results/cpu-prompt-lookup.json     # measures, a few minutes
python bench/prompt_lookup.py                                                 # writes the table of docs/evaluation.md
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers import OPTConfig, OPTForCausalLM
from trtc import LLM
from trtc.cli.main import main as trtc
from trtc.runtime.evaluation import summarize
from trtc.runtime.evaluation.dataset import load_pairs
from trtc.runtime.prompt_lookup import PromptLookup
from trtc.runtime.sampling_params import SamplingParams

ROOT = Path(__file__).parent.parent
TINY_OPT, NEWS, PAGE = ROOT / "examples/tiny-opt", ROOT / "examples/news.jsonl", ROOT / "docs/evaluation.md"
RESULTS = ROOT / "bench/results/cpu-prompt-lookup.json"
START, END = "<!-- bench: cpu-prompt-lookup -->\n", "<!-- /bench -->\n"
SETTINGS = ("1:1", "1:2", "1:4", "2:4")
OUTPUT_LEN = 100
PADDED = 16384


@dataclass(frozen=True)
class Case:
    """name: in the table; ffn_dim: of the model, None: its own; articles: how many"""

    name: str
    ffn_dim: int | None
    batch: int
    articles: int


CASES = (
    Case("tiny OPT", None, 1, 100),
    Case("tiny OPT", None, 8, 200),
    Case(f"padded to ffn_dim {PADDED}", PADDED, 1, 10),
)


def measure(repeat: int) -> dict[str, Any]:
    """All settings of all cases, `repeat` times in turn. Raises SystemExit when a token differs from plain decoding."""
    torch.set_num_threads(1)
    rows = []
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            model = TINY_OPT if case.ffn_dim is None else padded(Path(folder) / "model", case.ffn_dim)
            options = f"--dtype float32 --max-batch-size 8 --output-dir {folder}/engine"
            if trtc(["build", "--model-dir", str(model), *options.split()]):
                raise SystemExit("the engine cannot be built")
            with LLM(f"{folder}/engine", enable_prefix_cache=False) as llm:
                rows += measure_case(llm, case, repeat)
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": _output("git", "rev-parse", "--short=12", "HEAD"),
        "dirty": bool(_output("git", "status", "--porcelain")),
        "device": _processor(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "rows": rows,
    }


def padded(folder: Path, ffn_dim: int) -> Path:
    """The tiny OPT with wider feed-forward layers that compute the same."""
    small = OPTForCausalLM.from_pretrained(TINY_OPT, dtype=torch.float32)
    config = OPTConfig.from_pretrained(TINY_OPT, ffn_dim=ffn_dim)
    large = OPTForCausalLM(config).float()
    weights = large.state_dict()
    for name, value in small.state_dict().items():
        weights[name].zero_()[tuple(map(slice, value.shape))] = value
    large.load_state_dict(weights)
    large.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_OPT / name, folder)
    return folder


def measure_case(llm: LLM, case: Case, repeat: int) -> list[dict[str, Any]]:
    assert llm.tokenizer is not None
    limit = summarize.input_limit(llm.core.executor, OUTPUT_LEN)
    prompts = summarize.encode_prompts(load_pairs(str(NEWS), case.articles), llm.tokenizer, limit)
    sides: dict[str, PromptLookup | None] = {"plain": None} | {
        name: PromptLookup.parse(name) for name in SETTINGS
    }
    rows: dict[str, dict[str, Any]] = {
        name: {**asdict(case), "lookup": name, "cpu_s": [], "wall_s": []} for name in sides
    }
    expected = run(llm, prompts, case.batch, None)["token_ids"]  # and the warm-up
    for _ in range(repeat):
        for name, lookup in sides.items():
            found = run(llm, prompts, case.batch, lookup)
            if found.pop("token_ids") != expected:
                raise SystemExit(f"prompt lookup {name} changed a token")
            for key in ("cpu_s", "wall_s"):
                rows[name][key].append(found.pop(key))
            rows[name] |= {"tokens": sum(map(len, expected)), **found}
    for name, row in rows.items():
        print(f"{case.name}, batch {case.batch}  {name:<6} {speed(row):8.1f} tokens/s", flush=True)
    return list(rows.values())


def run(llm: LLM, prompts: list[list[int]], batch: int, lookup: PromptLookup | None) -> dict[str, Any]:
    """Time of this process and of the wall, tokens, and what was guessed."""
    params = SamplingParams(max_tokens=OUTPUT_LEN, temperature=0.0, prompt_lookup=lookup)
    before, token_ids = replace(llm.core.lookup_stats), []
    cpu, wall = time.process_time(), time.perf_counter()
    for i in range(0, len(prompts), batch):
        token_ids += [output.outputs[0].token_ids for output in llm.generate(prompts[i : i + batch], params)]
    times = {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}
    return {**times, "token_ids": token_ids, **asdict(llm.core.lookup_stats.since(before))}


def speed(row: dict[str, Any]) -> float:
    """Tokens per second of the processor: what else runs on a shared machine hardly changes it."""
    return float(row["tokens"] / statistics.median(row["cpu_s"]))


def table(data: dict[str, Any]) -> str:
    header = ("model", "batch", "articles", "N:K", "accepted", "tokens per step", "tokens/s", "speed-up")
    lines = [header, ("---",) * len(header)]
    base = 1.0
    for row in data["rows"]:
        case = (row["name"], str(row["batch"]), str(row["articles"]))
        if row["lookup"] == "plain":
            base = speed(row)
            lines.append((*case, "plain", "", "1", f"{base:.0f}", ""))
            continue
        share = f"{100 * row['accepted'] / row['proposed']:.0f} %"
        steps = f"{row['tokens'] / (row['tokens'] - row['accepted']):.2f}"
        lines.append((*case, row["lookup"], share, steps, f"{speed(row):.0f}", f"{speed(row) / base:.2f}"))
    text = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    return (
        f"{text}\n{data['device']}, one thread, float32; every token is that of plain decoding. Time is the processor's, the "
        f"median of {len(data['rows'][0]['cpu_s'])} runs: the machine was shared. trtc at {data['commit']}"
        f"{' with local changes' if data['dirty'] else ''}, torch {data['torch']}, {data['date']}. Samples: "
        f"`bench/results/{RESULTS.name}`.\n"
    )


def with_table(page: str, text: str) -> str:
    before, _, rest = page.partition(START)
    _, _, after = rest.partition(END)
    return before + START + "\n" + text + "\n" + END + after


def _processor() -> str:
    names = [line.partition(":")[2].strip() for line in _output("cat", "/proc/cpuinfo").splitlines()
             if line.startswith("model name")]  # fmt: skip
    return names[0] if names else platform.machine()


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--json", type=Path, help="measure, and write the result here; without: only write the table"
    )
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    if args.json is not None:
        data = measure(args.repeat)
        args.json.write_text(json.dumps(data, indent=1) + "\n")
        print(table(data))
    else:
        PAGE.write_text(with_table(PAGE.read_text(), table(json.loads(RESULTS.read_text()))))


if __name__ == "__main__":
    main()
