"""append_kv: reference, contract, machine code; on a GPU the kernel itself."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from trtc.bench.kernels import attention_checks
from trtc.bench.kernels.attention_cases import Model, paged_batch
from trtc.kernels.append_kv import SOURCE, check, source
from trtc.kernels.append_kv.reference import append_kv
from trtc.kernels.errors import KernelContractError
from trtc.kernels.library import KernelLibrary
from trtc.kernels.nvrtc import CI_ARCHITECTURES, compile_kernel

MODEL = Model(num_heads=4, num_kv_heads=2, head_dim=64, page_size=16, dtype=torch.float16)
NEW, PAST = [3, 1, 20], [0, 15, 30]
FP8_MODEL = dataclasses.replace(MODEL, cache_dtype=torch.float8_e4m3fn)


def test_reference_places_each_token_by_its_page() -> None:
    """Oracle: one token at a time, from the definition of page table and length; nothing else may change."""
    batch = paged_batch(MODEL, NEW, PAST, device="cpu", padding=1)
    k_cache, v_cache = append_kv(
        batch.k, batch.v, batch.k_cache, batch.v_cache, batch.query_start, batch.kv_length, batch.page_table
    )
    k_wanted, v_wanted = batch.k_cache.clone(), batch.v_cache.clone()
    row = 0
    for i, (new, past) in enumerate(zip(NEW, PAST, strict=True)):
        for position in range(past, past + new):
            page = int(batch.page_table[i, position // MODEL.page_size])
            k_wanted[page, :, position % MODEL.page_size] = batch.k[row]
            v_wanted[page, :, position % MODEL.page_size] = batch.v[row]
            row += 1
    assert torch.equal(k_cache.nan_to_num(9), k_wanted.nan_to_num(9))
    assert torch.equal(v_cache.nan_to_num(9), v_wanted.nan_to_num(9))


def test_reference_rounds_to_an_fp8_cache() -> None:
    """Oracle: torch's conversion, of what e4m3 has numbers for; the largest of them for what is beyond."""
    batch = paged_batch(FP8_MODEL, [2], [0], device="cpu")
    batch.k[0, 0, :4] = torch.tensor([500.0, -1e4, 0.1, 2.0**-10])
    tables = (batch.query_start, batch.kv_length, batch.page_table)
    k_cache, v_cache = append_kv(batch.k, batch.v, batch.k_cache, batch.v_cache, *tables)
    page = int(batch.page_table[0, 0])
    assert k_cache.dtype is torch.float8_e4m3fn
    assert k_cache[page, 0, 0, :4].float().tolist() == [448.0, -448.0, 0.1015625, 0.0]
    assert torch.equal(v_cache[page, :, :2].float().transpose(0, 1), batch.v.to(torch.float8_e4m3fn).float())


def test_contract_takes_an_fp8_cache_for_16_bit_rows() -> None:
    """Oracle: the contract: the rows say what is computed in, and both have its type."""
    batch = paged_batch(FP8_MODEL, NEW, PAST, device="cpu")
    caches, tables = (batch.k_cache, batch.v_cache), (batch.query_start, batch.kv_length, batch.page_table)
    check(batch.k, batch.v, *caches, *tables)
    with pytest.raises(KernelContractError, match=r"v is .*bfloat16.*expected .*float16"):
        check(batch.k, batch.v.bfloat16(), *caches, *tables)
    with pytest.raises(KernelContractError, match="dtype float32 is not supported"):
        check(batch.k.float(), batch.v.float(), *caches, *tables)


def to_e4m3_by_hand(values: torch.Tensor) -> torch.Tensor:
    """The steps of to_e4m3 in common/fp8.cuh, on float32."""
    magnitude = values.abs().fmin(torch.tensor(448.0))
    bits = magnitude.view(torch.int32)
    small = torch.round(magnitude * 512).int()
    normal = ((bits + 0x7FFFF + (bits >> 20 & 1)) >> 20) - (120 << 3)
    number = torch.where(magnitude < 0.015625, small, normal)
    signed = number | (values.view(torch.int32) >> 24 & 0x80)
    return torch.where(values.isnan(), 0x7F, signed).to(torch.uint8)


def test_rounding_by_hand() -> None:
    """Oracle: torch's conversion, of every float16 that is a number."""
    values = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    values = values[~values.isnan()]
    wanted = values.clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(to_e4m3_by_hand(values), wanted.view(torch.uint8))


def test_contract_names_what_does_not_fit() -> None:
    """Oracle: the contract in `AppendKv.__call__`."""
    batch = paged_batch(MODEL, NEW, PAST, device="cpu")
    tables = (batch.query_start, batch.kv_length, batch.page_table)
    check(batch.k, batch.v, batch.k_cache, batch.v_cache, *tables)
    with pytest.raises(KernelContractError, match=r"append_kv: v is \[23, 2, 64\].*expected \[num_tokens=24"):
        check(batch.k, batch.v[1:], batch.k_cache, batch.v_cache, *tables)


@pytest.mark.parametrize("arch", CI_ARCHITECTURES)
def test_compiles_without_spills(arch: str) -> None:
    """Oracle: NVRTC and the resource report of ptxas."""
    for one in (SOURCE, source("__half", fp8_cache=True), source("__nv_bfloat16", fp8_cache=True)):
        (usage,) = compile_kernel(one, {}, arch).resources.values()
        assert usage.spill_store_bytes == usage.stack_bytes == 0


@pytest.mark.gpu
@pytest.mark.parametrize("model", [*attention_checks.MODELS, *attention_checks.FP8_MODELS], ids=str)
def test_kernel(model: Model, library: KernelLibrary) -> None:
    """Oracle: the reference, bit for bit."""
    attention_checks.check_append(library, model, [1, 5, 64, 65, 130, 200, 17], [0, 31, 0, 64, 33, 500, 2031])
