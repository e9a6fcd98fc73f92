"""Time to the first token of the second of two prompts that begin alike, with the prefix cache and without.

    python -m trtc.bench.prefix_cache --json bench/results/cpu-prefix-cache.json

On an engine in the shape of OPT-125M with random weights, target cpu. Every pair of prompts is new. The second one must find
the shared tokens in the cache, and its first token must be that of an engine without prefix cache. Processor time is measured,
too: on a machine that others use it says more than the clock on the wall. Take one thread for it: OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from trtc.runtime.llm import LLM
from trtc.runtime.sampling_params import SamplingParams

from .serving import environment, print_table

CONFIG = {
    "architectures": ["OPTForCausalLM"],
    "model_type": "opt",
    "hidden_size": 768,
    "ffn_dim": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "max_position_embeddings": 2048,
    "vocab_size": 50272,
    "word_embed_proj_dim": 768,
    "do_layer_norm_before": True,
    "activation_function": "relu",
    "bos_token_id": 2,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
SHARED, OWN = 512, 64
"""Tokens of a prompt: those of both prompts of a pair, and those behind them."""
FIRST_TOKEN = SamplingParams(max_tokens=1, temperature=0)


def build(folder: Path) -> Path:
    model, engine = folder / "model", folder / "engine"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(CONFIG))
    command = [sys.executable, "-m", "trtc.cli", "build", "--model-dir", str(model), "--dummy-weights"]
    command += ["--output-dir", str(engine), "--dtype", "float32", "--max-seq-len", "1024"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return engine


def pairs(count: int) -> list[tuple[list[int], list[int]]]:
    rng = np.random.default_rng(0)

    def tokens(number: int) -> list[int]:
        return [int(token) for token in rng.integers(4, CONFIG["vocab_size"], number)]

    shared = [tokens(SHARED) for _ in range(count)]
    return [(beginning + tokens(OWN), beginning + tokens(OWN)) for beginning in shared]


def measure(engine: Path, count: int, *, enable_prefix_cache: bool) -> dict[str, Any]:
    """Seconds, and seconds of processor time, to the first tokens of all pairs, one prompt after the other; these tokens."""
    seconds: tuple[list[float], list[float]] = ([], [])
    cpu_seconds: tuple[list[float], list[float]] = ([], [])
    chosen = []
    with LLM(engine, enable_prefix_cache=enable_prefix_cache) as llm:
        for number, pair in enumerate(pairs(count + 1)):
            for prompt, times, cpu_times in zip(pair, seconds, cpu_seconds, strict=True):
                start, cpu_start = time.perf_counter(), time.process_time()
                (output,) = llm.generate([prompt], FIRST_TOKEN)
                if number > 0:  # the first pair warms up
                    times.append(round(time.perf_counter() - start, 5))
                    cpu_times.append(round(time.process_time() - cpu_start, 5))
                expected = SHARED if enable_prefix_cache and prompt is pair[1] else 0
                assert output.num_cached_tokens == expected, f"{output.num_cached_tokens} tokens were cached"
                chosen.append(output.outputs[0].token_ids[0])
    return {
        "first_s": seconds[0],
        "second_s": seconds[1],
        "first_cpu_s": cpu_seconds[0],
        "second_cpu_s": cpu_seconds[1],
        "tokens": chosen,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=7, help="default: %(default)s")
    parser.add_argument("--json", type=Path, help="also write every sample here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        engine = build(Path(folder))
        sides = {
            name: measure(engine, args.pairs, enable_prefix_cache=name == "with")
            for name in ("with", "without")
        }
        found = environment(engine)
    tokens = [side.pop("tokens") for side in sides.values()]
    medians = {
        name: {which: statistics.median(times) for which, times in side.items()}
        for name, side in sides.items()
    }
    ratios = {name: medians["with"][name] / medians["without"][name] for name in ("second_s", "second_cpu_s")}
    print_table(
        ("prefix cache", "first prompt", "second prompt", "first, processor", "second, processor"),
        [(name, *(f"{s * 1e3:.1f} ms" for s in side.values())) for name, side in medians.items()],
    )
    print(f"second prompt, with / without: {ratios['second_s']:.3f}, processor {ratios['second_cpu_s']:.3f}")
    equal = sum(a == b for a, b in zip(*tokens, strict=True))
    print(f"first tokens that are equal on both sides: {equal} of {len(tokens[0])}")
    if equal != len(tokens[0]):
        raise SystemExit("other tokens with the prefix cache than without")
    if args.json is not None:
        data = {
            **found,
            "case": f"OPT-125M shape, random weights, {SHARED} shared and {OWN} own tokens a prompt",
            "check": f"{equal} first tokens are those without prefix cache",
            "samples": sides,
            "median": medians,
            "ratio": {name: round(ratio, 4) for name, ratio in ratios.items()},
        }
        args.json.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
