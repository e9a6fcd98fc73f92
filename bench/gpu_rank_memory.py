"""What each rank of an engine takes of its GPU, with the token embedding whole, split by vocabulary and by hidden size.

    python -m trtc.bench.gpu_rank_memory --sizes 125m 1.3b --tp-size 2 --commit HASH --json FILE

All engines run in one job, one after the other, each with a KV cache of CACHE_BYTES; every rank writes down the bytes of its
weights, the most that torch had allocated since loading began, and how much of the GPU was taken at the end, less what was
taken before. The latter counts CUDA graphs, NCCL and everything else. `rank_memory.py` does the same for CPU ranks.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import torch

from ..core.engine import Engine
from ..runtime.cuda_executor import CudaExecutor
from ..runtime.launcher import launch_ranks
from ..runtime.llm import LLM
from ..runtime.placement import placement
from ..runtime.sampling_params import SamplingParams
from .against_vllm import TRTC, run
from .kernels.harness import nvidia_smi
from .markdown import table_of
from .opt_sizes import SIZES, is_built, work_folder, write_config
from .rank_memory import EMBEDDINGS, MIB

RESULTS = Path(__file__).parent / "results" / "gpus-rank-memory.json"
CACHE_BYTES = 64 << 20
TOKENS = 16


def build(size: str, embedding: str, folder: Path, args: argparse.Namespace) -> Path:
    engine = folder / f"{size}-{embedding.replace(' ', '')}"
    dim = [f"--embedding-sharding-dim={dim}" for dim in EMBEDDINGS[embedding]]
    if not is_built(engine):
        failed = run([*TRTC, "build", "--target", "cuda", "--dtype", "float16", "--dummy-weights", "--cuda-arch", args.arch,
                      "--model-dir", str(write_config(size, folder / size)), "--output-dir", str(engine),
                      "--max-seq-len", "256", "--max-num-tokens", "1024", "--tp-size", str(args.tp_size),
                      *(["--use-parallel-embedding", *dim] if dim else []),
                      "--workers", "4"])  # fmt: skip
        if failed:
            raise SystemExit(failed["message"])
    return engine


def taken() -> int:
    """Bytes of this rank's GPU that are in use, by whom ever."""
    free, total = torch.cuda.mem_get_info()
    return total - free


def run_rank(folder: Path, engines: list[Path]) -> None:
    """One rank, all engines: what each took goes to `folder`."""
    place = placement()
    device = place.local_rank if place.local_rank is not None else place.rank
    torch.cuda.set_device(device)
    found: dict[str, dict[str, int]] = {}
    at_end: list[int] = []
    close = CudaExecutor.close

    def noted(self: CudaExecutor) -> None:  # the last moment at which all is there, on every rank
        torch.cuda.synchronize()
        at_end.append(taken())
        close(self)

    CudaExecutor.close = noted  # type: ignore[method-assign]
    for engine in (engines[0], *engines):  # the first loads what stays loaded
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        held, before = torch.cuda.memory_allocated(), taken()
        at_end.clear()
        try:
            with LLM(engine, verify=False, kv_cache_memory_bytes=CACHE_BYTES) as llm:
                params = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True)
                llm.generate([[2, *range(10 * i, 10 * i + 30)] for i in range(1, 5)], params)
        except (
            SystemExit
        ):  # a rank that has followed rank 0 to the end of one engine can follow it to the next
            pass
        graph = Engine.open(engine, verify=False, rank=place.rank).ranks[place.rank].graph
        found[engine.name] = {
            "weights": sum(node.outputs[0].nbytes() for node in graph.weights),
            "allocated": torch.cuda.max_memory_allocated() - held,
            "taken": at_end[0] - before,
        }
    (folder / f"{place.rank}.json").write_text(json.dumps(found))


def main() -> int:
    args = arguments()
    if args.rank:
        run_rank(args.rank[0], args.rank[1:])
        return 0
    with work_folder(args.work_dir) as folder:
        cases = list(product(args.sizes, EMBEDDINGS))
        with ThreadPoolExecutor(len(cases)) as pool:
            engines = list(pool.map(lambda case: build(*case, folder, args), cases))
        if args.build_only:
            return 0
        command = [
            sys.executable,
            "-m",
            "trtc.bench.gpu_rank_memory",
            "--rank",
            str(folder),
            *map(str, engines),
        ]
        if code := launch_ranks(command, args.tp_size):
            return code
        ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(args.tp_size)]
    data = {
        "date": datetime.date.today().isoformat(),
        "commit": args.commit[:12],
        "device": torch.cuda.get_device_name(),
        "driver": nvidia_smi("driver_version"),
        "torch": torch.__version__,
        "tp_size": args.tp_size,
        "cache_bytes": CACHE_BYTES,
        "rows": [
            {"model": size, "embedding": embedding, "ranks": [found[engine.name] for found in ranks]}
            for (size, embedding), engine in zip(cases, engines, strict=True)
        ],
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(data, indent=1) + "\n")
    print(markdown(data))
    return 0


def markdown(data: dict[str, Any]) -> str:
    """The largest rank of every row, and the line below that says what was measured."""
    header = (
        "model",
        "parallel embedding",
        "weights of a rank",
        "beside off",
        "allocated at most",
        "taken of the GPU",
    )
    lines: list[tuple[str, ...]] = []
    whole: dict[str, int] = {}
    for row in data["rows"]:
        largest = {key: max(rank[key] for rank in row["ranks"]) for key in ("weights", "allocated", "taken")}
        share = largest["weights"] / whole.setdefault(row["model"], largest["weights"])
        cells = [f"{largest[key] / MIB:.0f} MiB" for key in largest]
        lines.append((f"OPT-{row['model'].upper()}", row["embedding"], cells[0], f"{share:.0%}", *cells[1:]))
    text = table_of(header, lines)
    return (
        f"{text}\nTarget cuda, tensor parallel over {data['tp_size']} x {data['device']}, float16, random weights, a KV cache "
        f"of {data['cache_bytes'] >> 20} MiB, driver {data['driver']}, torch {data['torch']}, trtc at {data['commit']} on "
        f"{data['date']}. The largest rank of each row: what torch had allocated at most (cache and activations too), and what "
        f"was taken of the GPU before the engine was closed, with graphs and NCCL, less what was taken before it was loaded. "
        f"Every rank: `bench/results/{RESULTS.name}`.\n"
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rank", nargs="+", type=Path, metavar="FOLDER ENGINE", help=argparse.SUPPRESS)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["125m", "1.3b"])
    parser.add_argument("--tp-size", type=int, default=2, metavar="N")
    parser.add_argument("--arch", default="sm_90", help="what to compile for (default: %(default)s)")
    parser.add_argument(
        "--work-dir", type=Path, metavar="DIR", help="keep models and engines here, and take those that are"
    )
    parser.add_argument(
        "--build-only", action="store_true", help="build the engines into --work-dir, measure nothing"
    )
    parser.add_argument("--commit", default="unknown", help="the commit that is measured")
    parser.add_argument("--json", type=Path, default=RESULTS, metavar="FILE", help="default: %(default)s")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
