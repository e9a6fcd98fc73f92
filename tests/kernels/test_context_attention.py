"""context_attention: reference, plans, contract, machine code; on a GPU the kernels themselves."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn import functional
from trtc.bench.kernels import attention_checks
from trtc.bench.kernels.attention_cases import Model, paged_batch
from trtc.kernels.append_kv.reference import append_kv
from trtc.kernels.context_attention import check, choose_plan, sources
from trtc.kernels.context_attention.reference import context_attention
from trtc.kernels.errors import KernelContractError
from trtc.kernels.library import KernelLibrary
from trtc.kernels.nvrtc import CI_ARCHITECTURES, compile_kernel, compile_target
from trtc.kernels.paged import HEAD_DIMS, gather_pages

MODEL = Model(num_heads=4, num_kv_heads=2, head_dim=64, page_size=16, dtype=torch.float16)
FP8_MODEL = dataclasses.replace(MODEL, cache_dtype=torch.float8_e4m3fn)
CHUNKS, PAST = [5, 1, 40, 7], [0, 33, 17, 0]


@pytest.mark.parametrize("model", [MODEL, FP8_MODEL], ids=str)
def test_reference_is_causal_attention_over_the_appended_cache(model: Model) -> None:
    """Oracle: torch's scaled_dot_product_attention in float64, masked by hand, over append_kv's reference."""
    batch = paged_batch(model, CHUNKS, PAST, device="cpu", padding=2)
    tables = (batch.query_start, batch.kv_length, batch.page_table)
    out = context_attention(
        batch.q, batch.k, batch.v, batch.k_cache, batch.v_cache, *tables, scale=MODEL.scale
    )
    caches = append_kv(batch.k, batch.v, batch.k_cache, batch.v_cache, *tables)
    start = 0
    for i, (new, past) in enumerate(zip(CHUNKS, PAST, strict=True)):
        k, v = (
            gather_pages(cache, batch.page_table[i], past + new).double().transpose(0, 1) for cache in caches
        )
        q = batch.q[start : start + new].double().transpose(0, 1)
        mask = torch.ones(new, past + new, dtype=torch.bool).tril(past)
        expected = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        torch.testing.assert_close(out[start : start + new], expected.transpose(0, 1), rtol=1e-12, atol=1e-12)
        start += new
    assert not out[start:].any(), "padding rows stay 0"


@pytest.mark.parametrize("capability", [80, 89, 90, 120])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_plans_fit_the_hardware(capability: int, head_dim: int) -> None:
    """Oracle: shared memory per block (99 KiB, on sm_90 227 KiB), and room for every split of the tokens in sequences."""
    for num_tokens, num_seqs in ((1, 1), (130, 7), (4096, 64), (32768, 64), (8192, 2)):
        plan = choose_plan(num_tokens, num_seqs, 12, head_dim, capability=capability)
        assert plan.shared_bytes <= (227 if capability == 90 else 99) * 1024
        assert plan.hopper == (capability == 90)
        # The worst division: all sequences but one have a single token more than whole blocks.
        lengths = [1] * (num_seqs - 1) + [num_tokens - num_seqs + 1]
        needed = sum(-(-length // plan.rows) for length in lengths)
        assert plan.slots >= needed


@pytest.mark.parametrize(
    ("batch", "head_dim", "fp8_cache", "expected"),
    [
        ((32768, 64, 32), 128, False, (128, 128, 132)),
        ((16384, 57, 32), 64, False, (64, 64, 264)),  # short
        ((512, 1, 32), 128, False, (64, 64, 264)),  # few
        ((8192, 4, 32), 80, False, (192, 64, 132)),
        ((32768, 64, 32), 80, False, (64, 64, 0)),
        ((32768, 64, 32), 128, True, (128, 64, 0)),
    ],
)
def test_plans_of_hopper(
    batch: tuple[int, int, int], head_dim: int, fp8_cache: bool, expected: tuple[int, int, int]
) -> None:
    """Oracle: bench/notes/kernels_attention.md. Blocks, where they stay, are no more than there is work."""
    plan = choose_plan(*batch, head_dim, fp8_cache=fp8_cache)
    assert (plan.rows, plan.keys, plan.blocks) == expected
    grid = plan.launch_shape(dependent=False).grid
    assert grid == ((min(plan.blocks, plan.pieces),) if plan.blocks else (batch[2], plan.slots))
    names = [entry for one in sources("__half", (head_dim,), fp8_cache=fp8_cache) for entry in one.entries]
    assert plan.source("__half", fp8_cache=fp8_cache).entries[0] in names


def test_half_accumulation_is_served_by_the_mma_kernel() -> None:
    """Oracle: the instruction set: wgmma is used with float32 sums only."""
    assert not choose_plan(4096, 8, 12, 64, accumulation="float16").hopper


def arguments() -> dict[str, object]:
    batch = paged_batch(MODEL, CHUNKS, PAST, device="cpu")
    return {
        "q": batch.q, "k": batch.k, "v": batch.v, "k_cache": batch.k_cache, "v_cache": batch.v_cache,
        "query_start": batch.query_start, "kv_length": batch.kv_length, "page_table": batch.page_table,
        "out": torch.empty(53, 4, 64, dtype=torch.float16), "accumulation": "float32",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query_start": torch.zeros(4, dtype=torch.int32)}, "query_start is [4] int32"),
        (
            {"out": torch.empty(52, 4, 64, dtype=torch.float16)},
            "expected [num_tokens=53, num_heads=4, head_dim=64]",
        ),
        ({"v": torch.empty(53, 2, 64, dtype=torch.bfloat16)}, "v is [53, 2, 64] torch.bfloat16"),
        (
            {"q": torch.empty(53, 3, 64, dtype=torch.float16)},
            "num_heads 3 is not a multiple of num_kv_heads 2",
        ),
    ],
)
def test_contract_names_what_does_not_fit(changes: dict[str, object], message: str) -> None:
    """Oracle: the contract in `ContextAttention.__call__`."""
    check(**arguments())  # type: ignore[arg-type]
    with pytest.raises(KernelContractError) as caught:
        check(**{**arguments(), **changes})  # type: ignore[arg-type]
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_unknown_accumulation_is_refused() -> None:
    """Oracle: the contract: float32 or float16."""
    with pytest.raises(
        KernelContractError, match="accumulation 'fp8' is unknown; accepted: float32, float16"
    ):
        choose_plan(1, 1, 12, 64, accumulation="fp8")


@pytest.mark.parametrize("arch", CI_ARCHITECTURES)
def test_compiles_without_spills(arch: str) -> None:
    """Oracle: NVRTC and the resource report of ptxas. The full set of head_dims and types is in test_compile."""
    for source in sources("__half", head_dims=(80,), capability=int(arch.removeprefix("sm_"))):
        for name, usage in compile_kernel(source, {}, compile_target(arch)).resources.items():
            assert usage.spill_store_bytes == usage.spill_load_bytes == usage.stack_bytes == 0, name


@pytest.mark.gpu
@pytest.mark.parametrize("model", [*attention_checks.MODELS, *attention_checks.FP8_MODELS], ids=str)
@pytest.mark.parametrize("accumulation", ["float32", "float16"])
def test_kernel_chunks(model: Model, accumulation: str, library: KernelLibrary) -> None:
    """Oracle: the float64 reference; chunked prefill over page boundaries, appended cache, poisoned memory."""
    if accumulation == "float16" and model.dtype != torch.float16:
        pytest.skip("float16 sums take float16 inputs")
    new, past = [1, 5, 64, 65, 130, 200, 17], [0, 31, 0, 64, 33, 500, 2031]
    attention_checks.check_context(library, model, new, past, accumulation)


@pytest.mark.gpu
@pytest.mark.parametrize("model", [*attention_checks.MODELS, *attention_checks.FP8_MODELS], ids=str)
def test_kernel_prompts(model: Model, library: KernelLibrary) -> None:
    """Oracle: the float64 reference; whole prompts."""
    attention_checks.check_context(library, model, [512, 127, 1, 700], [0, 0, 0, 0])
