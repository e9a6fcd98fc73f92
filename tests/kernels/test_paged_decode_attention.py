"""paged_decode_attention: reference, plans, contract, machine code; on a GPU the kernels themselves."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn import functional
from trtc.bench.kernels import attention_checks
from trtc.bench.kernels.attention_cases import Model, PagedBatch, paged_batch
from trtc.kernels.append_kv.reference import append_kv
from trtc.kernels.errors import KernelContractError
from trtc.kernels.launch import LaunchShape
from trtc.kernels.library import KernelLibrary
from trtc.kernels.nvrtc import CI_ARCHITECTURES, compile_kernel
from trtc.kernels.paged import gather_pages
from trtc.kernels.paged_decode_attention import DecodePlan, check, choose_plan, sources
from trtc.kernels.paged_decode_attention.reference import paged_decode_attention

SMALLEST_SHARED_LIMIT = 99 * 1024
"""Bytes of shared memory per block on sm_86, sm_89 and sm_120."""

MODEL = Model(num_heads=6, num_kv_heads=2, head_dim=64, page_size=16, dtype=torch.float16)


FP8_MODEL = dataclasses.replace(MODEL, cache_dtype=torch.float8_e4m3fn)


def batch_of(lengths: list[int], model: Model = MODEL) -> PagedBatch:
    return paged_batch(model, [1] * len(lengths), [length - 1 for length in lengths], device="cpu")


@pytest.mark.parametrize("model", [MODEL, FP8_MODEL], ids=str)
def test_reference_is_attention_over_the_appended_cache(model: Model) -> None:
    """Oracle: torch's scaled_dot_product_attention in float64 over the cache that append_kv's reference leaves."""
    lengths = [1, 16, 17, 40]
    batch = batch_of(lengths, model)
    tables = (batch.page_table, batch.kv_length)
    out = paged_decode_attention(
        batch.q, batch.k, batch.v, batch.k_cache, batch.v_cache, *tables, scale=MODEL.scale
    )
    caches = append_kv(
        batch.k, batch.v, batch.k_cache, batch.v_cache, batch.query_start, batch.kv_length, batch.page_table
    )
    for i, length in enumerate(lengths):
        k, v = (gather_pages(cache, batch.page_table[i], length).double().transpose(0, 1) for cache in caches)
        expected = functional.scaled_dot_product_attention(
            batch.q[i, :, None].double(), k, v, enable_gqa=True
        )
        torch.testing.assert_close(out[i], expected[:, 0], rtol=1e-12, atol=1e-12)


def test_reference_gives_zero_for_an_unused_row() -> None:
    """Oracle: the contract; the row's q, k, v are NaN and must not be read."""
    batch = batch_of([5, 9])
    batch.q[1], batch.k[1], batch.v[1] = torch.nan, torch.nan, torch.nan
    lengths = torch.tensor([5, 0], dtype=torch.int32)
    out = paged_decode_attention(
        batch.q, batch.k, batch.v, batch.k_cache, batch.v_cache, batch.page_table, lengths, scale=1.0
    )
    assert bool(out[0].isfinite().all()) and not out[1].any()


@pytest.mark.parametrize("capability", [80, 89, 90, 120])
def test_plans_fit_the_hardware(capability: int) -> None:
    """Oracle: limits of the CUDA programming guide: 99 KiB of shared memory, clusters of 8 and only from sm_90 on."""
    for num_seqs in (1, 3, 8, 64, 300):
        for heads, kv_heads in ((12, 12), (32, 8), (24, 2), (71, 1)):
            for head_dim in (64, 80, 96, 128):
                for length in (1, 16, 640, 2048, 100_000):
                    plan = choose_plan(
                        num_seqs, heads, kv_heads, head_dim, length, capability=capability,
                        shared_limit=SMALLEST_SHARED_LIMIT,
                    )  # fmt: skip
                    assert plan.shared_bytes <= SMALLEST_SHARED_LIMIT
                    assert plan.splits >= 1 and plan.head_blocks * plan.heads * kv_heads >= heads
                    shape = plan.launch_shape(dependent=True)
                    assert shape.grid == (kv_heads * plan.head_blocks, num_seqs, plan.splits)
                    assert (capability >= 90 and plan.splits <= 8) or not shape.cluster


def test_plan_of_one_short_sequence_spreads_over_the_gpu() -> None:
    """Oracle: the arithmetic of the plan: 12 heads x 8 splits of a cluster, no workspace; a short one has less to split."""
    plan = choose_plan(1, 12, 12, 64, 2048)
    assert plan.launch_shape(dependent=False) == LaunchShape((12, 1, 8), (256,), plan.shared_bytes, (1, 1, 8))
    assert choose_plan(1, 12, 12, 64, 640).splits == 4
    assert plan.workspace_bytes == 0


def test_plan_without_clusters_has_a_workspace() -> None:
    """Oracle: the layout in the kernel's comment: padded counters, then heads * (head_dim + 2) floats per part."""
    plan = choose_plan(1, 12, 12, 64, 640, capability=80)
    assert not plan.cluster and plan.splits > 1
    assert plan.counter_bytes == 48
    assert plan.workspace_bytes == 48 + 12 * plan.splits * 66 * 4


def arguments(plan: DecodePlan | None = None) -> dict[str, object]:
    batch = batch_of([5, 20])
    return {
        "q": batch.q, "k": batch.k, "v": batch.v, "k_cache": batch.k_cache, "v_cache": batch.v_cache,
        "page_table": batch.page_table, "kv_length": batch.kv_length, "out": torch.empty(2, 6, 64, dtype=torch.float16),
        "plan": plan or choose_plan(2, 6, 2, 64, 20), "workspace": None,
    }  # fmt: skip


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
def test_blocks_of_a_few_sequences_run_at_once_with_all_the_memory_there_is(head_dim: int) -> None:
    """Oracle: 227 KiB of shared memory in each of 132 multiprocessors, 1 KiB of which the driver adds to each block."""

    def fits(plan: DecodePlan) -> bool:
        blocks = 32 * plan.num_seqs * plan.splits
        return -(-blocks // 132) * (plan.shared_bytes + 1024) <= 227 * 1024

    for num_seqs in range(1, 13):
        plan = choose_plan(num_seqs, 32, 32, head_dim, 2048)
        assert fits(plan) and 32 * num_seqs * plan.splits >= 128
        assert not fits(dataclasses.replace(plan, stages=2 * plan.stages))


def test_what_blocks_have_where_they_come_in_waves() -> None:
    """Oracle: what was measured to be the fastest, by head_dim, for 16, 24, 32, 64 and 100 sequences of 32 heads."""
    found = {
        head_dim: [
            (plan.warps, plan.stages, plan.splits)
            for rows in (16, 24, 32, 64, 100)
            for plan in [choose_plan(rows, 32, 32, head_dim, 1024)]
        ]
        for head_dim in (64, 80, 128)
    }
    assert found == {
        64: [(4, 3, 1), (4, 4, 1), (4, 3, 1), (4, 3, 1), (4, 3, 1)],
        80: [(4, 4, 1), (2, 2, 4), (2, 2, 4), (2, 2, 4), (4, 3, 1)],
        128: [(2, 3, 1), (2, 2, 4), (2, 2, 4), (2, 2, 4), (4, 3, 1)],
    }
    assert choose_plan(64, 32, 32, 128, 1024, capability=80).splits == 1, (
        "there are no clusters to combine them"
    )
    assert [choose_plan(rows, 32, 32, 64, 1024, fp8_cache=True).stages for rows in (8, 64)] == [6, 4]


@pytest.mark.parametrize(
    ("capability", "shared_limit"), [(80, 163 * 1024), (90, 227 * 1024), (120, 99 * 1024)]
)
@pytest.mark.parametrize("fp8_cache", [False, True])
def test_engines_have_every_kernel_that_is_chosen(
    capability: int, shared_limit: int, fp8_cache: bool
) -> None:
    """Oracle: the entries of the sources that an engine is built with."""
    for head_dim in (64, 80, 96, 128):
        (source,) = sources("__half", (head_dim,), capability, fp8_cache=fp8_cache)
        for num_seqs in (1, 2, 4, 8, 10, 16, 24, 32, 64, 512):
            for heads, kv_heads in ((12, 12), (32, 32), (32, 8), (16, 1)):
                for length in (1, 2048, 100_000):
                    plan = choose_plan(
                        num_seqs, heads, kv_heads, head_dim, length, fp8_cache=fp8_cache, capability=capability,
                        shared_limit=shared_limit,
                    )  # fmt: skip
                    assert plan.entry("__half") in source.entries


def test_contract_accepts_slices_of_a_fused_buffer() -> None:
    """Oracle: the contract; q, k and v here share rows of one buffer."""
    assert arguments()["q"].stride(0) == 10 * 64  # type: ignore[attr-defined]
    check(**arguments())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.empty(2, 5, 64, dtype=torch.float16)}, "num_heads 5 is not a multiple of num_kv_heads 2"),
        ({"k": torch.empty(2, 6, 64, dtype=torch.float16)}, "expected [num_seqs=2, num_kv_heads=2, head_dim=64]"),
        ({"out": torch.empty(2, 6, 64)}, "out is [2, 6, 64] torch.float32"),
        ({"v": torch.empty(2, 64, 2, dtype=torch.float16).transpose(1, 2)}, "contiguous heads"),
        ({"q": torch.empty(2 * 384 + 4, dtype=torch.float16)[4:].view(2, 6, 64)}, "16-byte aligned rows"),
        ({"kv_length": torch.zeros(2, dtype=torch.int64)}, "kv_length is [2] int64"),
        ({"plan": choose_plan(3, 6, 2, 64, 20)}, "the plan is for num_seqs, num_kv_heads, head_dim = (3, 2, 64)"),
        (
            {"plan": choose_plan(2, 6, 2, 64, 20, fp8_cache=True)},
            "the plan is for a float8_e4m3fn cache, this one is torch.float16",
        ),
        (
            {"plan": dataclasses.replace(choose_plan(2, 6, 2, 64, 20), splits=2, cluster=False)},
            "workspace has 0 bytes; the plan needs",
        ),
    ],
)  # fmt: skip
def test_contract_names_what_does_not_fit(changes: dict[str, object], message: str) -> None:
    """Oracle: the contract in `PagedDecodeAttention.__call__`."""
    with pytest.raises(KernelContractError) as caught:
        check(**{**arguments(), **changes})  # type: ignore[arg-type]
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("shape", "message"), [((4, 2, 8, 64), "page_size 8"), ((4, 2, 16, 72), "head_dim 72")]
)
def test_contract_names_accepted_sizes(shape: tuple[int, ...], message: str) -> None:
    """Oracle: the contract: page sizes and head_dims that have kernels."""
    cache = torch.zeros(shape, dtype=torch.float16)
    with pytest.raises(KernelContractError, match=f"{message} is not supported; accepted: "):
        check(**{**arguments(), "k_cache": cache, "v_cache": cache})  # type: ignore[arg-type]


def test_plan_of_an_fp8_cache() -> None:
    """Oracle: what was measured: eight warps for each multiprocessor, six stages where they fill the GPU partly."""
    for batch, expected in (
        ((48, 32, 32, 128, 1024), (4, 4, 1)),
        ((8, 32, 32, 64, 576), (4, 6, 1)),
        ((4, 12, 12, 80, 300), (4, 4, 5)),
    ):
        plan = choose_plan(*batch, fp8_cache=True)
        assert (plan.warps, plan.stages, plan.splits) == expected
        assert plan.entry("__half").endswith("trtc::E4m3>")


@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_fragments_of_a_tile_of_bytes(head_dim: int) -> None:
    """The layouts of packed_fragments, with the order of dims in which q is read and sums are written. Oracle: products.

    ldmatrix gives a lane bytes 4 (lane % 4) ... of row lane / 4 of a matrix of 8 rows of 16 bytes; transposed, the pairs of
    bytes lane / 4 of rows 2 (lane % 4) and the next. Fragments of mma are those of common/mma.cuh.
    """
    random = torch.Generator().manual_seed(3)
    tile = torch.randn(16, head_dim, generator=random)
    q, p = torch.randn(8, head_dim, generator=random), torch.randn(8, 16, generator=random)
    scores, sums = torch.zeros(16, 8), torch.zeros(head_dim, 8)
    for step in range(head_dim // 16):
        piece = tile[:, 16 * step : 16 * step + 16]
        keys, values = torch.zeros(16, 16), torch.zeros(16, 16)  # A: rows by k
        query, weights = torch.zeros(16, 8), torch.zeros(16, 8)  # B: k by columns
        order = torch.zeros(16, dtype=torch.long)
        for lane in range(32):
            group, member = lane // 4, lane % 4
            pair, other = slice(2 * member, 2 * member + 2), slice(2 * member + 8, 2 * member + 10)
            for half in range(2):
                raw = piece[group + 8 * half, 4 * member : 4 * member + 4]
                keys[group + 8 * half, pair], keys[group + 8 * half, other] = raw[:2], raw[2:]
                tokens = piece[8 * half + 2 * member : 8 * half + 2 * member + 2, 2 * group : 2 * group + 2]
                permuted = tokens.flatten()[[0, 2, 1, 3]]
                values[group, (pair, other)[half]] = permuted[:2]
                values[group + 8, (pair, other)[half]] = permuted[2:]
            row = q[group, 16 * step + 4 * member :]
            query[pair, group], query[other, group] = row[0:2], row[2:4]
            weights[pair, group], weights[other, group] = p[group, pair], p[group, other]
            order[group], order[group + 8] = 2 * group, 2 * group + 1
        scores += keys @ query
        sums[16 * step + order] = values @ weights
    torch.testing.assert_close(scores, tile @ q.T)
    torch.testing.assert_close(sums, tile.T @ p.T)


@pytest.mark.parametrize("arch", CI_ARCHITECTURES)
def test_compiles_without_spills(arch: str) -> None:
    """Oracle: NVRTC and the resource report of ptxas. The full set of head_dims and types is in test_compile."""
    capability = int(arch.removeprefix("sm_"))
    (source,) = sources("__half", head_dims=(80,), capability=capability)
    for name, usage in compile_kernel(source, {}, arch).resources.items():
        assert usage.spill_store_bytes == usage.spill_load_bytes == usage.stack_bytes == 0, name
        assert usage.registers <= 128, name


@pytest.mark.gpu
@pytest.mark.parametrize("model", [*attention_checks.MODELS, *attention_checks.FP8_MODELS], ids=str)
def test_kernel_ragged_batch(model: Model, library: KernelLibrary) -> None:
    """Oracle: the float64 reference; every way to split and combine, twice, with poisoned memory."""
    attention_checks.check_decode(library, model, [*attention_checks.RAGGED_LENGTHS, 0], all_plans=True)


@pytest.mark.gpu
@pytest.mark.parametrize("model", [attention_checks.MODELS[0], attention_checks.FP8_MODELS[0]], ids=str)
@pytest.mark.parametrize("length", [1, 33, 640, 2048])
def test_kernel_one_sequence(length: int, model: Model, library: KernelLibrary) -> None:
    """Oracle: the float64 reference."""
    attention_checks.check_decode(library, model, [length], all_plans=True)


@pytest.mark.gpu
@pytest.mark.parametrize("model", [attention_checks.MODELS[0], attention_checks.FP8_MODELS[0]], ids=str)
def test_kernel_in_a_replayed_graph(model: Model, library: KernelLibrary) -> None:
    """Oracle: the float64 reference at each of 20 steps of one captured graph, lengths advanced on the device."""
    attention_checks.check_decode_loop(library, model, [1, 31, 500, 1023], 20)
