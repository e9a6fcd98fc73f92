"""What a plan costs to build: its size, the time, and the most memory that the build took.

    python -m trtc.bench.tensorrt_plans --model 125m --dtype float16 bfloat16 --compute-capability 8.0 8.9

Every case is a `trtc build` of flavour tensorrt_rtx in a process of its own, with random weights: no checkpoint and no GPU
is needed. Results are added to bench/results/tensorrt-plans.json; `make docs` makes the table of docs/tensorrt.md from it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..core.engine import Engine
from .provenance import commit_of_tree, processor

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "tensorrt-plans.json"
CAPABILITIES = ("8.0", "8.6", "8.9", "12.0")
DTYPES = ("float16", "bfloat16")


def opt(hidden: int, layers: int, heads: int, **other: Any) -> dict[str, Any]:
    """config.json of an OPT of the published sizes."""
    sizes = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "ffn_dim": 4 * hidden,
    }
    vocabulary = {"vocab_size": 50272, "max_position_embeddings": 2048, "word_embed_proj_dim": hidden}
    return {"architectures": ["OPTForCausalLM"], "model_type": "opt", **sizes, **vocabulary, **other}


MODELS: Mapping[str, Mapping[str, Any]] = {
    "tiny": json.loads((ROOT / "examples" / "tiny-opt" / "config.json").read_text()),
    "125m": opt(768, 12, 12),
    "350m": opt(1024, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False, _remove_final_layer_norm=True),
    "1.3b": opt(2048, 24, 32),
}  # fmt: skip


def measure(model: str, dtype: str, capability: str) -> dict[str, Any]:
    """Builds one plan. Raises RuntimeError with the build's own words when it fails."""
    with tempfile.TemporaryDirectory() as folder:
        source, engine = Path(folder) / "model", Path(folder) / "engine"
        source.mkdir()
        (source / "config.json").write_text(json.dumps(MODELS[model]))
        options = {
            "--model-dir": source, "--dtype": dtype, "--target": "tensorrt", "--flavour": "tensorrt_rtx",
            "--compute-capability": capability, "--output-dir": engine,
        }  # fmt: skip
        arguments = [str(part) for option in options.items() for part in option]
        command = [sys.executable, "-m", "trtc.cli", "build", "--dummy-weights", *arguments]
        start = time.perf_counter()
        with tempfile.TemporaryFile("w+") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - start
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                output.seek(0)
                raise RuntimeError(f"{model} {dtype} {capability}: {output.read()}")
        (part,) = Engine.open(engine, verify=False).ranks
        weights = sum(node.outputs[0].nbytes() for node in part.graph.weights)
        plan = (engine / part.artifacts["plan"]).stat().st_size
    return {
        "model": model, "dtype": dtype, "compute_capability": capability, "weight_bytes": weights,
        "plan_bytes": plan, "build_s": round(seconds, 2),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 2), "peak_bytes": usage.ru_maxrss * 1024,
        "graph_sha256": part.graph.hash,
    }  # fmt: skip


def setup() -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).date().isoformat(), **commit_of_tree(),
        "device": f"{processor()}, {len(os.sched_getaffinity(0))} cores, no GPU",
        "versions": {name: version(name) for name in ("tensorrt_rtx_cu13", "torch")} | {"python": platform.python_version()},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--compute-capability", nargs="+", default=list(CAPABILITIES))
    parser.add_argument("--results", type=Path, default=RESULTS, help="file to add to (default: %(default)s)")
    args = parser.parse_args()
    data = json.loads(args.results.read_text()) if args.results.exists() else {"cases": []}
    for model in args.model:
        for dtype in args.dtype:
            for capability in args.compute_capability:
                case = measure(model, dtype, capability)
                key = (model, dtype, capability)
                kept = [c for c in data["cases"] if (c["model"], c["dtype"], c["compute_capability"]) != key]
                data = {**setup(), "cases": [*kept, case]}
                args.results.write_text(json.dumps(data, indent=1) + "\n")
                print(f"{model} {dtype} {capability}: {case['plan_bytes'] / 1e6:.1f} MB, {case['build_s']} s, "
                      f"{case['peak_bytes'] / 1e9:.2f} GB at most", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
