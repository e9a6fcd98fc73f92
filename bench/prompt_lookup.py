"""Prompt lookup against plain greedy decoding. Prompts are held-out articles of examples/news.jsonl.

Target cpu: the trained tiny OPT summarizes them. It is so small that a step is mostly Python. A second model is the same one
with rows of zeros added to its feed-forward layers: it writes the same text, and its steps are bound by reading weights, as
those of models of real size are. OPT-125M, and all models of target cuda, have random weights: such a model soon repeats
itself, so that most guesses come true; it shows what steps with guesses cost, not what a text brings.

    python bench/prompt_lookup.py --json bench/results/cpu-prompt-lookup.json                  # measures, a few minutes
    python bench/prompt_lookup.py --target cuda --json bench/results/cuda-prompt-lookup.json   # a minute, on a GPU
    python bench/prompt_lookup.py                                                              # writes docs/evaluation.md
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from trtc import LLM
from trtc.bench.markdown import table_of, with_table
from trtc.bench.opt_sizes import write_config
from trtc.bench.provenance import commit_of_tree, processor
from trtc.cli.main import main as trtc
from trtc.runtime.evaluation import summarize
from trtc.runtime.evaluation.dataset import load_pairs
from trtc.runtime.prompt_lookup import PromptLookup
from trtc.runtime.sampling_params import SamplingParams
from trtc.runtime.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
TINY_OPT, NEWS, PAGE = ROOT / "examples/tiny-opt", ROOT / "examples/news.jsonl", ROOT / "docs/evaluation.md"
RESULTS = {target: ROOT / f"bench/results/{target}-prompt-lookup.json" for target in ("cpu", "cuda")}
SETTINGS = ("1:2", "1:4", "2:8")
OUTPUT_LEN = 100
PADDED = 16384
MAX_BATCH_SIZE, MAX_SEQ_LEN = 8, 1024


@dataclass(frozen=True)
class Case:
    """name: in the table; model: tiny, padded or a published size, which has random weights; articles: how many"""

    name: str
    model: str
    batch: int
    articles: int

    @property
    def trained(self) -> bool:
        return self.model in ("tiny", "padded")


CASES = {
    "cpu": (
        Case("tiny OPT", "tiny", 1, 100),
        Case("tiny OPT", "tiny", 8, 200),
        Case(f"tiny OPT, ffn_dim {PADDED}", "padded", 1, 20),
        Case("125M, random weights", "125m", 1, 2),
        Case("125M, random weights", "125m", 8, 8),
    ),
    "cuda": tuple(
        Case(f"{size.upper()}, random weights", size, batch, 8 * batch)
        for size in ("125m", "1.3b")
        for batch in (1, 8)
    ),
}
DTYPES = {"cpu": "float32", "cuda": "float16"}


def measure(target: str, repeat: int, commit: str | None) -> dict[str, Any]:
    """All settings of all cases, `repeat` times in turn. Raises SystemExit when a token differs from plain decoding on the
    CPU; on a GPU, where steps of other sizes round differently, the articles with other tokens are counted."""
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for model in dict.fromkeys(case.model for case in CASES[target]):
            engine = build(model, target, Path(folder))
            with LLM(str(engine), enable_prefix_cache=False) as llm:
                for case in CASES[target]:
                    if case.model == model:
                        rows += measure_case(llm, case, repeat, exact=target == "cpu")
            shutil.rmtree(engine)
    return {
        "date": datetime.now(UTC).date().isoformat(),
        **commit_of_tree(commit),
        "target": target,
        "device": torch.cuda.get_device_name() if target == "cuda" else processor(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "rows": rows,
    }


def build(model: str, target: str, folder: Path) -> Path:
    source, engine, more = folder / f"{model}-model", folder / f"{model}-engine", ["--dummy-weights"]
    if model == "tiny":
        source, more = TINY_OPT, []
    elif model == "padded":
        source, more = padded(source, PADDED), []
    else:
        write_config(model, source)
    if target == "cuda":
        major, minor = torch.cuda.get_device_capability()
        more += ["--cuda-arch", f"sm_{major}{minor}"]
    options = f"--target {target} --dtype {DTYPES[target]} --max-batch-size {MAX_BATCH_SIZE} --max-seq-len {MAX_SEQ_LEN}"
    if trtc(["build", "--model-dir", str(source), "--output-dir", str(engine), *options.split(), *more]):
        raise SystemExit(f"the engine of {model} cannot be built")
    return engine


def padded(folder: Path, ffn_dim: int) -> Path:
    """The tiny OPT with wider feed-forward layers that compute the same."""
    from transformers import OPTConfig, OPTForCausalLM

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


def measure_case(llm: LLM, case: Case, repeat: int, *, exact: bool) -> list[dict[str, Any]]:
    tokenizer = Tokenizer.from_dir(TINY_OPT)
    assert tokenizer is not None
    limit = summarize.input_limit(llm.core.executor, OUTPUT_LEN)
    prompts = summarize.encode_prompts(load_pairs(str(NEWS), case.articles), tokenizer, limit)
    sides: dict[str, PromptLookup | None] = {"plain": None} | {
        name: PromptLookup.parse(name) for name in SETTINGS
    }
    rows: dict[str, dict[str, Any]] = {
        name: {**asdict(case), "lookup": name, "cpu_s": [], "wall_s": []} for name in sides
    }
    for lookup in sides.values() if not exact else [None]:  # the warm-up; on a GPU it captures the graphs
        expected = run(llm, prompts, case, lookup)["token_ids"]
    expected = run(llm, prompts, case, None)["token_ids"]
    for _ in range(repeat):
        for name, lookup in sides.items():
            found = run(llm, prompts, case, lookup)
            token_ids = found.pop("token_ids")
            if exact and token_ids != expected:
                raise SystemExit(f"prompt lookup {name} changed a token")
            for key in ("cpu_s", "wall_s"):
                rows[name][key].append(found.pop(key))
            same = sum(map(list.__eq__, token_ids, expected))
            rows[name] |= {"tokens": sum(map(len, token_ids)), "same": same, **found}
    for name, row in rows.items():
        print(f"{case.name}, batch {case.batch}  {name:<6} {speed(row, cpu=exact):8.1f} tokens/s", flush=True)
    return list(rows.values())


def run(llm: LLM, prompts: list[list[int]], case: Case, lookup: PromptLookup | None) -> dict[str, Any]:
    """Time of this process and of the wall, tokens, and what was guessed."""
    params = SamplingParams(
        max_tokens=OUTPUT_LEN, temperature=0.0, prompt_lookup=lookup, ignore_eos=not case.trained
    )
    before, token_ids = replace(llm.core.lookup_stats), []
    cpu, wall = time.process_time(), time.perf_counter()
    for i in range(0, len(prompts), case.batch):
        outputs = llm.generate(prompts[i : i + case.batch], params)
        token_ids += [list(output.outputs[0].token_ids) for output in outputs]
    times = {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}
    return {**times, "token_ids": token_ids, **asdict(llm.core.lookup_stats.since(before))}


def speed(row: dict[str, Any], *, cpu: bool) -> float:
    """Tokens per second, prompts included; on a CPU of the processor's time: what else runs there hardly changes it."""
    return float(row["tokens"] / statistics.median(row["cpu_s" if cpu else "wall_s"]))


def table(data: dict[str, Any]) -> str:
    header = (
        "model",
        "batch",
        "articles",
        "N:K",
        "guessed",
        "accepted",
        "tokens per step",
        "tokens/s",
        "speed-up",
    )
    lines: list[tuple[str, ...]] = []
    cpu, base = data["target"] == "cpu", 1.0
    for row in data["rows"]:
        case, found = (row["name"], str(row["batch"]), str(row["articles"])), speed(row, cpu=cpu)
        if row["lookup"] == "plain":
            base = found
            lines.append((*case, "plain", "", "", "1", f"{base:.0f}", ""))
            continue
        share = f"{100 * row['accepted'] / row['proposed']:.0f} %" if row["proposed"] else ""
        steps = f"{row['tokens'] / (row['tokens'] - row['accepted']):.2f}"
        guessed = f"{row['proposed'] / row['tokens']:.2f}"
        lines.append((*case, row["lookup"], guessed, share, steps, f"{found:.0f}", f"{found / base:.2f}"))
    text = table_of(header, lines)
    return (
        f"{text}\nGuessed: tokens tried, of each token of output. {data['device']}, "
        f"{'one thread, float32' if cpu else DTYPES['cuda']}; {_sameness(data)} Times, prompts included, are "
        f"{'the processor’s' if cpu else 'of the wall'}, the median of {len(data['rows'][0]['cpu_s'])} runs. trtc at "
        f"{data['commit']}{' with local changes' if data['dirty'] else ''}, torch {data['torch']}, {data['date']}. Samples: "
        f"`bench/results/{RESULTS[data['target']].name}`.\n"
    )


def _sameness(data: dict[str, Any]) -> str:
    looked = [row for row in data["rows"] if row["lookup"] != "plain"]
    same, count = (sum(row[key] for row in looked) for key in ("same", "articles"))
    if same == count:
        return "every token is that of plain decoding."
    return f"{same} of {count} texts are those of plain decoding: steps of other sizes round differently."


def with_tables(page: str) -> str:
    """The page with the tables of all results that there are."""
    for results in RESULTS.values():
        if results.exists():
            page = with_table(page, results.stem, table(json.loads(results.read_text())))
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--json", type=Path, help="measure, and write the result here; without: only write the tables"
    )
    parser.add_argument("--target", choices=CASES, default="cpu")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--commit", help="what is measured, where git cannot tell")
    args = parser.parse_args()
    if args.json is not None:
        data = measure(args.target, args.repeat, args.commit)
        args.json.write_text(json.dumps(data, indent=1) + "\n")
        print(table(data))
    else:
        PAGE.write_text(with_tables(PAGE.read_text()))


if __name__ == "__main__":
    main()
