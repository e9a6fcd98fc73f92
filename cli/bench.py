"""`trtc bench`: how fast an engine is on this machine."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.early_start import begin_loading
from ..runtime.heap import keep_heap, without_collection
from .common import add_kv_cache_memory
from .output_files import check_output_file, write_json
from .ranks import add_nproc, enter_job

if TYPE_CHECKING:
    from ..runtime.load_core import LoadOptions

NAME = "bench"
HELP = "time an engine: prefill, decode step and mixed load, beside the limit of the memory"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--engine-dir", type=Path, required=True, help="folder written by `trtc build`")
    parser.add_argument(
        "--batch", type=int, nargs="*", default=[1, 8, 64], metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--input-len", type=int, default=512, metavar="N", help="tokens (default: %(default)s)"
    )
    parser.add_argument(
        "--output-len", type=int, default=128, metavar="N", help="tokens (default: %(default)s)"
    )
    parser.add_argument("--cases", nargs="+", default=[], metavar="BxIxO",
                        help="instead of the three: batches with lengths of their own, as 8x512x128 64x64x32")  # fmt: skip
    parser.add_argument("--mixed", type=int, default=0, metavar="N",
                        help="also N requests at once, 64-512 tokens in, 32-256 out (default: none)")  # fmt: skip
    parser.add_argument(
        "--repeat", type=int, default=3, metavar="N", help="runs of each case (default: %(default)s)"
    )
    add_nproc(parser)
    add_kv_cache_memory(parser)
    parser.add_argument("--no-verify", action="store_true", help="do not compare the files' sha256 first")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every sample here")


def main(args: argparse.Namespace) -> int:
    start = time.perf_counter()
    from ..runtime.bench_case import Case, Load

    # first: what is wrong is said at once
    cases = tuple(map(Case.parse, args.cases))
    load = Load(tuple(args.batch), args.input_len, args.output_len, args.mixed, args.repeat, cases=cases)
    check_output_file(args.json, "--json")
    load_options: LoadOptions = {
        "verify": not args.no_verify,
        "kv_cache_memory_bytes": args.kv_cache_memory_bytes,
    }
    code = enter_job(args, **load_options)
    if code is not None:
        return code
    engine_dir = begin_loading(args.engine_dir, verify=not args.no_verify)
    with without_collection():
        from ..core.engine import Engine
        from ..runtime.benchmark import run
        from ..runtime.llm import LLM
        from ..runtime.sampling_params import SamplingParams

    imported = time.perf_counter()
    results: list[dict[str, Any]] = []
    with LLM(engine_dir, **load_options, enable_prefix_cache=False) as llm:  # what is timed is computed
        keep_heap(collect=False)
        loaded = time.perf_counter()
        llm.generate([[5, 6, 7]], SamplingParams(max_tokens=1, temperature=0.0))
        first = time.perf_counter()
        results.append(
            {
                "kind": "start",
                "import_s": round(imported - start, 3),
                "load_s": round(loaded - imported, 3),
                "first_token_s": round(first - loaded, 3),
            }
        )
        show(results[0])
        engine = Engine.open(args.engine_dir, verify=False)
        for result in run(llm, engine, load):
            results.append(result)
            show(result)
    if args.json is not None:
        write_json(args.json, results)
    return 0


def show(result: dict[str, Any]) -> None:
    """One line a result; the samples are left to the JSON."""
    fields = {key: value for key, value in result.items() if key != "kind" and not isinstance(value, list)}
    print(f"{result['kind']:<11}" + "  ".join(f"{key} {value}" for key, value in fields.items()), flush=True)
