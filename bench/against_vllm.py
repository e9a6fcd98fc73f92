"""trtc and vLLM on one GPU in one run, for the table of the README: checks first, then times both sides in turn.

    python -m trtc.bench.against_vllm --sizes 125m 1.3b --peer PEER_DIR --commit $(git rev-parse HEAD) --json FILE

PEER_DIR holds `bench_vllm.py` and vLLM unpacked in `site/`; without it only trtc is timed. Both sides have random weights
of the same config, and each is a process of its own. A side that fails is in the file as {"kind": "error", ...}, and the
script goes on with the next: time on such a machine is short. The exit code is then 1.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .kernels.harness import nvidia_smi
from .opt_sizes import SIZES, is_built, work_folder, write_config

Record = dict[str, Any]
BATCHES = ("1", "8", "64")
BUILD = ("--target", "cuda", "--dtype", "float16", "--dummy-weights", "--max-batch-size", "512", "--max-seq-len", "1024",
         "--max-num-tokens", "16384", "--workers", str(len(os.sched_getaffinity(0))))  # fmt: skip
"""512 sequences fit at once, as vLLM's default has it; 1,024 tokens hold 512 in and 256 out."""
_LIMIT_S = 540
"""A side that takes longer is ended."""


def main() -> int:
    args = arguments()
    earlier = earlier_results(args)
    with work_folder(args.work_dir) as scratch, ThreadPoolExecutor(1) as background:
        folders = {size: scratch / size for size in args.sizes}
        builds = background.submit(lambda: {size: build(size, at, args) for size, at in folders.items()})
        data: Record = {
            "date": datetime.date.today().isoformat(),
            "commit": args.commit[:12],
            "dirty": args.dirty,
            "driver": nvidia_smi("driver_version"),
            "check": earlier.get("check") or check(),
            "peer_memory": args.peer_memory,
            "models": {
                size: one for size, one in earlier.get("models", {}).items() if size not in args.sizes
            },
        }
        failed_builds = builds.result()  # nothing else runs while something is timed
        for size, at in folders.items():
            failed = failed_builds[size]
            sides = data["models"][size] = {"trtc": [failed] if failed else list(ours(at, args))}
            if args.peer is not None:
                sides["vllm"] = list(theirs(at / "model", args))
            setups = (r["device"] for r in sides["trtc"] if r["kind"] == "setup")
            data["device"] = next(setups, data.get("device"))
            args.json.write_text(json.dumps(data, indent=1) + "\n")  # what is measured is kept
    sides_of_all = [side for sides in data["models"].values() for side in sides.values()]
    errors = [record for side in sides_of_all for record in side if record["kind"] == "error"]
    for record in errors:
        print(f"FAILED: {record['command']}: {record['message']}", file=sys.stderr)
    return 1 if errors else 0


def earlier_results(args: argparse.Namespace) -> Record:
    """What the file holds already. Raises SystemExit where that is of another commit, driver or share of memory."""
    if not args.json.exists():
        return {}
    data: Record = json.loads(args.json.read_text())
    found = {
        "commit": args.commit[:12],
        "driver": nvidia_smi("driver_version"),
        "peer_memory": args.peer_memory,
    }
    for what, now in found.items():
        if data[what] != now:
            raise SystemExit(f"{args.json} is of {what} {data[what]}, this is {now}: take another file")
    return data


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, required=True)
    parser.add_argument("--peer", type=Path, help="folder with bench_vllm.py and site/")
    parser.add_argument("--arch", default="sm_90", help="what to compile for (default: %(default)s)")
    parser.add_argument(
        "--mixed", type=int, default=512, help="requests of the mixed load (default: %(default)s)"
    )
    parser.add_argument(
        "--peer-memory", type=float, default=0.9, metavar="X",
        help="share of the GPU's memory that vLLM may take (default: %(default)s, as trtc does with what is free)",
    )  # fmt: skip
    parser.add_argument(
        "--work-dir", type=Path, metavar="DIR", help="keep models and engines here, and take those that are"
    )
    parser.add_argument("--commit", required=True, help="the commit that is measured")
    parser.add_argument("--dirty", action="store_true", help="there are changes on top of it")
    parser.add_argument("--json", type=Path, required=True, help="is added to where it exists")
    return parser.parse_args()


def check() -> str:
    """Runs the engine tests on the GPU; what is timed has to be right first."""
    tests = Path(__file__).parent.parent / "tests" / "gpu" / "test_cuda_engine.py"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "gpu", str(tests)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"the checks failed, nothing was timed:\n{result.stdout[-3000:]}")
    return f"{tests.name}: {result.stdout.strip().splitlines()[-1]}"


TRTC = (sys.executable, "-m", "trtc.cli")


def build(size: str, folder: Path, args: argparse.Namespace) -> Record | None:
    """Writes `folder`/model and `folder`/engine. None when that went well, otherwise a record of what was said."""
    config = write_config(size, folder / "model")
    if is_built(folder / "engine"):
        return None
    return run([*TRTC, "build", "--model-dir", str(config), "--output-dir", str(folder / "engine"), *BUILD,
                "--cuda-arch", args.arch])  # fmt: skip


def ours(folder: Path, args: argparse.Namespace) -> Iterator[Record]:
    engine, report = folder / "engine", folder / "trtc.json"
    yield from first_token(
        [
            *TRTC,
            "run",
            "--engine-dir",
            str(engine),
            "--input-ids",
            "5,6,7",
            "--max-output-len",
            "1",
            "--stream",
        ]
    )
    timed = run([*TRTC, "bench", "--engine-dir", str(engine), "--batch", *BATCHES, "--mixed", str(args.mixed),
                 "--json", str(report)])  # fmt: skip
    yield from [timed] if timed else json.loads(report.read_text())


def first_token(command: Sequence[str]) -> Iterator[Record]:
    """From the start of a process to what it writes first, and to its end."""
    shown = " ".join(command[1:])
    print(f"$ {shown}", flush=True)
    start = time.perf_counter()
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors) as process,
    ):
        limit = threading.Timer(_LIMIT_S, process.kill)
        limit.start()
        assert process.stdout is not None
        process.stdout.read(1)
        first = time.perf_counter() - start
        process.communicate()
        end = time.perf_counter() - start
        limit.cancel()
        errors.seek(0)
        said = errors.read()[-2000:].strip()
    if process.returncode:
        yield {"kind": "error", "command": shown, "message": said or f"ended with {process.returncode}"}
    else:
        yield {
            "kind": "process",
            "start_to_first_token_s": round(first, 2),
            "start_to_end_s": round(end, 2),
        }


def theirs(config: Path, args: argparse.Namespace) -> Iterator[Record]:
    """The records of the peer's script; `process` is its import and start, to which its first token would come."""
    path = os.pathsep.join([str(args.peer / "site"), os.environ.get("PYTHONPATH", "")])
    environment = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
                   "VLLM_HOST_IP": "127.0.0.1", "VLLM_CACHE_ROOT": "/tmp/vllm_cache"}  # fmt: skip
    log = args.json.with_suffix(".vllm.log")
    command = [sys.executable, str(args.peer / "bench_vllm.py"), "--config-dir", str(config), "--batch", *BATCHES,
               "--in-len", "512", "--out-len", "128", "--continuous", "--requests", str(args.mixed),
               "--gpu-memory-utilization", str(args.peer_memory)]  # fmt: skip
    with log.open("w") as sink:
        failed = run(command, environment, stdout=sink)
    if failed:
        yield failed
    for line in log.read_text().splitlines():
        if line.startswith('{"kind"'):
            record = json.loads(line)
            yield record
            if record["kind"] == "setup":
                yield {"kind": "process", "start_s": record["import_s"] + record["init_s"]}


def run(
    command: Sequence[str],
    environment: Mapping[str, str] | None = None,
    stdout: Any = None,
    limit_s: float = _LIMIT_S,
) -> Record | None:
    """None when the command went well, otherwise a record of what it said."""
    shown = " ".join(command[1:])
    print(f"$ {shown}", flush=True)
    try:
        result = subprocess.run(command, env={**os.environ, **(environment or {})}, stdout=stdout,
                                stderr=subprocess.PIPE, text=True, timeout=limit_s)  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"kind": "error", "command": shown, "message": f"not done after {limit_s:g} s"}
    if result.returncode:
        print(result.stderr, file=sys.stderr)
        # The last line is what went wrong; those before it name files of this machine.
        last = result.stderr.strip().splitlines()[-1:] or [f"ended with code {result.returncode}"]
        return {"kind": "error", "command": shown, "message": last[0]}
    return None


if __name__ == "__main__":
    sys.exit(main())
