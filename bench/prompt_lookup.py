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
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers import OPTConfig, OPTForCausalLM
from trtc import LLM
from trtc.cli.main import main as trtc
from trtc.runtime.evaluation import summarize
from trtc.runtime.evaluation.dataset import load_pairs
from trtc.runtime.prompt_lookup import LookupStats, PromptLookup

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
    Case("tiny OPT", None, 1, 200),
    Case("tiny OPT", None, 8, 200),
    Case(f"padded to ffn_dim {PADDED}", PADDED, 1, 20),
)


def measure(repeat: int) -> dict[str, Any]:
    """All settings of all cases, `repeat` times in turn. Raises SystemExit when a token differs from plain decoding."""
    rows = []
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            model = TINY_OPT if case.ffn_dim is None else padded(Path(folder) / "model", case.ffn_dim)
            options = f"--dtype float32 --max-batch-size 8 --output-dir {folder}/engine"
            if trtc(["build", "--model-dir", str(model), *options.split()]):
                raise SystemExit("the engine cannot be built")
            with LLM(f"{folder}/engine") as llm:
                rows += measure_case(llm, case, repeat)
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": _output("git", "rev-parse", "--short=12", "HEAD"),
        "dirty": bool(_output("git", "status", "--porcelain")),
        "device": _processor(),
        "threads": torch.get_num_threads(),
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
    batch = case.batch
    assert llm.tokenizer is not None
    limit = summarize.input_limit(llm.core.executor, OUTPUT_LEN)
    prompts = summarize.encode_prompts(load_pairs(str(NEWS), case.articles), llm.tokenizer, limit)
    plain = summarize.engine_generate(llm, OUTPUT_LEN)
    expected: list[list[int]] = []
    samples: dict[str, list[float]] = {name: [] for name in ("plain", *SETTINGS)}
    stats: dict[str, LookupStats] = {}
    for _ in range(repeat):
        side = summarize.run(plain, prompts, batch)
        expected = expected or side.token_ids
        samples["plain"].append(side.tokens_per_s)
        for name in SETTINGS:
            side, stats[name] = summarize.run_lookup(
                llm, prompts, batch, OUTPUT_LEN, PromptLookup.parse(name)
            )
            samples[name].append(side.tokens_per_s)
            if side.token_ids != expected:
                raise SystemExit(f"prompt lookup {name} changed a token")
    tokens = sum(map(len, expected))
    rows = []
    for name, values in samples.items():
        row: dict[str, Any] = {
            **asdict(case), "lookup": name, "tokens": tokens, "tokens_per_s": values
        }  # fmt: skip
        if name in stats:
            row |= {**asdict(stats[name]), "tokens_per_step": stats[name].tokens_per_step(tokens)}
        rows.append(row)
        print(f"{case.name}, batch {batch}  {name:<6} {statistics.median(values):8.1f} tokens/s", flush=True)
    return rows


def table(data: dict[str, Any]) -> str:
    header = ("model", "batch", "articles", "N:K", "accepted", "tokens per step", "tokens/s", "speed-up")
    lines = [header, ("---",) * len(header)]
    base = 1.0
    for row in data["rows"]:
        speed = statistics.median(row["tokens_per_s"])
        case = (row["name"], str(row["batch"]), str(row["articles"]))
        if row["lookup"] == "plain":
            base = speed
            lines.append((*case, "plain", "", "1", f"{speed:.0f}", ""))
            continue
        share = f"{100 * row['accepted'] / row['proposed']:.0f} %"
        steps = f"{row['tokens_per_step']:.2f}"
        lines.append((*case, row["lookup"], share, steps, f"{speed:.0f}", f"{speed / base:.2f}"))
    text = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    return (
        f"{text}\n{data['device']}, {data['threads']} threads, float32; every token is that of plain decoding. trtc at "
        f"{data['commit']}{' with local changes' if data['dirty'] else ''}, torch {data['torch']}, {data['date']}; medians of "
        f"{len(data['rows'][0]['tokens_per_s'])} runs. Samples: `bench/results/{RESULTS.name}`.\n"
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
