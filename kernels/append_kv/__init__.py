"""Writes the k and v of new tokens into the paged KV cache."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..contract import ELEMENT_TYPES, addresses_and_key
from ..launch import BoundKernel, LaunchShape
from ..library import KernelLibrary
from ..nvrtc import KernelSource
from ..paged import check_cache, check_int32, check_rows, is_fp8, page_shift

if TYPE_CHECKING:
    import torch

ENTRY = "trtc::append_kv"
SOURCE = KernelSource(Path(__file__).parent / "append_kv.cu", (ENTRY,))
"""The kernel for caches in the dtype of k and v, whatever that is."""
SIGNATURE = "PPPPPPPiiiiiii"
THREADS = 256
PIECE_BYTES = 16


def source(element: str, *, fp8_cache: bool) -> KernelSource:
    """The file with the one kernel that serves k and v of CUDA type `element`."""
    return KernelSource(SOURCE.path, (f"{ENTRY}_e4m3<{element}>",)) if fp8_cache else SOURCE


class AppendKv:
    """Launcher of the append kernel. One per device and thread."""

    def __init__(self, library: KernelLibrary) -> None:
        self._library = library
        self._bound: dict[tuple[object, ...], BoundKernel] = {}

    def __call__(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        query_start: torch.Tensor,
        kv_length: torch.Tensor,
        page_table: torch.Tensor,
        *,
        dependent: bool = True,
    ) -> None:
        """Copy the new tokens of every sequence to the end of its pages.

        k, v:             [num_tokens, num_kv_heads, head_dim]            packed; rows may lie apart
        k_cache, v_cache: [num_pages, num_kv_heads, page_size, head_dim]  dtype of k, or float8_e4m3fn; written
        query_start:      [num_seqs + 1] int32  first packed row of each sequence, then the number of rows in use (the
                          rest is padding and is skipped)
        kv_length:        [num_seqs] int32      tokens of each sequence, the new ones included
        page_table:       [num_seqs, pages_per_seq] int32
        dependent:        programmatic dependent launch; nothing is read before the predecessors have ended.
        Raises KernelContractError for tensors that do not fit; DeviceError without a GPU.
        """
        tensors = (k, v, k_cache, v_cache, query_start, kv_length, page_table)
        addresses, contract = addresses_and_key(tensors)
        key = (contract, dependent)
        kernel = self._bound.get(key)
        if kernel is None:
            check(*tensors)
            kernel = self._bound[key] = self._bind(k, is_fp8(k_cache), dependent)
        elements = PIECE_BYTES // k.element_size()
        kernel(
            *addresses,
            k.stride(0) // elements, v.stride(0) // elements, k.shape[2] // elements, k.shape[1],
            kv_length.shape[0], page_shift(k_cache), page_table.shape[1],
        )  # fmt: skip

    def _bind(self, k: torch.Tensor, fp8_cache: bool, dependent: bool) -> BoundKernel:
        pieces = k.numel() * k.element_size() // PIECE_BYTES
        chosen = source(ELEMENT_TYPES[str(k.dtype).removeprefix("torch.")], fp8_cache=fp8_cache)
        shape = LaunchShape((-(-pieces // THREADS),), (THREADS,), dependent=dependent)
        return self._library.bind(chosen, chosen.entries[0], SIGNATURE, shape)


def check(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    query_start: torch.Tensor,
    kv_length: torch.Tensor,
    page_table: torch.Tensor,
) -> None:
    """Raise KernelContractError unless the tensors fit the contract of `AppendKv.__call__`."""
    op, num_seqs = "append_kv", kv_length.shape[0]
    _, num_kv_heads, _, head_dim = k_cache.shape
    check_cache(op, k_cache, v_cache, num_kv_heads, k)
    sizes = {"num_tokens": k.shape[0], "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    check_rows(op, "k", k, k_cache, k, sizes)
    check_rows(op, "v", v, k_cache, k, sizes)
    check_int32(op, "query_start", query_start, k, {"num_seqs + 1": num_seqs + 1})
    check_int32(op, "kv_length", kv_length, k, {"num_seqs": num_seqs})
    check_int32(
        op, "page_table", page_table, k, {"num_seqs": num_seqs, "pages_per_seq": page_table.shape[-1]}
    )
