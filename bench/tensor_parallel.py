"""How engines of target cuda scale over the GPUs of one machine: decode steps and prefill for each number of ranks.

    python -m trtc.bench.tensor_parallel --sizes 1.3b 6.7b --tp-sizes 1 2 1x2 --json out/tensor-parallel.json

1x2 is a pipeline of two stages, each of one rank.

Builds an engine with random weights for each size and number of ranks, and times it with `trtc bench --nproc N`. Efficiency is
the time of the smallest number of ranks over that of N, by how many times more GPUs that takes. The file is written after every
engine. A run that fails is in it as {"kind": "error"}, the others go on, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .kernels.harness import nvidia_smi
from .markdown import table_of
from .opt_sizes import SIZES, is_built, work_folder, write_config

Record = dict[str, Any]
RESULTS = Path(__file__).parent / "results" / "gpus-tensor-parallel.json"
PIPELINES = RESULTS.with_name("gpus-pipeline.json")
BUILD = (
    "--dummy-weights",
    "--dtype",
    "float16",
    "--max-batch-size",
    "64",
    "--max-seq-len",
    "768",
    "--max-num-tokens",
    "16384",
)


def main() -> int:
    args = arguments()
    data: Record = {
        "date": datetime.date.today().isoformat(),
        "commit": args.commit[:12],
        "driver": nvidia_smi("driver_version"),
        "runs": [],
    }
    for size in args.sizes:
        for tp_size, pp_size in args.tp_sizes:
            name = f"{size}-tp{tp_size}" + (f"-pp{pp_size}" if pp_size > 1 else "")
            with work_folder(args.work_dir and args.work_dir / name) as scratch:
                records = list(measure(size, tp_size, pp_size, scratch, args))
            when = {key: data[key] for key in ("date", "commit", "driver")}
            data["runs"].append(
                {"model": size, "tp_size": tp_size, "pp_size": pp_size, **when, "records": records}
            )
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(data, indent=1) + "\n")
            print(
                table(data["runs"]), flush=True
            )  # again, so that a run that is cut short has shown what it found
    errors = [r["message"] for run in data["runs"] for r in run["records"] if r["kind"] == "error"]
    for message in errors:
        print(f"FAILED: {message}", file=sys.stderr)
    return 1 if errors else 0


def measure(size: str, tp_size: int, pp_size: int, scratch: Path, args: argparse.Namespace) -> list[Record]:
    """What `trtc bench` says of the engine of `size` on `tp_size` times `pp_size` ranks, and how long that took."""
    engine, report = scratch / "engine", scratch / "report.json"
    config = write_config(size, scratch / "model")
    arch = [] if args.target == "cpu" else ["--cuda-arch", args.arch]
    words = [
        "build",
        "--target",
        args.target,
        "--model-dir",
        str(config),
        "--output-dir",
        str(engine),
        *BUILD,
        *arch,
    ]
    words += ["--tp-size", str(tp_size), "--pp-size", str(pp_size), "--workers", str(args.workers)]
    words += ["--use-parallel-embedding"] if args.use_parallel_embedding and tp_size > 1 else []
    start = time.perf_counter()
    failed = None if is_built(engine) else run(words)
    if args.build_only:
        return [failed] if failed else []
    if failed is None:
        built = time.perf_counter()
        words = [
            "bench",
            "--engine-dir",
            str(engine),
            "--nproc",
            str(tp_size * pp_size),
            "--no-verify",
            "--json",
            str(report),
        ]
        words += ["--batch", *map(str, args.batch), "--repeat", str(args.repeat)]
        failed = run([*words, "--input-len", str(args.input_len), "--output-len", str(args.output_len)])
    if failed is not None:
        return [failed]
    seconds = {"build_s": round(built - start, 1), "bench_s": round(time.perf_counter() - built, 1)}
    records: list[Record] = json.loads(report.read_text())
    return [{"kind": "took", **seconds}, *records]


def run(words: Sequence[str]) -> Record | None:
    """None when `trtc WORDS` went well, otherwise a record of what it said."""
    print(f"$ trtc {' '.join(words)}", flush=True)
    result = subprocess.run([sys.executable, "-m", "trtc.cli", *words], stderr=subprocess.PIPE, text=True)
    if result.returncode == 0:
        return None
    said = result.stderr.strip().splitlines() or ["nothing"]
    return {"kind": "error", "command": " ".join(words), "message": said[-1], "stderr": said[-20:]}


HEADER = ("model", "tp", "batch", "step ms", "speed-up", "efficiency", "prefill ms", "speed-up")


def table(runs: Sequence[Record]) -> str:
    widths = (8, 13, 6, 9, 9, 11, 11, 9)
    return "\n".join(
        "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)) for cells in rows(runs)
    )


def markdown(data: Record) -> str:
    """The table of a results file, and the line below it that says what was measured."""
    header, *lines = rows(data["runs"])
    text = table_of(header, lines)
    records = [record for run in data["runs"] for record in run["records"]]
    setup = next(record for record in records if record["kind"] == "setup")
    batch = next(record for record in records if record["kind"] == "batch")
    return (
        f"{text}\n{where_and_when(data)}; OPT with random weights, {setup['dtype']}, greedy, {batch['in_len']} tokens in, "
        f"{batch['out_len']} out. Efficiency is the speed-up by how many times more GPUs it takes. Samples: "
        f"`bench/results/{RESULTS.name}`.\n"
    )


def where_and_when(data: Record) -> str:
    """What the runs of a file were measured on, and at; models that were measured apart are named."""
    found: dict[str, list[str]] = {}
    for one in data["runs"]:
        setup = next((record for record in one["records"] if record["kind"] == "setup"), None)
        if setup is not None:
            said = {key: one.get(key, data[key]) for key in ("driver", "commit", "date")}
            text = (
                f"{setup['device']}, driver {said['driver']}, torch {setup['torch']}, trtc at {said['commit']} "
                f"on {said['date']}"
            )
            found.setdefault(text, []).append(one["model"])
    if len(found) == 1:
        return next(iter(found))
    return "; ".join(f"{', '.join(dict.fromkeys(models))}: {text}" for text, models in found.items())


def pipeline_markdown(data: Record) -> str:
    """The table of a results file of pipelines alone, and the line below it."""
    header = ("model", "stages", "batch", "step ms", "prefill ms")
    lines: list[tuple[str, ...]] = []
    for one in data["runs"]:
        for record in one["records"]:
            if record["kind"] == "batch":
                times = f"{record['decode_ms_per_token']:.3f}", f"{1e3 * record['prefill_s']:.1f}"
                lines.append((one["model"], str(one["pp_size"]), str(record["batch"]), *times))
    text = table_of(header, lines)
    records = [record for run in data["runs"] for record in run["records"]]
    setup = next(record for record in records if record["kind"] == "setup")
    return (
        f"{text}\nA GPU a stage: {setup['device']}, driver {data['driver']}, torch {setup['torch']}, trtc at {data['commit']} "
        f"on {data['date']}; OPT with random weights, {setup['dtype']}, greedy, 512 tokens in, 128 out. Samples: "
        f"`bench/results/{PIPELINES.name}`.\n"
    )


def rows(runs: Sequence[Record]) -> list[tuple[str, ...]]:
    """Header, and a line a model, number of ranks and batch: times beside the smallest number of ranks."""
    lines: list[tuple[str, ...]] = [HEADER]
    first: dict[tuple[str, int], tuple[int, Record]] = {}
    for one in runs:
        for record in one["records"]:
            if record["kind"] != "batch":
                continue
            stages = one.get("pp_size", 1)
            ranks = one["tp_size"] * stages
            fewest, base = first.setdefault((one["model"], record["batch"]), (ranks, record))
            faster = base["decode_ms_per_token"] / record["decode_ms_per_token"]
            efficiency = faster * fewest / ranks
            prefill = base["prefill_s"] / record["prefill_s"]
            split = f"{one['tp_size']}" + (f" x {stages} stages" if stages > 1 else "")
            names = (one["model"], split, str(record["batch"]))
            step = (f"{record['decode_ms_per_token']:.3f}", f"{faster:.2f}", f"{efficiency:.0%}")
            lines.append((*names, *step, f"{1e3 * record['prefill_s']:.1f}", f"{prefill:.2f}"))
    return lines


def split_of(text: str) -> tuple[int, int]:
    """`2` -> (2, 1), `1x2` -> (1, 2)."""
    tp_size, _, pp_size = text.partition("x")
    return int(tp_size), int(pp_size or 1)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=SIZES, required=True)
    parser.add_argument("--tp-sizes", nargs="+", type=split_of, required=True, metavar="N[xM]",
                        help="ranks that share each layer, and stages of a pipeline (default: one)")  # fmt: skip
    parser.add_argument("--target", default="cuda", choices=("cuda", "cpu"), help="default: %(default)s")
    parser.add_argument("--arch", default="sm_90", help="what to compile for (default: %(default)s)")
    parser.add_argument("--use-parallel-embedding", action="store_true")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 64], metavar="N")
    parser.add_argument("--input-len", type=int, default=512, metavar="N")
    parser.add_argument("--output-len", type=int, default=128, metavar="N")
    parser.add_argument("--repeat", type=int, default=3, metavar="N")
    parser.add_argument(
        "--workers", type=int, default=8, metavar="N", help="of the build (default: %(default)s)"
    )
    parser.add_argument(
        "--work-dir", type=Path, metavar="DIR", help="keep models and engines here, and take those that are"
    )
    parser.add_argument(
        "--build-only", action="store_true", help="build the engines into --work-dir, time nothing"
    )
    parser.add_argument("--commit", default="unknown", help="the commit that is measured")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
