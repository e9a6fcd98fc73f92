"""How the time of a decode step on the CPU grows with batch, context and model, against the bytes it has to read.

python -m trtc.bench.cpu_scaling [--json bench/results/cpu-scaling.json]
python -m trtc.bench.cpu_scaling --json FILE --engines gelu125m-int8 llama1.1b-int8 ...  # with examples/trtc-llama installed

Random weights; the floor is the step's bytes (`Graph.cost`: every weight, key and value once) at the bandwidth that a sum over
memory reaches in the same run. A greedy step can stay below that floor: it reads the head in int8 first, and four streams a
thread, which the memory serves faster than the sum's one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..core.engine import Engine
from ..runtime.benchmark import step_bytes
from ..runtime.llm import LLM
from ..runtime.sampling_params import SamplingParams
from .cpu import ROOT, VOCAB, read_bandwidth, setup
from .markdown import table_of

SHAPES = {"125m": (768, 12, 12), "350m": (1024, 24, 16), "1.3b": (2048, 24, 32)}
"""Hidden size, layers, heads of OPT. (The real OPT-350M projects its embeddings from 512; here they are 1024 wide.)"""
GATED_SHAPES = {"110m": (768, 12, 12, 2048), "1.1b": (2048, 22, 32, 5632)}
"""Hidden size, layers, heads, width of the gated MLP of Llama, with four heads of keys and values. The second is TinyLlama."""
STEPS = 24


def config(size: str) -> dict[str, Any]:
    """size: one of OPT's; `gelu` before it gives it the exact gelu for an activation; `llama` stands before one of Llama's."""
    if size.startswith("llama"):
        hidden, layers, heads, ffn = GATED_SHAPES[size.removeprefix("llama")]
        return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000, "hidden_size": hidden,
                "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": heads,
                "num_key_value_heads": 4, "max_position_embeddings": 2048, "hidden_act": "silu"}  # fmt: skip
    hidden, layers, heads = SHAPES[size.removeprefix("gelu")]
    return {"architectures": ["OPTForCausalLM"], "model_type": "opt", "vocab_size": VOCAB, "hidden_size": hidden,
            "word_embed_proj_dim": hidden, "ffn_dim": 4 * hidden, "num_hidden_layers": layers,
            "num_attention_heads": heads, "max_position_embeddings": 2048, "do_layer_norm_before": True,
            "activation_function": "gelu" if size.startswith("gelu") else "relu"}  # fmt: skip


def build(folder: Path, size: str, weights: str) -> Path:
    """weights: a dtype, or int8."""
    engine = folder / f"{size}-{weights}"
    if not engine.exists():
        model = folder / f"{size}-config"
        model.mkdir(exist_ok=True)
        (model / "config.json").write_text(json.dumps(config(size)))
        dtype = ["--dtype", weights]
        if weights == "int8":
            dtype = ["--dtype", "float32", "--use-weight-only", "--weight-only-precision", "int8"]
        command = [sys.executable, "-m", "trtc.cli", "build", "--dummy-weights", "--model-dir", str(model), *dtype,
                   "--output-dir", str(engine), "--max-batch-size", "8", "--max-input-len", "1024",
                   "--max-seq-len", "1088"]  # fmt: skip
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return engine


def measure(engine_dir: Path, bandwidth: float) -> Iterator[dict[str, Any]]:
    engine = Engine.open(engine_dir, verify=False)
    with LLM(engine_dir, verify=False, enable_prefix_cache=False) as llm:
        for batch, context in ((1, 128), (2, 128), (4, 128), (8, 128), (1, 1024), (4, 1024)):
            rng = np.random.default_rng(0)
            prompts = [rng.integers(4, engine.model.vocab_size, context).tolist() for _ in range(batch)]
            params = SamplingParams(max_tokens=STEPS, temperature=0.0, ignore_eos=True)
            for number, prompt in enumerate(prompts):
                llm.core.add_request(str(number), prompt, params, stream=False)
            times = []
            while llm.core.has_unfinished:
                start = time.perf_counter()
                llm.core.step()
                times.append(time.perf_counter() - start)
            steps = times[4:-3]  # long prompts start, and so end, a few steps apart
            floor = step_bytes(engine, batch, context + STEPS // 2) / bandwidth / 1e6
            step = 1e3 * statistics.median(steps)
            yield {"engine": engine_dir.name, "batch": batch, "context": context, "step_ms": round(step, 3),
                   "floor_ms": round(floor, 3), "percent_of_floor": round(100 * floor / step, 1),
                   "samples_ms": [round(1e3 * s, 3) for s in steps]}  # fmt: skip


def table(data: dict[str, Any]) -> str:
    header = ("engine", "batch", "context", "step", "floor", "floor / step")
    rows = ((c["engine"], str(c["batch"]), str(c["context"]), f"{c['step_ms']:.1f} ms", f"{c['floor_ms']:.1f} ms",
             f"{c['percent_of_floor']:.0f} %") for c in data["cases"])  # fmt: skip
    return (
        f"{table_of(header, rows)}\n"
        f"{data['device']}, {data['threads']} threads, {data['read_bandwidth_gb_s']:.0f} GB/s read; trtc at "
        f"{data['commit']}, {data['date']}, torch {data['versions']['torch']}. Samples: `bench/results/cpu-scaling.json`.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, default=ROOT / "bench" / "results" / "cpu-scaling.json")
    parser.add_argument("--folder", type=Path, help="keep the engines here, and use those that are there")
    parser.add_argument(
        "--engines",
        nargs="+",
        default=[
            *("125m-float32", "125m-bfloat16", "125m-int8", "350m-bfloat16"),
            *("1.3b-float32", "1.3b-bfloat16", "1.3b-int8"),
        ],
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        engines = [build(folder, *name.split("-")) for name in args.engines]
        data = setup()
        bandwidth = read_bandwidth()
        data["read_bandwidth_gb_s"] = round(bandwidth, 1)
        data["cases"] = [case for engine in engines for case in measure(engine, bandwidth)]
    args.json.write_text(json.dumps(data, indent=1) + "\n")
    print(table(data))


if __name__ == "__main__":
    main()
