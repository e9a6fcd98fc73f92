"""Registers, shared memory and spills of every kernel on every architecture, as a file that a diff shows.

    python -m trtc.bench.kernels.resources            # compare with bench/results/kernel_resources.json
    python -m trtc.bench.kernels.resources --update   # write it

Needs NVRTC, no GPU. `tests/kernels/test_compile.py` runs the comparison.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from ...kernels import all_reduce, append_kv, embedding, layer_norm, linear, quantize_rows
from ...kernels.all_reduce import norm as all_reduce_norm
from ...kernels.all_reduce import two_shot
from ...kernels.context_attention.plan import sources as context_attention_sources
from ...kernels.contract import ELEMENT_TYPES
from ...kernels.linear.plan import AnyPlan
from ...kernels.linear.quantized import dequantize_sources
from ...kernels.linear.quantized_plan import choose_quantized
from ...kernels.nvrtc import CI_ARCHITECTURES, KernelSource, compile_kernel, compile_target
from ...kernels.paged import HEAD_DIMS
from ...kernels.paged_decode_attention.plan import sources as decode_attention_sources
from ...kernels.sampling import sources as sampling_sources

RESOURCES_FILE = Path(__file__).parents[1] / "results" / "kernel_resources.json"
UPDATE_COMMAND = "python -m trtc.bench.kernels.resources --update"

HIDDEN_SIZES = (768, 2560, 4096)
VOCABULARY = 50272
ROWS = (1, 8, 16, 32, 64)
MULTIPROCESSORS = {"sm_80": 108, "sm_89": 128, "sm_90": 132, "sm_120": 170}
"""Architecture -> multiprocessors of a common GPU of it, which the plans depend on: A100, L40S, H200, RTX 5090."""

Usage = dict[str, int]
Resources = dict[str, dict[str, Usage]]
"""Architecture -> `file: kernel` -> ResourceUsage as a dictionary."""


def linear_plans(arch: str) -> Iterator[linear.Plan]:
    """Plans of all linear layers of the fused OPT decoders, for decode batches."""
    capability, multiprocessors = int(arch.removeprefix("sm_")), MULTIPROCESSORS[arch]
    for rows, hidden in itertools.product(ROWS, HIDDEN_SIZES):
        for features, columns, normed in (
            (3 * hidden, hidden, True),
            (hidden, hidden, False),
            (4 * hidden, hidden, True),
            (hidden, 4 * hidden, False),
            (VOCABULARY, hidden, False),
        ):
            norm = "layer" if normed and rows <= linear.MAX_STREAM_ROWS else "none"
            yield linear.choose_plan(
                rows, features, columns, norm=norm, capability=capability, multiprocessors=multiprocessors
            )


INTEGERS = ("int8", "fp8", "int4/64", "int4/128", "int4zero/128")


def quantized_plans(arch: str) -> Iterator[AnyPlan]:
    """Plans of the layers of a 6.7B decoder for decode batches, whose norms are kernels of their own, and some with a norm."""
    capability, multiprocessors, hidden = (
        int(arch.removeprefix("sm_")),
        MULTIPROCESSORS[arch],
        HIDDEN_SIZES[-1],
    )
    for rows, weight in itertools.product((1, 8, 64), INTEGERS):
        for features, columns, norm in (
            (3 * hidden, hidden, "none"),
            (hidden, 4 * hidden, "none"),
            (3 * hidden, hidden, "layer"),
        ):
            if norm == "none" or (rows == 1 and arch == "sm_90"):
                yield choose_quantized(
                    rows, features, columns, weight=weight, norm=norm, capability=capability, multiprocessors=multiprocessors
                )  # fmt: skip


def sources(arch: str) -> Iterator[KernelSource]:
    """The kernels of float16 engines on `arch`; bfloat16 is the same code and is compiled for sm_90 only."""
    capability = int(arch.removeprefix("sm_"))
    for dtype in ("float16", "bfloat16") if arch == "sm_90" else ("float16",):
        element = ELEMENT_TYPES[dtype]
        for ranks in (2, 4, 8):
            yield from all_reduce.sources(element, ranks)
            yield from all_reduce_norm.sources(element, ranks)
            yield from two_shot.sources(element, ranks)
        yield from embedding.sources(element)
        yield from layer_norm.sources(element)
        yield from linear.sources(element, itertools.chain(linear_plans(arch), quantized_plans(arch)))
        yield from dequantize_sources(element, INTEGERS)
        yield from quantize_rows.sources(element)
        yield from sampling_sources(element)
        for fp8_cache in (False, True):
            # bfloat16 differs from float16 in one conversion there; one head_dim shows it.
            dims = (80,) if fp8_cache and dtype == "bfloat16" else HEAD_DIMS
            yield append_kv.source(element, fp8_cache=fp8_cache)
            yield from decode_attention_sources(element, dims, capability, fp8_cache=fp8_cache)
            yield from context_attention_sources(element, dims, capability, fp8_cache=fp8_cache)


def measure(arch: str) -> dict[str, Usage]:
    """Compile everything for `arch`: `file: kernel` -> ResourceUsage as a dictionary."""
    target = compile_target(arch)
    with ThreadPoolExecutor(max_workers=2) as pool:
        compiled = pool.map(lambda source: (source, compile_kernel(source, arch=target)), sources(arch))
        return {
            f"{source.name}: {entry}": asdict(usage)
            for source, result in compiled
            for entry, usage in sorted(result.resources.items())
        }


def spills(measured: dict[str, Usage]) -> list[str]:
    """Kernels that spill registers to local memory."""
    return [
        name for name, usage in measured.items() if usage["spill_store_bytes"] or usage["spill_load_bytes"]
    ]


def growth(measured: dict[str, Usage], recorded: dict[str, Usage]) -> list[str]:
    """What got worse or is not recorded, one line each."""
    lines = []
    for name, usage in measured.items():
        before = recorded.get(name)
        if before is None:
            lines.append(f"{name} is not recorded")
            continue
        lines += [
            f"{name}: {key} {before[key]} -> {value}" for key, value in usage.items() if value > before[key]
        ]
    return lines + [f"{name} is recorded but no longer compiled" for name in recorded if name not in measured]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--update", action="store_true", help="write the file instead of comparing")
    update = parser.parse_args().update
    resources = {arch: measure(arch) for arch in CI_ARCHITECTURES}
    if update:
        RESOURCES_FILE.parent.mkdir(parents=True, exist_ok=True)
        RESOURCES_FILE.write_text(json.dumps(resources, indent=1, sort_keys=True) + "\n")
    recorded: Resources = json.loads(RESOURCES_FILE.read_text())
    problems = [
        f"{arch}: {line}"
        for arch, measured in resources.items()
        for line in (*growth(measured, recorded[arch]), *(f"{name} spills" for name in spills(measured)))
    ]
    print("\n".join(problems) or f"{sum(map(len, resources.values()))} kernels, no spills, nothing grew")
    raise SystemExit(bool(problems))


if __name__ == "__main__":
    main()
