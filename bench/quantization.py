"""What quantization costs in accuracy: the trained tiny OPT on its held-out news, on target cpu.

    python -m trtc.bench.quantization [--articles 200]    # measures, writes bench/results/quantization.json
    python -m trtc.bench.quantization --table             # only writes the table of docs/quantization.md from it

Perplexity is over article, ` TL;DR:` and reference summary of every held-out pair, each scored from its beginning; ROUGE-1 of
greedy summaries against the references. GPTQ is calibrated on articles of the training part.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..cli.main import main as trtc
from ..runtime.evaluation import summarize
from ..runtime.evaluation.dataset import Pair, load_pairs
from ..runtime.evaluation.perplexity import engine_logits
from ..runtime.llm import LLM
from ..runtime.load import load_executor
from ..runtime.tokenizer import Tokenizer
from .markdown import table_of, with_table
from .provenance import commit_of_tree

ROOT = Path(__file__).parent.parent
TINY_OPT, NEWS = ROOT / "examples" / "tiny-opt", ROOT / "examples" / "news.jsonl"
RESULTS, PAGE = ROOT / "bench" / "results" / "quantization.json", ROOT / "docs" / "quantization.md"
CALIBRATION_PAIRS, BATCH, OUTPUT_LEN = 128, 50, 60

INT4 = ("--use-weight-only", "--weight-only-precision", "int4", "--group-size")
CASES: dict[str, tuple[str, ...]] = {
    "float32": ("--dtype", "float32"),
    "float16": ("--dtype", "float16"),
    "bfloat16": ("--dtype", "bfloat16"),
    "int8": ("--dtype", "float16", "--use-weight-only", "--weight-only-precision", "int8"),
    "fp8": ("--dtype", "float16", "--use-weight-only", "--weight-only-precision", "fp8"),
    "fp8, fp8 activations": ("--dtype", "float16", "--quantization", "fp8"),
    "fp8, fp8 activations and KV cache": (
        "--dtype",
        "float16",
        "--quantization",
        "fp8",
        "--kv-cache-dtype",
        "fp8",
    ),
    "float16, fp8 KV cache": ("--dtype", "float16", "--kv-cache-dtype", "fp8"),
    "fp8, fp8 KV cache": (
        "--dtype",
        "float16",
        "--use-weight-only",
        "--weight-only-precision",
        "fp8",
        "--kv-cache-dtype",
        "fp8",
    ),
    "int4, nearest, groups of 128": ("--dtype", "float16", *INT4, "128"),
    "int4, GPTQ, groups of 128": ("--dtype", "float16", *INT4, "128", "--calibrate", "{calibration}"),
    "int4, nearest, groups of 64": ("--dtype", "float16", *INT4, "64"),
    "int4, GPTQ, groups of 64": ("--dtype", "float16", *INT4, "64", "--calibrate", "{calibration}"),
}


def training_news(count: int) -> Iterator[str]:
    """Texts of the training part, which shares no person and no article with the held-out one."""
    sys.path.insert(0, str(ROOT / "examples"))
    from news_corpus import news

    for pair in itertools.islice(news(seed=0, held_out=False), count):
        yield f"{pair.article}{summarize.TLDR} {pair.highlights}"


def measure(options: Sequence[str], pairs: Sequence[Pair], folder: Path) -> dict[str, Any]:
    engine, start = folder / "engine", time.perf_counter()
    command = ["build", "--model-dir", TINY_OPT, "--output-dir", engine, "--max-batch-size", BATCH, *options]
    assert trtc(list(map(str, command))) == 0
    seconds = time.perf_counter() - start
    tokenizer = Tokenizer.from_dir(engine)
    assert tokenizer is not None
    weights = sum(file.stat().st_size for file in engine.glob("*.safetensors"))
    nll, tokens = held_out_nll(
        engine, [f"{p.article}{summarize.TLDR} {p.highlights}" for p in pairs], tokenizer
    )
    with LLM(engine) as llm:
        prompts = summarize.encode_prompts(pairs, tokenizer, 512)
        made = summarize.run(summarize.engine_generate(llm, OUTPUT_LEN), prompts, BATCH)
    texts = [tokenizer.decode(ids).strip() for ids in made.token_ids]
    rouge = summarize.rouge([pair.highlights for pair in pairs], texts)
    return {
        "options": list(options),
        "perplexity": math.exp(nll / tokens),
        "scored_tokens": tokens,
        "rouge1": rouge["rouge1"],
        "weight_bytes": weights,
        "build_s": seconds,
    }


def held_out_nll(engine: Path, texts: Sequence[str], tokenizer: Tokenizer) -> tuple[float, int]:
    logits = engine_logits(load_executor(engine))
    total, count = 0.0, 0
    for text in texts:
        ids = tokenizer.encode(text)
        rows = logits(ids)[:-1].double()
        total += float(torch.nn.functional.cross_entropy(rows, torch.tensor(ids[1:]), reduction="sum"))
        count += len(ids) - 1
    return total, count


def run(articles: int) -> dict[str, Any]:
    pairs = load_pairs(str(NEWS), articles)
    results = {}
    for name, options in CASES.items():
        with tempfile.TemporaryDirectory() as scratch:
            calibration = Path(scratch) / "calibration.jsonl"
            calibration.write_text(
                "".join(json.dumps(text) + "\n" for text in training_news(CALIBRATION_PAIRS))
            )
            filled = [option.format(calibration=calibration) for option in options]
            results[name] = measure(filled, pairs, Path(scratch)) | {"options": list(options)}
        print(name, json.dumps(results[name]), flush=True)
    return {
        **commit_of_tree(),
        "date": time.strftime("%Y-%m-%d"),
        "device": f"CPU, {platform.machine()}, {os.cpu_count()} cores",
        "versions": {"trtc": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "articles": articles,
        "calibration_texts": CALIBRATION_PAIRS,
        "cases": results,
    }


def table(data: dict[str, Any]) -> str:
    """The table and the line below it that says what was measured."""
    base = data["cases"]["float16"]
    header = ("weights", "perplexity", "to float16", "ROUGE-1", "weights in all")
    lines: list[tuple[str, ...]] = []
    for name, case in data["cases"].items():
        ratio = 100 * (case["perplexity"] / base["perplexity"] - 1)
        lines.append((name, f"{case['perplexity']:.4f}", f"{ratio:+.2f} %", f"{case['rouge1']:.2f}",
                      f"{case['weight_bytes'] / 1e6:.2f} MB"))  # fmt: skip
    text = table_of(header, lines)
    return (
        f"{text}\nThe trained tiny OPT on {data['articles']} held-out articles, {base['scored_tokens']} scored tokens; "
        f"quantized rows compute in float16, embeddings and head stay in it. GPTQ: {data['calibration_texts']} articles of "
        f"the training part. "
        f"{data['device']}, torch {data['versions']['torch']}, trtc at {data['commit']}"
        f"{' with local changes' if data['dirty'] else ''}, {data['date']}. `bench/results/{RESULTS.name}`.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--articles", type=int, default=200)
    parser.add_argument("--table", action="store_true", help="only write the table")
    args = parser.parse_args()
    if not args.table:
        RESULTS.write_text(json.dumps(run(args.articles), indent=1) + "\n")
    PAGE.write_text(with_table(PAGE.read_text(), RESULTS.stem, table(json.loads(RESULTS.read_text()))))


if __name__ == "__main__":
    main()
