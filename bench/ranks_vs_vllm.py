"""Models over several GPUs of one host, trtc beside vLLM in one run: decode steps and prefill with tensor parallel.

    python -m trtc.bench.ranks_vs_vllm --sizes 13b 66b --tp-size 2 --peer PEER_DIR --commit $(git rev-parse HEAD) --json FILE

PEER_DIR holds vLLM unpacked in `site/`; without it only trtc is timed. Both sides have random weights of the same config and
the same cases. Where 64 sequences of 512 tokens in and 128 out do not fit beside the weights, 64 have shorter ones, and the
prefill of 64 x 512 is timed alone: both sides then run it in as many steps as their cache asks for. An engine is built into
/dev/shm unless --work-dir says otherwise, and deleted once it is timed unless --keep. A side that fails is in the file as
{"kind": "error"}, the others go on, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .against_vllm import TRTC, run
from .kernels.harness import nvidia_smi
from .markdown import table_of
from .opt_sizes import SIZES, is_built, opt_config, work_folder, write_config

Record = dict[str, Any]
RESULTS = Path(__file__).parent / "results" / "gpus-vs-vllm.json"
SEQUENCES, TOKENS_IN, TOKENS_OUT = 64, 512, 128
PAGE, MAX_SEQ_LEN = 32, 1024
PEER_MEMORY = 0.93
"""Share of a GPU's memory that vLLM may take."""
SPARE_BYTES = 4 << 30
"""Of a GPU, beside weights and cache, within `PEER_MEMORY`: contexts, NCCL, activations, graphs."""
AIMS = {
    ("66b", "decode", 1): 1.2,
    ("66b", "decode", 8): 1.15,
    ("66b", "decode", 64): 1.05,
    ("66b", "prefill", 64): 1.05,
}
"""Ratios that are meant to be reached on four H200."""
SINGLE_THREADED = {"OMP_NUM_THREADS": "1"}
"""Of a build, whose workers are as many as there are cores."""


@dataclass(frozen=True)
class Plan:
    """How a model is run on GPUs of a certain size."""

    cases: tuple[str, ...]
    max_num_tokens: int
    cache_bytes: int
    """Of a rank."""
    tight: bool


def plan(size: str, tp_size: int, gpu_bytes: int) -> Plan:
    """What fits on `tp_size` GPUs. Raises SystemExit where not even the weights do."""
    fields = opt_config(size)
    hidden, layers = int(fields["hidden_size"]), int(fields["num_hidden_layers"])
    weights = 2 * (12 * layers * hidden**2 + fields["vocab_size"] * hidden) // tp_size
    token = 2 * 2 * layers * hidden // tp_size
    room = int(gpu_bytes * PEER_MEMORY) - SPARE_BYTES - weights
    most = room // token
    if most < 8 * (TOKENS_IN + TOKENS_OUT):
        raise SystemExit(
            f"{size} does not fit {tp_size} GPUs of {gpu_bytes >> 20} MiB: take a larger --tp-size"
        )
    usual = [f"{batch}x{TOKENS_IN}x{TOKENS_OUT}" for batch in (1, 8)]
    if most >= SEQUENCES * (TOKENS_IN + TOKENS_OUT):
        cases = (*usual, f"{SEQUENCES}x{TOKENS_IN}x{TOKENS_OUT}")
        return Plan(cases, 16384, min(most, SEQUENCES * MAX_SEQ_LEN) * token, tight=False)
    each = most // SEQUENCES // PAGE * PAGE
    tokens_in = min(TOKENS_IN, each * 2 // 3 // PAGE * PAGE)
    cases = (
        *usual,
        f"{SEQUENCES}x{tokens_in}x{min(TOKENS_OUT, each - tokens_in)}",
        f"{SEQUENCES}x{TOKENS_IN}x1",
    )
    return Plan(cases, 8192, most // PAGE * PAGE * token, tight=True)


def main() -> int:
    args = arguments()
    gpu_bytes = int(nvidia_smi("memory.total").split()[0]) << 20
    data = results(args)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    for size in args.sizes:
        planned = plan(size, args.tp_size, gpu_bytes)
        sides: Record = {"cases": planned.cases, "tight": planned.tight}
        data["models"][size] = sides
        with work_folder(args.work_dir and args.work_dir / f"{size}-tp{args.tp_size}") as folder:
            for side, measure in (("trtc", ours), ("vllm", theirs)):
                if side == "vllm" and args.peer is None:
                    continue
                sides[side] = list(measure(size, planned, folder, args))
                args.json.write_text(json.dumps(data, indent=1) + "\n")  # what is measured is kept
        print("".join(f"{'  '.join(cells)}\n" for cells in rows(data)), flush=True)
    errors = [r for sides in data["models"].values() for r in records(sides) if r["kind"] == "error"]
    for record in errors:
        print(f"FAILED: {record['command']}: {record['message']}", file=sys.stderr)
    return 1 if errors else 0


def results(args: argparse.Namespace) -> Record:
    """What the file holds, or an empty one. Raises SystemExit where that is of another commit, driver or number of ranks."""
    found = {
        "commit": args.commit[:12],
        "driver": nvidia_smi("driver_version"),
        "tp_size": args.tp_size,
        "peer_memory": PEER_MEMORY,
    }
    if not args.json.exists():
        return {"date": datetime.date.today().isoformat(), **found, "models": {}}
    data: Record = json.loads(args.json.read_text())
    for what, now in found.items():
        if data[what] != now:
            raise SystemExit(f"{args.json} is of {what} {data[what]}, this is {now}: take another file")
    return data


def ours(size: str, planned: Plan, folder: Path, args: argparse.Namespace) -> Iterator[Record]:
    """Builds the engine unless it is there, and times it."""
    engine, report = folder / "engine", folder / "report.json"
    start = time.perf_counter()
    failed = None
    if not is_built(engine):
        failed = run(
            [*TRTC, "build", "--target", "cuda", "--dtype", "float16", "--dummy-weights", "--cuda-arch", args.arch,
             "--model-dir", str(write_config(size, folder / "model")), "--output-dir", str(engine),
             "--max-batch-size", str(SEQUENCES), "--max-seq-len", str(MAX_SEQ_LEN), "--page-size", str(PAGE),
             "--max-num-tokens", str(planned.max_num_tokens), "--tp-size", str(args.tp_size),
             "--use-parallel-embedding", "--workers", str(len(os.sched_getaffinity(0)))],
            SINGLE_THREADED,
        )  # fmt: skip
        yield failed or {"kind": "build", "build_s": round(time.perf_counter() - start, 1)}
    if failed or args.build_only:
        return
    failed = run([*TRTC, "bench", "--engine-dir", str(engine), "--nproc", str(args.tp_size), "--no-verify",
                  "--kv-cache-memory-bytes", str(planned.cache_bytes), "--cases", *planned.cases,
                  "--repeat", str(args.repeat), "--json", str(report)])  # fmt: skip
    yield from [failed] if failed else json.loads(report.read_text())
    if not args.keep:
        shutil.rmtree(engine)


def theirs(size: str, planned: Plan, folder: Path, args: argparse.Namespace) -> Iterator[Record]:
    """The records of `vllm_cases.py`; its log lies beside the results."""
    if args.build_only:
        return
    path = os.pathsep.join([str(args.peer / "site"), os.environ.get("PYTHONPATH", "")])
    environment = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "VLLM_HOST_IP": "127.0.0.1",
                   "VLLM_CACHE_ROOT": "/tmp/vllm_cache", "NCCL_NVLS_ENABLE": "0",
                   "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}  # fmt: skip
    steps = ["--max-num-tokens", str(planned.max_num_tokens)] if planned.tight else []
    command = [sys.executable, str(Path(__file__).with_name("vllm_cases.py")),
               "--config-dir", str(write_config(size, folder / "model")), "--tp-size", str(args.tp_size),
               "--gpu-memory-utilization", str(PEER_MEMORY), "--max-model-len", str(MAX_SEQ_LEN),
               "--repeat", str(args.repeat), "--cases", *planned.cases, *steps]  # fmt: skip
    log = args.json.with_suffix(f".{size}.vllm.log")
    with log.open("w") as sink:
        failed = run(command, environment, stdout=sink, limit_s=args.peer_limit_s)
    if failed:
        yield failed
    yield from (json.loads(line) for line in log.read_text().splitlines() if line.startswith('{"kind"'))


def records(sides: Record) -> Iterator[Record]:
    for side in ("trtc", "vllm"):
        yield from sides.get(side, ())


HEADER = ("model", "case", "trtc", "vLLM", "ratio", "aim", "% of read limit")


def rows(data: Record) -> Iterator[tuple[str, ...]]:
    """A line a decode step, and one for the prefill of the largest batch with the longest prompts."""
    for size, sides in data["models"].items():
        measured = [
            {(r["batch"], r["in_len"], r["out_len"]): r for r in sides.get(side, ()) if r["kind"] == "batch"}
            for side in ("trtc", "vllm")
        ]
        for key, one in measured[0].items():
            if "decode_ms_per_token" in one:
                other = measured[1].get(key, {}).get("decode_ms_per_token")
                case = f"decode step, {key[0]} x {key[1]} in, {key[2]} out"
                limit = str(one["decode_percent_of_read_limit"])
                yield row(size, "decode", key[0], case, one["decode_ms_per_token"], other, limit)
        if measured[0]:
            key = max(measured[0], key=lambda k: (k[0], k[1]))
            other = measured[1].get(key, {}).get("prefill_s")
            seconds = measured[0][key]["prefill_s"]
            case = f"prefill, {key[0]} x {key[1]}"
            yield row(size, "prefill", key[0], case, seconds * 1e3, other and other * 1e3, "")


def row(
    size: str, what: str, batch: int, case: str, ours: float, other: float | None, limit: str
) -> tuple[str, ...]:
    digits = 3 if what == "decode" else 1
    theirs, ratio = ("", "") if other is None else (f"{other:.{digits}f} ms", f"{other / ours:.2f}")
    aim = AIMS.get((size, what, batch))
    short = " (short)" if aim and other and other / ours < aim else ""
    return (f"OPT-{size.upper()}", case, f"{ours:.{digits}f} ms", theirs, ratio, f"{aim or ''}{short}", limit)


def markdown(data: Record) -> str:
    """The table of a results file, and the line below it that says what was measured."""
    text = table_of(HEADER, rows(data))
    every = [record for sides in data["models"].values() for record in records(sides)]
    setup = next(r for r in every if r["kind"] == "setup" and "trtc" in r)
    peer = next((f" and vLLM {r['vllm']} in one run" for r in every if "vllm" in r), "")
    tight = [f"OPT-{size.upper()}" for size, sides in data["models"].items() if sides["tight"]]
    short = (
        f"{' and '.join(tight)}: 64 sequences of 640 tokens do not fit beside the weights, so that they are shorter here and "
        f"the prefill of 64 x 512 is timed alone, in as many steps as each side's cache asks for. "
        if tight
        else ""
    )
    note = f"{data['note']}. " if "note" in data else ""
    return (
        f"{text}\n{data['tp_size']} x {setup['device']}, driver {data['driver']}, torch {setup['torch']}, tensor parallel; "
        f"trtc at {data['commit']}{peer} on {data['date']}; random weights, float16, greedy. Aims are those for four H200. "
        f"{short}{note}Samples: `bench/results/{RESULTS.name}`.\n"
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=SIZES, required=True)
    parser.add_argument("--tp-size", type=int, required=True, metavar="N")
    parser.add_argument("--peer", type=Path, help="folder with vLLM in site/")
    parser.add_argument(
        "--peer-limit-s", type=float, default=540, metavar="X",
        help="vLLM is ended then; what it has timed by then is kept (default: %(default)g)",
    )  # fmt: skip
    parser.add_argument("--arch", default="sm_90", help="what to compile for (default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=3, metavar="N")
    parser.add_argument("--work-dir", type=Path, default=Path("/dev/shm/trtc-ranks"), metavar="DIR",
                        help="models and engines (default: %(default)s)")  # fmt: skip
    parser.add_argument("--keep", action="store_true", help="do not delete the engines")
    parser.add_argument(
        "--build-only", action="store_true", help="build the engines, which stay, and time nothing"
    )
    parser.add_argument("--commit", required=True, help="the commit that is measured")
    parser.add_argument(
        "--json", type=Path, required=True, metavar="FILE", help="is added to where it exists"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
