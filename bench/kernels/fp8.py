"""Decode attention over a KV cache of e4m3 numbers beside one of float16, on one GPU: checked against float64, then timed.

    python -m trtc.bench.kernels.fp8 [--sequences 64] [--length 1024] [--sweep]

Writes $OUT/kernels-fp8.json. Bytes are those of the cache and of q, k, v and the output; launches take turns over more layers
than L2 holds. `--sweep` times other numbers of stages too.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from functools import partial

import torch

from ...kernels.library import KernelLibrary
from ...kernels.paged import as_bytes
from ...kernels.paged_decode_attention import DecodePlan, PagedDecodeAttention
from . import attention_checks
from .attention_cases import Model, PagedBatch, paged_batch
from .harness import ROTATION_BYTES, Row, median_row, out_dir, print_table, time_launches, write_json

LAYERS = {"1.3B": Model(32, 32, 64), "2.7B": Model(32, 32, 80), "6.7B": Model(32, 32, 128)}
CACHES = {"float16": None, "fp8": torch.float8_e4m3fn}
FP8_STAGES = (2, 4, 6, 8)


def time_decode(
    library: KernelLibrary, size: str, cache: str, num_seqs: int, length: int, sweep: bool
) -> Iterator[Row]:
    """One new token after length - 1 cached ones, in every sequence."""
    model = dataclasses.replace(LAYERS[size], cache_dtype=CACHES[cache])
    first = paged_batch(model, [1] * num_seqs, [length - 1] * num_seqs, device="cuda")
    row_bytes = 2 * model.num_kv_heads * model.head_dim
    itemsize = first.k_cache.element_size()
    moved = num_seqs * row_bytes * (length * itemsize + 2 * 2)
    layers = [first, *(another_layer(first) for _ in range(max(1, min(32, ROTATION_BYTES // moved))))]
    attention = PagedDecodeAttention(library)
    for label, plan in plans(attention, first, length, sweep):
        workspace = torch.zeros(max(16, plan.workspace_bytes), dtype=torch.uint8, device="cuda")
        out = torch.empty(first.q.shape, dtype=model.dtype, device="cuda")
        launches = [
            partial(
                attention, b.q, b.k, b.v, b.k_cache, b.v_cache, b.page_table, b.kv_length, out=out, plan=plan,
                scale=model.scale, workspace=workspace, early=True,
            )
            for b in layers
        ]  # fmt: skip
        samples = time_launches(launches * -(-24 // len(launches)))
        config = f"{cache} w{plan.warps} s{plan.stages} x{plan.splits} {label}"
        yield median_row(f"decode {size} b{num_seqs} x {length}", config, samples, moved)


def plans(
    attention: PagedDecodeAttention, batch: PagedBatch, length: int, sweep: bool
) -> Iterator[tuple[str, DecodePlan]]:
    """The chosen plan, and with `sweep` those with other stages, by a label."""
    chosen = attention.plan(batch.q.shape[0], batch.q.shape[1], batch.k_cache, length)
    yield "chosen", chosen
    if sweep and chosen.fp8_cache:
        for stages in FP8_STAGES:
            yield "", dataclasses.replace(chosen, stages=stages)


def another_layer(batch: PagedBatch) -> PagedBatch:
    """The same sequences over other pages."""
    k_cache, v_cache = (as_bytes(cache).clone().view(cache.dtype) for cache in (batch.k_cache, batch.v_cache))
    return dataclasses.replace(batch, k_cache=k_cache, v_cache=v_cache)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--sweep", action="store_true", help="other numbers of stages, too")
    given = parser.parse_args()
    library = KernelLibrary()
    attention_checks.check_decode(library, attention_checks.FP8_MODELS[0], [1, 17, 1000], all_plans=False)
    rows = [
        row
        for size in LAYERS
        for cache in CACHES
        for row in time_decode(library, size, cache, given.sequences, given.length, given.sweep)
    ]
    print_table(rows)
    write_json(out_dir() / "kernels-fp8.json", rows)


if __name__ == "__main__":
    main()
