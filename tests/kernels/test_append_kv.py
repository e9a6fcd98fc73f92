"""append_kv: reference, contract, machine code; on a GPU the kernel itself."""

from __future__ import annotations

import pytest
import torch
from trtc.bench.kernels import attention_checks
from trtc.bench.kernels.attention_cases import Model, paged_batch
from trtc.kernels.append_kv import SOURCE, check
from trtc.kernels.append_kv.reference import append_kv
from trtc.kernels.errors import KernelContractError
from trtc.kernels.library import KernelLibrary
from trtc.kernels.nvrtc import CI_ARCHITECTURES, compile_kernel

MODEL = Model(num_heads=4, num_kv_heads=2, head_dim=64, page_size=16, dtype=torch.float16)
NEW, PAST = [3, 1, 20], [0, 15, 30]


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
            k_wanted[page, position % MODEL.page_size] = batch.k[row]
            v_wanted[page, position % MODEL.page_size] = batch.v[row]
            row += 1
    assert torch.equal(k_cache.nan_to_num(9), k_wanted.nan_to_num(9))
    assert torch.equal(v_cache.nan_to_num(9), v_wanted.nan_to_num(9))


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
    (usage,) = compile_kernel(SOURCE, {}, arch).resources.values()
    assert usage.spill_store_bytes == usage.stack_bytes == 0


@pytest.mark.gpu
@pytest.mark.parametrize("model", attention_checks.MODELS, ids=str)
def test_kernel(model: Model, library: KernelLibrary) -> None:
    """Oracle: the reference, bit for bit."""
    attention_checks.check_append(library, model, [1, 5, 64, 65, 130, 200, 17], [0, 31, 0, 64, 33, 500, 2031])
