"""Attention kernels on a GPU against their float64 references. Each check raises AssertionError with what it found."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from functools import partial

import torch

from ...kernels.append_kv import AppendKv
from ...kernels.append_kv.reference import append_kv as reference_append_kv
from ...kernels.context_attention import ContextAttention, ContextPlan
from ...kernels.context_attention.plan import HOPPER_KEYS, LARGE_TILES, SMALL_TILE, persistent_tiles
from ...kernels.context_attention.reference import context_attention as reference_context
from ...kernels.library import KernelLibrary
from ...kernels.paged import as_bytes, is_fp8
from ...kernels.paged_decode_attention import DecodePlan, PagedDecodeAttention
from ...kernels.paged_decode_attention.reference import paged_decode_attention as reference_decode
from ...kernels.sampling import LoopState, Sampling
from .attention_cases import Model, paged_batch, row_error

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
"""Largest relative error of a row: probabilities and outputs are rounded to 10 or 7 bits after the leading one."""
HALF_ACCUMULATION_TOLERANCE = 2e-2

Check = tuple[str, Callable[[], None]]

MODELS = [
    Model(12, 12, 64, 32, torch.float16),
    Model(3, 3, 80, 16, torch.float16),
    Model(4, 4, 96, 64, torch.float16),
    Model(4, 4, 128, 32, torch.float16),
    Model(12, 12, 64, 16, torch.bfloat16),
    Model(4, 4, 80, 64, torch.bfloat16),
    Model(4, 4, 128, 16, torch.bfloat16),
    Model(8, 2, 64, 32, torch.float16),  # grouped queries
    Model(24, 2, 128, 32, torch.bfloat16),  # more than 8 query heads per kv head
    Model(11, 1, 80, 32, torch.float16),
]
FP8_MODELS = [dataclasses.replace(model, cache_dtype=torch.float8_e4m3fn) for model in MODELS]
"""The same over a cache of e4m3 numbers."""
RAGGED_LENGTHS = [
    1,
    2,
    15,
    16,
    17,
    31,
    32,
    33,
    63,
    64,
    65,
    127,
    129,
    255,
    256,
    257,
    511,
    513,
    1000,
    1024,
    1025,
    2048,
]


def same(cache: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Bit for bit, but for NaN."""
    if is_fp8(cache):
        return torch.equal(as_bytes(cache), as_bytes(wanted))
    return torch.equal(cache.nan_to_num(7), wanted.nan_to_num(7))


def decode_plans(chosen: DecodePlan) -> Iterator[DecodePlan]:
    """The chosen plan and every other way to divide and combine the work."""
    yield chosen
    for (warps, stages), (splits, cluster) in itertools.product(
        ((4, 4), (8, 4)) if chosen.fp8_cache else ((2, 2), (2, 3), (4, 2), (4, 4), (8, 3)),
        ((1, False), (3, False), (12, False), (2, True), (8, True)),
    ):
        yield dataclasses.replace(chosen, warps=warps, stages=stages, splits=splits, cluster=cluster)


def check_decode(
    library: KernelLibrary, model: Model, lengths: list[int], all_plans: bool, seed: int = 0
) -> None:
    """Output, appended rows, untouched rows, counters and determinism for one batch; length 0 is an unused row."""
    past = [max(0, length - 1) for length in lengths]
    batch = paged_batch(model, [1] * len(lengths), past, device="cuda", seed=seed)
    kv_length = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    inputs = (batch.q, batch.k, batch.v, batch.k_cache, batch.v_cache, batch.page_table, kv_length)
    expected = reference_decode(*inputs, scale=model.scale)
    used = [i for i, length in enumerate(lengths) if length]
    one = torch.arange(len(used) + 1, dtype=torch.int32, device="cuda")
    k_wanted, v_wanted = reference_append_kv(
        batch.k[used],
        batch.v[used],
        batch.k_cache,
        batch.v_cache,
        one,
        kv_length[used],
        batch.page_table[used],
    )
    attention = PagedDecodeAttention(library)
    chosen = attention.plan(len(lengths), model.num_heads, batch.k_cache, max(lengths))
    fitting = (plan for plan in decode_plans(chosen) if plan.shared_bytes <= library.shared_limit)
    for plan in fitting if all_plans else [chosen]:
        workspace = torch.zeros(max(16, plan.workspace_bytes), dtype=torch.uint8, device="cuda")
        k_cache, v_cache = batch.k_cache.clone(), batch.v_cache.clone()
        outs = [torch.full(batch.q.shape, torch.nan, dtype=model.dtype, device="cuda") for _ in range(2)]
        for out, early in zip(outs, (False, True), strict=True):
            attention(
                batch.q, batch.k, batch.v, k_cache, v_cache, batch.page_table, kv_length, out=out, plan=plan,
                scale=model.scale, workspace=workspace, dependent=early, early=early,
            )  # fmt: skip
        error = row_error(outs[0], expected)
        assert error < TOLERANCE[model.dtype], f"error {error:.2e} with {plan}"
        assert torch.equal(outs[0], outs[1]), f"a second launch differs with {plan}"
        assert same(k_cache, k_wanted), f"k cache differs with {plan}"
        assert same(v_cache, v_wanted), f"v cache differs with {plan}"
        assert not workspace[: plan.counter_bytes].any(), f"counters are not zero after {plan}"


def check_decode_loop(library: KernelLibrary, model: Model, lengths: list[int], steps: int) -> None:
    """One captured graph, replayed step by step: attention reads lengths that the step before it advanced."""
    batch = paged_batch(model, [1] * len(lengths), [n + steps for n in lengths], device="cuda")
    kv_length = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    attention, sampling = PagedDecodeAttention(library), Sampling(library)
    plan = attention.plan(len(lengths), model.num_heads, batch.k_cache, max(lengths) + steps)
    workspace = torch.zeros(max(16, plan.workspace_bytes), dtype=torch.uint8, device="cuda")
    out = torch.empty(batch.q.shape, dtype=model.dtype, device="cuda")
    logits = torch.randn(len(lengths), 1000, device="cuda")
    state = LoopState(torch.empty_like(kv_length), kv_length=kv_length)

    def step() -> None:
        attention(
            batch.q, batch.k, batch.v, batch.k_cache, batch.v_cache, batch.page_table, kv_length, out=out, plan=plan,
            scale=model.scale, workspace=workspace, early=True,
        )  # fmt: skip
        sampling.greedy(logits, state)

    caches = batch.k_cache.clone(), batch.v_cache.clone()
    step()  # loads the kernels; what it changed is put back
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    kv_length.copy_(torch.tensor(lengths))
    batch.k_cache.copy_(caches[0])
    batch.v_cache.copy_(caches[1])
    for number in range(steps):
        for rows in (batch.q, batch.k, batch.v):
            rows.copy_(torch.randn(rows.shape, device="cuda"))
        expected = reference_decode(
            batch.q,
            batch.k,
            batch.v,
            batch.k_cache,
            batch.v_cache,
            batch.page_table,
            kv_length,
            scale=model.scale,
        )
        graph.replay()
        error = row_error(out, expected)
        assert error < TOLERANCE[model.dtype], f"error {error:.2e} in step {number}"
        wanted = [n + number + 1 for n in lengths]
        assert kv_length.tolist() == wanted, f"lengths {kv_length.tolist()}, expected {wanted}"


def context_plans(
    library: KernelLibrary, model: Model, num_tokens: int, num_seqs: int, accumulation: str
) -> Iterator[ContextPlan]:
    """Every kernel that this GPU runs."""
    tiles = [(*LARGE_TILES[model.head_dim], False), (*SMALL_TILE, False)]
    if library.capability == 90 and accumulation == "float32":
        tiles += [(rows, HOPPER_KEYS, True) for rows in (64, 128, 192)]
    sizes = (num_tokens, num_seqs, model.num_heads, model.head_dim)
    for rows, keys, hopper in tiles:
        yield ContextPlan(*sizes, rows, keys, accumulation, hopper)
    if library.capability == 90 and accumulation == "float32" and model.cache_dtype is None:
        for rows, keys in persistent_tiles(model.head_dim):
            for blocks in (3, library.multiprocessors):  # many pieces of work for each, and few
                yield ContextPlan(*sizes, rows, keys, accumulation, True, blocks)


def check_context(
    library: KernelLibrary,
    model: Model,
    new: list[int],
    past: list[int],
    accumulation: str = "float32",
) -> None:
    """Output, padding rows and the append for one batch, with both tiles."""
    batch = paged_batch(model, new, past, device="cuda", padding=3)
    lengths = (batch.query_start, batch.kv_length, batch.page_table)
    expected = reference_context(
        batch.q, batch.k, batch.v, batch.k_cache, batch.v_cache, *lengths, scale=model.scale
    )
    k_wanted, v_wanted = reference_append_kv(batch.k, batch.v, batch.k_cache, batch.v_cache, *lengths)
    attention = ContextAttention(library)
    total = sum(new)
    tolerance = HALF_ACCUMULATION_TOLERANCE if accumulation == "float16" else TOLERANCE[model.dtype]
    for plan in context_plans(library, model, batch.q.shape[0], len(new), accumulation):
        k_cache, v_cache = batch.k_cache.clone(), batch.v_cache.clone()
        out = torch.full(batch.q.shape, torch.nan, dtype=model.dtype, device="cuda")
        for append in (False, True):
            attention(
                batch.q, batch.k, batch.v, k_cache, v_cache, *lengths, out=out, scale=model.scale,
                accumulation=accumulation, append=append, plan=plan,
            )  # fmt: skip
            if not append:
                assert same(k_cache, batch.k_cache), f"append=False wrote, {plan}"
        error = row_error(out[:total], expected[:total])
        assert error < tolerance, f"error {error:.2e} with {plan}"
        assert bool(out[total:].isnan().all()), f"padding rows were written with {plan}"
        assert same(k_cache, k_wanted), f"k cache differs with {plan}"
        assert same(v_cache, v_wanted), f"v cache differs with {plan}"


def check_append(library: KernelLibrary, model: Model, new: list[int], past: list[int]) -> None:
    batch = paged_batch(model, new, past, device="cuda", padding=5)
    batch.k[0, 0, :8] = batch.v[-6, -1, -8:] = 1e4  # more than an e4m3 number can be
    batch.k[0, 0, 8:16] = -(2.0**-8)  # less than its smallest that has an exponent
    lengths = (batch.query_start, batch.kv_length, batch.page_table)
    k_wanted, v_wanted = reference_append_kv(batch.k, batch.v, batch.k_cache, batch.v_cache, *lengths)
    AppendKv(library)(batch.k, batch.v, batch.k_cache, batch.v_cache, *lengths)
    assert same(batch.k_cache, k_wanted), "k cache differs"
    assert same(batch.v_cache, v_wanted), "v cache differs"


def all_checks(library: KernelLibrary) -> Iterator[Check]:
    """(name, check) of everything above over the models, context 1 to 2048, page boundaries and ragged batches."""
    new, past = [1, 5, 64, 65, 130, 200, 17], [0, 31, 0, 64, 33, 500, 2031]
    for number, model in enumerate((*MODELS, *FP8_MODELS)):
        yield f"decode ragged {model}", partial(check_decode, library, model, [*RAGGED_LENGTHS, 0], True)
        for length in (1, 33, 640, 2048):
            check = partial(check_decode, library, model, [length], length == 640, seed=number)
            yield f"decode {length} {model}", check
        yield f"context chunks {model}", partial(check_context, library, model, new, past)
        yield f"context prompts {model}", partial(check_context, library, model, [512, 127, 1, 700], [0] * 4)
        if model.dtype == torch.float16:
            yield f"context half {model}", partial(check_context, library, model, new, past, "float16")
        yield f"append {model}", partial(check_append, library, model, new, past)
    yield "decode loop", partial(check_decode_loop, library, MODELS[0], [1, 31, 500, 1023], 20)
    yield "decode loop b1", partial(check_decode_loop, library, MODELS[1], [15], 40)
    many = [(7 * i) % 40 + 1 for i in range(75)]
    yield (
        "context 75 sequences",
        partial(check_context, library, MODELS[0], many, [i % 70 for i in range(75)]),
    )
    yield (
        "decode 75 sequences",
        partial(check_decode, library, MODELS[0], [1 + 27 * i for i in range(75)], False),
    )
