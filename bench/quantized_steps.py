"""How long a decode step of target cuda takes with weights, or a KV cache, in fewer bits, beside float16.

    python -m trtc.bench.quantized_steps --sizes 6.7b 1.3b --formats int8 int4 fp8 fp8-kv8 --commit HASH --json FILE

Builds engines with random weights and times each with `trtc bench`, float16 first. A run that fails is in the file as
{"kind": "error"}, the others go on, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .against_vllm import TRTC, run
from .kernels.harness import nvidia_smi
from .markdown import table_of
from .opt_sizes import SIZES, is_built, work_folder, write_config

Record = dict[str, Any]
RESULTS = Path(__file__).parent / "results" / "gpu-quantized.json"
ON_H100 = RESULTS.with_name("h100-quantized.json")
FLOAT = "float16"
FORMATS: dict[str, tuple[str, ...]] = {
    **{name: ("--use-weight-only", "--weight-only-precision", name) for name in ("int8", "fp8", "int4")},
    "float16-kv8": ("--kv-cache-dtype", "fp8"),
    "w8a8": ("--quantization", "fp8"),
    "w8a8-kv8": ("--quantization", "fp8", "--kv-cache-dtype", "fp8"),
    "fp8-kv8": ("--use-weight-only", "--weight-only-precision", "fp8", "--kv-cache-dtype", "fp8"),
}
"""Name -> options of `trtc build`; w8a8: weights and activations in fp8; kv8: with a KV cache of fp8."""
BUILD = ("--target", "cuda", "--dtype", FLOAT, "--dummy-weights", "--max-batch-size", "64", "--max-seq-len", "1024",
         "--max-num-tokens", "16384", "--workers", str(len(os.sched_getaffinity(0))))  # fmt: skip


def main() -> int:
    args = arguments()
    data: Record = {
        "date": datetime.date.today().isoformat(),
        "commit": args.commit[:12],
        "driver": nvidia_smi("driver_version"),
        "runs": [],
    }
    with work_folder(args.work_dir) as folder:
        for size in args.sizes:
            for name in (FLOAT, *args.formats):
                records = measure(size, name, folder, args)
                data["runs"].append({"model": size, "format": name, "records": records})
                args.json.write_text(json.dumps(data, indent=1) + "\n")
    errors = [r["message"] for one in data["runs"] for r in one["records"] if r["kind"] == "error"]
    for message in errors:
        print(f"FAILED: {message}", file=sys.stderr)
    return 1 if errors else 0


def measure(size: str, name: str, folder: Path, args: argparse.Namespace) -> list[Record]:
    """What `trtc bench` says of the engine of `size` in the format `name`, which is built unless it is there."""
    engine, report = folder / f"{size}-{name}", folder / "report.json"
    how = [] if name == FLOAT else FORMATS[name]
    model = write_config(size, folder / size)
    if not is_built(engine):
        failed = run([*TRTC, "build", "--model-dir", str(model), "--output-dir", str(engine), *BUILD, *how,
                      "--cuda-arch", args.arch])  # fmt: skip
        if failed:
            return [failed]
    failed = run([*TRTC, "bench", "--engine-dir", str(engine), "--no-verify", "--repeat", str(args.repeat),
                  "--batch", *map(str, args.batch), "--json", str(report)])  # fmt: skip
    return [failed] if failed else json.loads(report.read_text())


def table(data: Record, name: str = RESULTS.name) -> str:
    """The table of results file `name`, and the line below it that says what was measured."""
    header = ("model", "weights", "batch", "step", "beside float16", "% of read limit", "prefill")
    text = table_of(header, rows(data["runs"]))
    records = [record for one in data["runs"] for record in one["records"]]
    setup = next(record for record in records if record["kind"] == "setup")
    notes = "".join(f" OPT-{one['model'].upper()}: {one['note']}." for one in data["runs"] if "note" in one)
    remark = f" {data['note']}." if "note" in data else ""
    return (
        f"{text}\n{setup['device']}, driver {data['driver']}, torch {setup['torch']}, trtc at {data['commit']} on "
        f"{data['date']}; random weights, groups of 128, float16, greedy, 512 tokens in, 128 out. The limit is what a copy "
        f"moves, {setup['read_bandwidth_gb_s']:.0f} GB/s, for the bytes a step reads: weights as stored, and the cache."
        f"{notes}{remark} Samples: `bench/results/{name}`.\n"
    )


def rows(runs: Sequence[Record]) -> Iterator[tuple[str, ...]]:
    """A line a model, format and batch."""
    floats: dict[tuple[str, int], float] = {}
    for one in runs:
        for record in one["records"]:
            if record["kind"] != "batch":
                continue
            key, step = (one["model"], record["batch"]), record["decode_ms_per_token"]
            if one["format"] == FLOAT:
                floats[key] = step
            faster = f"{floats[key] / step:.2f}" if key in floats else ""
            yield (
                f"OPT-{one['model'].upper()}", one["format"], str(record["batch"]), f"{step:.3f} ms", faster,
                str(record.get("decode_percent_of_read_limit", "")), f"{record['prefill_s'] * 1e3:.1f} ms",
            )  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, required=True)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 64], metavar="N")
    parser.add_argument("--repeat", type=int, default=3, metavar="N")
    parser.add_argument("--arch", default="sm_90", help="what to compile for (default: %(default)s)")
    parser.add_argument(
        "--work-dir", type=Path, metavar="DIR", help="keep models and engines here, and take those that are"
    )
    parser.add_argument("--commit", required=True, help="the commit that is measured")
    parser.add_argument("--json", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
