"""Attention and sampling kernels on one GPU: checked against float64 first, then timed beside torch.

    python -m trtc.bench.kernels.attention [--sweep] [--only WORD ...] [--checks WORD ...] [--skip-checks] [--precompile]

`--sweep` times several plans of a case, not only the chosen one; `--only` and `--checks` select timings and checks by
a word in their names. `--precompile` fills a kernel cache
(TRTC_KERNEL_CACHE) on a machine without a GPU and stops.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from ...kernels import append_kv, context_attention, paged_decode_attention, sampling
from ...kernels.context_attention.plan import HOPPER_KEYS, LARGE_TILES, SMALL_TILE, persistent_tiles
from ...kernels.context_attention.reference import context_attention as reference_context
from ...kernels.library import KernelLibrary
from ...kernels.nvrtc import KernelSource, compile_kernel
from ...kernels.paged import HEAD_DIMS
from ...kernels.paged_decode_attention import plan as decode_plan
from ...kernels.sampling.reference import RowSampling
from . import attention_checks, sampling_checks
from .attention_cases import Model, PagedBatch, paged_batch
from .harness import ROTATION_BYTES, copy_tbps, out_dir, relative_error, time_launches, write_json

MATMUL_TFLOPS = 735.0
"""8192^3 half-precision matrix product of random data on an H200, as measured: the limit of compute-bound rows."""

LAYERS = {
    "125M": Model(num_heads=12, num_kv_heads=12, head_dim=64),
    "1.3B": Model(num_heads=32, num_kv_heads=32, head_dim=64),
    "2.7B": Model(num_heads=32, num_kv_heads=32, head_dim=80),
    "6.7B": Model(num_heads=32, num_kv_heads=32, head_dim=128),
}
VOCAB_SIZE = 50272
MIN_LAUNCHES = 24
MULTIPROCESSORS = 132
"""Of an H100 or H200."""


@dataclass(frozen=True)
class Row:
    """One line of the table. `us` is the median over `samples`, microseconds a launch; rate in `unit`."""

    case: str
    config: str
    us: float
    rate: float
    unit: str
    percent: float
    samples: list[float] = field(repr=False)
    torch_us: float | None = None

    def __str__(self) -> str:
        torch_time = "" if self.torch_us is None else f"{self.torch_us:9.2f} {self.torch_us / self.us:6.2f}"
        rate = f"{self.rate:7.0f} {self.unit:7}"
        return f"{self.case:30} {self.config:34} {self.us:9.2f} {rate} {self.percent:6.1f} {torch_time}"


HEADER = f"{'case':30} {'config':34} {'us':>9} {'rate':>7} {'':7} {'% lim':>6} {'torch us':>9} {'ratio':>6}"


def bandwidth_row(
    case: str, config: str, samples: list[float], moved: float, torch_us: float | None = None
) -> Row:
    us = statistics.median(samples)
    rate = moved / us / 1e3
    return Row(case, config, us, rate, "GB/s", rate / copy_tbps() / 10, samples, torch_us)


def compute_row(
    case: str, config: str, samples: list[float], flops: float, moved: float, torch_us: float | None = None
) -> Row:
    """`percent` is of the larger of two floors: operations at the matmul rate, bytes at the copy bandwidth."""
    us = statistics.median(samples)
    floor_us = max(flops / MATMUL_TFLOPS / 1e6, moved / copy_tbps() / 1e6)
    return Row(case, config, us, flops / us / 1e6, "TFLOP/s", 100 * floor_us / us, samples, torch_us)


def median_us(launches: Sequence[Callable[[], Any]]) -> float:
    return statistics.median(time_launches(list(launches)))


# ------------------------------------------------------------------------------------------------- decode attention


def decode_plans(
    attention: paged_decode_attention.PagedDecodeAttention, batch: PagedBatch, length: int, sweep: bool
) -> Iterator[tuple[str, paged_decode_attention.DecodePlan]]:
    """The chosen plan, and with `sweep` others, by a label."""
    chosen = attention.plan(batch.q.shape[0], batch.q.shape[1], batch.k_cache, length)
    yield "chosen", chosen
    if not sweep:
        return
    blocks = chosen.num_seqs * chosen.num_kv_heads * chosen.head_blocks
    for (warps, stages), splits in itertools.product(SWEEP_WARPS_AND_STAGES, (1, 2, 4, 8, 16)):
        for cluster in (True, False) if splits > 1 else (False,):
            if 48 <= blocks * splits * warps / 4 <= 132 * 16 and not (cluster and splits > 8):
                yield (
                    "",
                    dataclasses.replace(chosen, warps=warps, stages=stages, splits=splits, cluster=cluster),
                )


SWEEP_WARPS_AND_STAGES = ((2, 2), (2, 3), (4, 2), (4, 3), (4, 4), (8, 3))


def other_layer(batch: PagedBatch) -> PagedBatch:
    """The same sequences in another layer: other q, k, v and caches, the same page table and lengths."""
    widths = [part.shape[1] * part.shape[2] for part in (batch.q, batch.k, batch.v)]
    fused = torch.randn_like(batch.q.new_empty(batch.q.shape[0], sum(widths)))
    q, k, v = (part.view(len(part), -1, batch.q.shape[2]) for part in torch.split(fused, widths, dim=1))
    k_cache, v_cache = torch.randn_like(batch.k_cache), torch.randn_like(batch.v_cache)
    return dataclasses.replace(batch, q=q, k=k, v=v, k_cache=k_cache, v_cache=v_cache)


def time_decode(library: KernelLibrary, size: str, num_seqs: int, length: int, sweep: bool) -> Iterator[Row]:
    """One new token after length - 1 cached ones, in every sequence."""
    model = LAYERS[size]
    row_bytes = 2 * model.num_kv_heads * model.head_dim * 2
    count = max(2, min(64, ROTATION_BYTES // (num_seqs * length * row_bytes)))
    first = paged_batch(model, [1] * num_seqs, [length - 1] * num_seqs, device="cuda")
    batches = [first, *(other_layer(first) for _ in range(count - 1))]
    moved = num_seqs * (length * row_bytes + 2 * model.num_heads * model.head_dim * 2)
    attention = paged_decode_attention.PagedDecodeAttention(library)
    outs = [torch.empty_like(batch.q, memory_format=torch.contiguous_format) for batch in batches]
    torch_us = time_sdpa_decode(model, num_seqs, length, count)
    for label, plan in decode_plans(attention, batches[0], length, sweep):
        workspace = torch.zeros(max(16, plan.workspace_bytes), dtype=torch.uint8, device="cuda")

        config = f"w{plan.warps} s{plan.stages} x{plan.splits}{' cluster' if plan.cluster else ''} {label}"
        for early in (False, True):
            launches = [
                partial(
                    attention, b.q, b.k, b.v, b.k_cache, b.v_cache, b.page_table, b.kv_length, out=out, plan=plan,
                    scale=model.scale, workspace=workspace, dependent=early, early=early,
                )
                for b, out in zip(batches, outs, strict=True)
            ]  # fmt: skip
            launches *= -(-MIN_LAUNCHES // count)
            name = f"decode {size} b{num_seqs} x {length}"
            yield bandwidth_row(
                name, config + (" early" if early else ""), time_launches(launches), moved, torch_us
            )


def time_sdpa_decode(model: Model, num_seqs: int, length: int, count: int) -> float:
    """torch's scaled_dot_product_attention of one query over contiguous keys, without the append."""
    shape = (num_seqs, model.num_kv_heads, length, model.head_dim)
    caches = [torch.randn(2, *shape, dtype=model.dtype, device="cuda") for _ in range(count)]
    q = torch.randn(num_seqs, model.num_heads, 1, model.head_dim, dtype=model.dtype, device="cuda")
    launches = [partial(functional.scaled_dot_product_attention, q, kv[0], kv[1]) for kv in caches]
    return median_us(launches * -(-MIN_LAUNCHES // count))


# ------------------------------------------------------------------------------------------------ context attention


def time_context(
    library: KernelLibrary, size: str, lengths: list[int], past: int, sweep: bool
) -> Iterator[Row]:
    """Prompts of `lengths` new tokens after `past` cached ones, the append included."""
    model = LAYERS[size]
    batches = [paged_batch(model, lengths, [past] * len(lengths), device="cuda", seed=i) for i in range(2)]
    # Products of visible pairs only: q.k and p.v, two operations each.
    pairs = sum(n * past + n * (n + 1) / 2 for n in lengths)
    flops = 4 * pairs * model.num_heads * model.head_dim
    # q and out once; k and v read once and, of new tokens, written once.
    rows = (
        2 * sum(lengths) * (model.num_heads + 2 * model.num_kv_heads)
        + 2 * past * len(lengths) * model.num_kv_heads
    )
    moved = rows * model.head_dim * model.dtype.itemsize
    attention = context_attention.ContextAttention(library)
    out = torch.empty_like(batches[0].q, memory_format=torch.contiguous_format)
    torch_us = (
        time_sdpa_context(model, len(lengths), lengths[0]) if past == 0 and len(set(lengths)) == 1 else None
    )
    chosen = context_attention.choose_plan(sum(lengths), len(lengths), model.num_heads, model.head_dim)
    plans = [("chosen", chosen)]
    if sweep:
        plans += [("", plan) for plan in context_candidates(chosen)]
    for label, plan in plans:
        launches = [
            partial(
                attention, b.q, b.k, b.v, b.k_cache, b.v_cache, b.query_start, b.kv_length, b.page_table, out=out,
                scale=model.scale, accumulation=plan.accumulation, plan=plan, dependent=False,
            )
            for b in batches
        ]  # fmt: skip
        name = f"context {size} {len(lengths)} x {lengths[0]}" + (f" + {past}" if past else "")
        kernel = "persistent" if plan.blocks else "wgmma" if plan.hopper else "mma"
        config = f"{kernel} {plan.accumulation} {plan.rows} x {plan.keys} {label}"
        yield compute_row(name, config, time_launches(launches * 4), flops, moved, torch_us)


def context_candidates(chosen: context_attention.ContextPlan) -> Iterator[context_attention.ContextPlan]:
    """Other plans that could serve the same batch."""
    large, small = LARGE_TILES[chosen.head_dim], SMALL_TILE
    for (rows, keys), accumulation in itertools.product((large, small), context_attention.ACCUMULATIONS):
        yield dataclasses.replace(
            chosen, rows=rows, keys=keys, accumulation=accumulation, hopper=False, blocks=0
        )
    hopper = dataclasses.replace(chosen, accumulation="float32", hopper=True, blocks=0)
    for rows in (64, 128, 192):
        yield dataclasses.replace(hopper, rows=rows, keys=HOPPER_KEYS)
    for rows, keys in persistent_tiles(chosen.head_dim):
        yield dataclasses.replace(hopper, rows=rows, keys=keys, blocks=MULTIPROCESSORS)


def time_sdpa_context(model: Model, num_seqs: int, length: int) -> float:
    """torch's causal scaled_dot_product_attention, and index_copy_ of the new k and v into a cache."""
    num_tokens = num_seqs * length
    cache = torch.empty(2, num_tokens, model.num_kv_heads, model.head_dim, dtype=model.dtype, device="cuda")
    slots = torch.randperm(num_tokens // model.page_size, device="cuda")[:, None] * model.page_size
    slots = (slots + torch.arange(model.page_size, device="cuda")).flatten()
    shape = (num_tokens, 3 * model.num_heads, model.head_dim)
    inputs = [torch.randn(shape, dtype=model.dtype, device="cuda") for _ in range(2)]

    def attend(fused: torch.Tensor) -> torch.Tensor:
        q, k, v = fused.chunk(3, dim=1)
        cache[0].index_copy_(0, slots, k)
        cache[1].index_copy_(0, slots, v)
        q, k, v = (part.view(num_seqs, length, *part.shape[1:]).transpose(1, 2) for part in (q, k, v))
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    return median_us([partial(attend, fused) for fused in inputs] * 4)


def context_errors(library: KernelLibrary) -> dict[str, float]:
    """Relative error of context attention against float64, by case: what each accumulation costs in accuracy."""
    attention, errors = context_attention.ContextAttention(library), {}
    for size, length in itertools.product(("125M", "6.7B"), (512, 2048)):
        model = LAYERS[size]
        b = paged_batch(model, [length], [0], device="cuda")
        tensors = (b.q, b.k, b.v, b.k_cache, b.v_cache, b.query_start, b.kv_length, b.page_table)
        expected = reference_context(*tensors, scale=model.scale)
        out = torch.empty(b.q.shape, dtype=model.dtype, device="cuda")
        for accumulation in context_attention.ACCUMULATIONS:
            attention(*tensors, out=out, scale=model.scale, accumulation=accumulation)
            errors[f"context {size} 1 x {length} {accumulation}"] = relative_error(out, expected)
    return errors


def time_append(library: KernelLibrary, size: str, num_tokens: int) -> Iterator[Row]:
    model = LAYERS[size]
    lengths = [512] * (num_tokens // 512)
    batches = [paged_batch(model, lengths, [0] * len(lengths), device="cuda", seed=i) for i in range(2)]
    append = append_kv.AppendKv(library)
    launches = [
        partial(
            append, b.k, b.v, b.k_cache, b.v_cache, b.query_start, b.kv_length, b.page_table, dependent=False
        )
        for b in batches
    ]
    moved = 4 * num_tokens * model.num_kv_heads * model.head_dim * 2
    yield bandwidth_row(f"append {size} {num_tokens} tokens", "", time_launches(launches * 6), moved)


# --------------------------------------------------------------------------------------------------------- sampling


def time_greedy(library: KernelLibrary, num_seqs: int, dtype: torch.dtype) -> Iterator[Row]:
    count = max(4, min(64, ROTATION_BYTES // (num_seqs * VOCAB_SIZE * dtype.itemsize)))
    logits = [torch.randn(num_seqs, VOCAB_SIZE, device="cuda").to(dtype) for _ in range(count)]
    launcher = sampling.Sampling(library)
    state = sampling_checks.loop_state(num_seqs)
    samples = time_launches([partial(launcher.greedy, x, state, dependent=False) for x in logits])
    torch_us = median_us([partial(torch.argmax, x, dim=-1) for x in logits])
    moved = num_seqs * VOCAB_SIZE * dtype.itemsize
    yield bandwidth_row(f"greedy b{num_seqs}", str(dtype).removeprefix("torch."), samples, moved, torch_us)


def time_sample(library: KernelLibrary, num_seqs: int, parameters: dict[str, Any]) -> Iterator[Row]:
    count = max(4, min(32, ROTATION_BYTES // (num_seqs * VOCAB_SIZE * 4)))
    logits = [torch.randn(num_seqs, VOCAB_SIZE, device="cuda") * 4 for _ in range(count)]
    launcher = sampling.Sampling(library)
    state = sampling_checks.loop_state(num_seqs)
    rows = [RowSampling(**parameters)] * num_seqs
    random = sampling_checks.sampling_state(rows, VOCAB_SIZE)
    samples = time_launches([partial(launcher.sample, x, random, state, dependent=False) for x in logits])

    def torch_sample(x: torch.Tensor) -> torch.Tensor:
        ordered, ids = x.sort(dim=-1, descending=True)
        cumulative = ordered.softmax(dim=-1).cumsum(dim=-1)
        kept = torch.where(cumulative - ordered.softmax(dim=-1) <= 0.9, ordered, -torch.inf).softmax(dim=-1)
        return ids.gather(1, kept.multinomial(1))

    torch_us = median_us([partial(torch_sample, x) for x in logits])
    config = ", ".join(f"{name} {value}" for name, value in parameters.items())
    yield bandwidth_row(f"sample b{num_seqs}", config, samples, num_seqs * VOCAB_SIZE * 4, torch_us)


# ------------------------------------------------------------------------------------------------------------- main


def precompile() -> None:
    """Compile every kernel of this script for sm_90a, one entry at a time as `KernelLibrary` asks for them."""
    wanted: list[KernelSource] = [append_kv.SOURCE, *sampling.sources("float"), *sampling.sources("__half")]
    for element in ("__half", "__nv_bfloat16"):
        wanted += paged_decode_attention.sources(element)
        wanted += context_attention.sources(element)
    for head_dim in HEAD_DIMS:
        chosen = context_attention.choose_plan(1 << 16, 64, 12, head_dim)
        wanted += [plan.source("__half") for plan in context_candidates(chosen)]
        bfloat16 = (plan for plan in context_candidates(chosen) if plan.accumulation == "float32")
        wanted += [plan.source("__nv_bfloat16") for plan in bfloat16]
        for (warps, stages), cluster in itertools.product(SWEEP_WARPS_AND_STAGES, (True, False)):
            name = paged_decode_attention.entry("__half", head_dim, warps, stages, cluster)
            wanted.append(KernelSource(decode_plan.SOURCE, (name,)))
    singles = {KernelSource(source.path, (entry,)) for source in wanted for entry in source.entries}
    with ThreadPoolExecutor(2) as pool:
        compiled = list(pool.map(partial(compile_kernel, arch="sm_90a"), singles))
    spilled = [
        name for kernel in compiled for name, cost in kernel.resources.items() if cost.spill_store_bytes
    ]
    print(f"{len(compiled)} kernels compiled; with spills: {', '.join(spilled) or 'none'}")


def timed_rows(library: KernelLibrary, sweep: bool) -> Iterator[tuple[str, Callable[[], Iterator[Row]]]]:
    """(name, what times it) of every case."""
    for num_seqs, dtype in ((1, torch.float32), (64, torch.float32), (64, torch.float16)):
        yield f"greedy b{num_seqs}", partial(time_greedy, library, num_seqs, dtype)
    for num_seqs, parameters in ((1, {"top_p": 0.9}), (64, {"top_p": 0.9}), (1, {"top_k": 50, "top_p": 0.9})):
        yield f"sample b{num_seqs}", partial(time_sample, library, num_seqs, parameters)
    for size in LAYERS:
        for num_seqs, length in ((64, 1024), (64, 576), (8, 576), (1, 576)):
            yield (
                f"decode {size} b{num_seqs} x {length}",
                partial(time_decode, library, size, num_seqs, length, sweep),
            )
    for size in LAYERS:
        for num_seqs, length in ((64, 512), (1, 512), (4, 2048)):
            lengths = [length] * num_seqs
            yield (
                f"context {size} {num_seqs} x {length}",
                partial(time_context, library, size, lengths, 0, sweep),
            )
    yield "context 125M chunks", partial(time_context, library, "125M", [512] * 16, 1024, sweep)
    yield "append 125M", partial(time_append, library, "125M", 32768)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--checks", nargs="*", default=[])
    parser.add_argument("--skip-checks", action="store_true")
    parser.add_argument("--precompile", action="store_true")
    options = parser.parse_args()
    if options.precompile:
        precompile()
        return 0
    library = KernelLibrary()
    failures = 0
    if not options.skip_checks:
        for name, run in (*attention_checks.all_checks(library), *sampling_checks.all_checks(library)):
            if options.checks and not any(word in name for word in options.checks):
                continue
            try:
                run()
            except AssertionError as error:
                failures += 1
                print(f"FAIL {name}: {error}", flush=True)
        print(f"checks done, {failures} failed", flush=True)
    rows: list[Row] = []
    print(HEADER)
    for name, job in timed_rows(library, options.sweep):
        if options.only and not any(word in name for word in options.only):
            continue
        for row in job():
            rows.append(row)
            print(row, flush=True)
    errors = {} if options.skip_checks else context_errors(library)
    for name, value in errors.items():
        print(f"{name:44} relative error {value:.1e}")
    if rows:
        extra = {"failed_checks": failures, "limit_tflops": MATMUL_TFLOPS, "context_errors": errors}
        write_json(out_dir() / "kernels_attention.json", rows, **extra)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
