"""Tables of README and docs from the files in bench/results/; numbers are never typed.

python bench/table.py            # writes them between the markers in README.md, docs/tensorrt.md, docs/cpu.md
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from trtc.bench import (
    all_reduce,
    cpu,
    cpu_scaling,
    gpu_rank_memory,
    quantized_steps,
    rank_tokens,
    ranks_vs_vllm,
    server_tables,
    tensor_parallel,
)
from trtc.bench.kernels import fp8
from trtc.bench.markdown import table_of, with_table

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results" / "gpu-vs-vllm.json"
H100 = ROOT / "bench" / "results" / "h100-vs-vllm.json"
PLANS = ROOT / "bench" / "results" / "tensorrt-plans.json"
BARS = {
    ("125m", "decode", 1): 5.0, ("125m", "decode", 8): 4.0, ("125m", "decode", 64): 3.0,
    ("1.3b", "decode", 1): 1.8, ("1.3b", "decode", 8): 1.7, ("1.3b", "decode", 64): 1.5,
    ("2.7b", "decode", 1): 1.8, ("2.7b", "decode", 8): 1.8, ("2.7b", "decode", 64): 1.6,
    ("6.7b", "decode", 1): 1.3, ("6.7b", "decode", 8): 1.25, ("6.7b", "decode", 64): 1.1,
    ("125m", "prefill", 64): 1.1, ("1.3b", "prefill", 64): 1.1, ("2.7b", "prefill", 64): 1.1, ("6.7b", "prefill", 64): 1.1,
    ("125m", "mixed", 512): 2.5, ("1.3b", "mixed", 512): 1.4, ("2.7b", "mixed", 512): 1.5, ("6.7b", "mixed", 512): 1.1,
    ("125m", "process", 1): 8.0, ("6.7b", "process", 1): 8.0,
}  # fmt: skip
"""The ratio that each row is meant to reach on an H200: a row that falls short is shown as it is."""


def rows(data: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for model, sides in data["models"].items():
        ours = {r["batch"]: r for r in sides["trtc"] if r["kind"] == "batch"}
        theirs = {r["batch"]: r for r in sides["vllm"] if r["kind"] == "batch"}
        for batch, one in ours.items():
            a, b = theirs[batch]["decode_ms_per_token"], one["decode_ms_per_token"]
            yield row(
                model,
                "decode",
                batch,
                f"{b:.3f} ms",
                f"{a:.3f} ms",
                a / b,
                one["decode_percent_of_read_limit"],
            )
        largest = max(ours)
        a, b = theirs[largest]["prefill_s"] * 1e3, ours[largest]["prefill_s"] * 1e3
        yield row(model, "prefill", largest, f"{b:.1f} ms", f"{a:.1f} ms", a / b, None)
        starts = [next((r for r in sides[side] if r["kind"] == "process"), None) for side in ("trtc", "vllm")]
        if starts[0] and starts[1] and (model, "process", 1) in BARS:
            b, a = starts[0]["start_to_first_token_s"], starts[1]["start_s"]
            yield row(model, "process", 1, f"{b:.1f} s", f"{a:.1f} s", a / b, None)
        best = [max((r for r in side if r["kind"] == "continuous"), key=lambda r: r["output_tok_s"], default=None)
                for side in (sides["trtc"], sides["vllm"])]  # fmt: skip
        if best[0] and best[1]:
            a, b = best[1]["output_tok_s"], best[0]["output_tok_s"]
            yield row(
                model,
                "mixed",
                best[0]["requests"],
                f"{b / 1e3:.1f}k tok/s",
                f"{a / 1e3:.1f}k tok/s",
                b / a,
                None,
            )


def row(
    model: str, case: str, count: int, ours: str, theirs: str, ratio: float, percent: float | None
) -> tuple[str, ...]:
    bar = BARS[model, case, count]
    what = {
        "decode": "decode step, batch",
        "prefill": "prefill, batch",
        "mixed": "mixed requests at once:",
        "process": "process start to first token, batch",
    }[case]
    short = ratio < bar
    mark = " (short)" if short else ""
    digits = 3 if short and round(ratio, 2) >= bar else 2
    return (
        f"OPT-{model.upper()}",
        f"{what} {count}",
        ours,
        theirs,
        f"{ratio:.{digits}f}",
        f"{bar}{mark}",
        f"{percent or ''}",
        f"{100 * ratio / percent:.2f}" if percent else "",
    )


def table(data: dict[str, Any], name: str = RESULTS.name) -> str:
    """The table of results file `name`, and the line below it that says what was measured."""
    header = ("model", "case", "trtc", "vLLM", "ratio", "aim", "% of read limit", "ratio at the limit")
    text = table_of(header, rows(data))
    others = data.get("other_runs", {})
    sides = next(sides for model, sides in data["models"].items() if model not in others)
    setup, peer = (next(r for r in sides[side] if r["kind"] == "setup") for side in ("trtc", "vllm"))
    copies = sorted(
        next(r for r in sides["trtc"] if r["kind"] == "setup")["read_bandwidth_gb_s"]
        for model, sides in data["models"].items()
        if model not in others
    )
    limits = (
        f"{copies[0]:.0f}"
        if round(copies[0]) == round(copies[-1])
        else f"{copies[0]:.0f} to {copies[-1]:.0f}"
    )
    return (
        f"{text}\n{data['device']}, driver {data['driver']}, float16, random weights, greedy, 512 tokens in and 128 out; "
        f"trtc at {data['commit']}{' with local changes' if data['dirty'] else ''} and vLLM {peer['vllm']} in one run on "
        f"{data['date']}, torch {setup['torch']}. Prefill is the time to the first token of the whole batch. "
        f"Aims are for an H200; an H100 reads memory 0.7 times as fast. "
        f"Mixed is the better of two runs; the first one of trtc also captures its CUDA graphs. "
        f"The read limit is what a copy moves in the process that measured a model, {limits} GB/s; a step that read at "
        f"it would have the ratio of the last column. {remark(data)}Samples: `bench/results/{name}`.\n"
    )


def remark(data: dict[str, Any]) -> str:
    """Which models are of other runs on such a GPU, where there are any, and what whoever measured has to say."""
    others = [
        f"OPT-{model.upper()} in a run of {run['date']} at {run['commit']} ({run['read_bandwidth_gb_s']:.0f} GB/s). "
        for model, run in data.get("other_runs", {}).items()
    ]
    return "".join(others) + (f"{data['note']}. " if "note" in data else "")


def plans_table(data: dict[str, Any]) -> str:
    """What TensorRT plans cost to build: one line a model and dtype, for all GPUs that were measured."""
    header = (
        "model",
        "dtype",
        "for GPUs",
        "weights",
        "plan",
        "build time",
        "of a processor",
        "memory at most",
    )
    lines: list[tuple[str, ...]] = []
    by_size = sorted(data["cases"], key=lambda case: case["weight_bytes"])
    for model, dtype in dict.fromkeys((case["model"], case["dtype"]) for case in by_size):
        cases = [case for case in data["cases"] if (case["model"], case["dtype"]) == (model, dtype)]
        gpus = sorted((case["compute_capability"] for case in cases), key=float)
        lines.append((
            f"OPT-{model.upper()}" if model != "tiny" else "examples/tiny-opt", dtype, ", ".join(gpus),
            spread(cases, "weight_bytes", 1e6, "MB"), spread(cases, "plan_bytes", 1e6, "MB"),
            spread(cases, "build_s", 1, "s"), spread(cases, "cpu_s", 1, "s"),
            spread(cases, "peak_bytes", 1e9, "GB"),
        ))  # fmt: skip
    text = table_of(header, lines)
    versions = ", ".join(f"{name} {number}" for name, number in data["versions"].items())
    return (
        f"{text}\n{data['device']}; random weights, max-batch-size 8, max-num-tokens 8192; {versions}; trtc at "
        f"{data['commit']}{' with local changes' if data['dirty'] else ''} on {data['date']}. A plan for each GPU was built "
        f"alone, in one thread, while the machine had other work too; least to most over the GPUs. The time is that of "
        f"`trtc build`, random numbers included. Samples: `bench/results/{PLANS.name}`, made by `bench/tensorrt_plans.py`.\n"
    )


def spread(cases: list[dict[str, Any]], key: str, unit: float, name: str) -> str:
    """`12.1 to 12.4 MB`, or `12.1 MB` where both ends read alike."""
    least, most = (f"{float(f'{pick(case[key] for case in cases) / unit:.3g}'):g}" for pick in (min, max))
    return f"{least} {name}" if least == most else f"{least} to {most} {name}"


TABLES = (
    (ROOT / "README.md", RESULTS, table),
    (ROOT / "docs" / "tensorrt.md", PLANS, plans_table),
    (ROOT / "README.md", RESULTS.parent / "cpu.json", cpu.table),
    (ROOT / "docs" / "cpu.md", RESULTS.parent / "cpu-scaling.json", cpu_scaling.table),
    (ROOT / "docs" / "cuda.md", H100, partial(table, name=H100.name)),
    *(
        (ROOT / "docs" / "quantization.md", path, partial(quantized_steps.table, name=path.name))
        for path in (quantized_steps.RESULTS, quantized_steps.ON_H100)
    ),
    (ROOT / "docs" / "quantization.md", fp8.RESULTS, fp8.markdown),
    (ROOT / "docs" / "parallel.md", tensor_parallel.PIPELINES, tensor_parallel.pipeline_markdown),
    *(
        (ROOT / "docs" / "parallel.md", module.RESULTS, module.markdown)
        for module in (all_reduce, tensor_parallel, ranks_vs_vllm, rank_tokens, gpu_rank_memory)
        if module.RESULTS.exists()  # measured when there are GPUs
    ),
    (
        ROOT / "docs" / "parallel.md",
        all_reduce.ON_FOUR,
        partial(all_reduce.markdown, name=all_reduce.ON_FOUR.name),
    ),
    *(
        (ROOT / "README.md", path, server_tables.rates)
        for path in [RESULTS.parent / f"{server_tables.ON_A_GPU}.json"]
        if path.exists()  # likewise
    ),
)
"""Page, results, and what makes the table of them; a table is called as its results."""


def current(page: Path, results: Path, render: Callable[[dict[str, Any]], str]) -> str:
    """What the page should say."""
    return with_table(page.read_text(), results.stem, render(json.loads(results.read_text())))


def main() -> None:
    for one in TABLES:
        one[0].write_text(current(*one))


if __name__ == "__main__":
    main()
