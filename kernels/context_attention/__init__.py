"""Causal attention of packed prompts, or chunks of them, over the paged KV cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..contract import ELEMENT_TYPES, addresses_and_key, pointer
from ..errors import KernelContractError
from ..launch import BoundKernel
from ..library import KernelLibrary
from ..paged import LOG2_E, check_cache, check_int32, check_rows, is_fp8, page_shift
from .plan import ACCUMULATIONS, SIGNATURE, ContextPlan, choose_plan, sources

if TYPE_CHECKING:
    import torch

__all__ = ["ACCUMULATIONS", "SIGNATURE", "ContextAttention", "ContextPlan", "choose_plan", "sources"]

OP = "context_attention"


class ContextAttention:
    """Launcher of the context attention kernels; see `__call__`. One per device and thread."""

    def __init__(self, library: KernelLibrary) -> None:
        self._library = library
        self._bound: dict[tuple[object, ...], tuple[BoundKernel, ContextPlan]] = {}
        self._counters: torch.Tensor | None = None

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        query_start: torch.Tensor,
        kv_length: torch.Tensor,
        page_table: torch.Tensor,
        *,
        out: torch.Tensor,
        scale: float,
        accumulation: str = "float32",
        append: bool = True,
        dependent: bool = True,
        plan: ContextPlan | None = None,
    ) -> torch.Tensor:
        """Causal attention of new tokens over their sequence's earlier tokens and each other, written to `out`.

        q, out:           [num_tokens, num_heads, head_dim]               packed; rows may lie apart
        k, v:             [num_tokens, num_kv_heads, head_dim]            packed, of the new tokens; dtype of q
        k_cache, v_cache: [num_pages, num_kv_heads, page_size, head_dim]  dtype of q, or float8_e4m3fn, to which new k and v
                          are then rounded before anything is made of them; read for earlier tokens
        query_start:      [num_seqs + 1] int32  first packed row of each sequence, then the number of rows in use (rows
                          after it are padding: their output is not written)
        kv_length:        [num_seqs] int32      tokens of each sequence, the new ones included
        page_table:       [num_seqs, pages_per_seq] int32
        scale:        factor on q.k.
        accumulation: "float32", or "float16" for the sums of both products (float16 inputs only); softmax is float32.
        append:       also write the new k and v to the cache, as `AppendKv` does.
        dependent:    programmatic dependent launch; nothing is read before the predecessors have ended.
        plan:         overrides `choose_plan`, for measurements.
        Equal inputs give equal bits. Raises KernelContractError for tensors that do not fit; DeviceError without a GPU.
        Source: FlashAttention-2, arXiv:2307.08691.
        """
        tensors = (q, k, v, k_cache, v_cache, query_start, kv_length, page_table, out)
        addresses, contract = addresses_and_key(tensors)
        key = (contract, accumulation, dependent, plan)
        bound = self._bound.get(key)
        if bound is None:
            check(*tensors, accumulation)
            bound = self._bound[key] = self._bind(
                q, is_fp8(k_cache), kv_length.shape[0], accumulation, dependent, plan
            )
        kernel, plan = bound
        counters, pieces = ((pointer(self._counters),), (plan.pieces,)) if plan.blocks else ((), ())
        num_kv_heads = k.shape[1]
        kernel(
            *addresses, *counters, q.stride(0), k.stride(0), v.stride(0), out.stride(0), kv_length.shape[0],
            num_kv_heads, q.shape[1] // num_kv_heads, page_shift(k_cache), page_table.shape[1], scale * LOG2_E,
            int(append), *pieces,
        )  # fmt: skip
        return out

    def _bind(
        self, q: torch.Tensor, fp8_cache: bool, num_seqs: int, accumulation: str, dependent: bool,
        plan: ContextPlan | None,
    ) -> tuple[BoundKernel, ContextPlan]:  # fmt: skip
        import torch

        num_tokens, num_heads, head_dim = q.shape
        plan = plan or choose_plan(
            num_tokens, num_seqs, num_heads, head_dim, accumulation=accumulation,
            capability=self._library.capability, multiprocessors=self._library.multiprocessors,
            fp8_cache=fp8_cache,
        )  # fmt: skip
        source = plan.source(ELEMENT_TYPES[str(q.dtype).removeprefix("torch.")], fp8_cache=fp8_cache)
        if plan.blocks and self._counters is None:
            self._counters = q.new_zeros(2, dtype=torch.int32)
        shape = plan.launch_shape(dependent)
        return self._library.bind(source, source.entries[0], plan.signature, shape), plan


def check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    query_start: torch.Tensor,
    kv_length: torch.Tensor,
    page_table: torch.Tensor,
    out: torch.Tensor,
    accumulation: str,
) -> None:
    """Raise KernelContractError unless the tensors fit the contract of `ContextAttention.__call__`."""
    import torch

    num_tokens, num_heads = q.shape[:2]
    num_kv_heads, _, head_dim = k_cache.shape[1:]
    num_seqs = kv_length.shape[0]
    check_cache(OP, k_cache, v_cache, num_heads, q)
    new_rows = {"num_tokens": num_tokens, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    rows = {"num_tokens": num_tokens, "num_heads": num_heads, "head_dim": head_dim}
    for name, tensor, sizes in (("q", q, rows), ("k", k, new_rows), ("v", v, new_rows), ("out", out, rows)):
        check_rows(OP, name, tensor, k_cache, q, sizes)
    check_int32(OP, "query_start", query_start, q, {"num_seqs + 1": num_seqs + 1})
    check_int32(OP, "kv_length", kv_length, q, {"num_seqs": num_seqs})
    check_int32(
        OP, "page_table", page_table, q, {"num_seqs": num_seqs, "pages_per_seq": page_table.shape[-1]}
    )
    if accumulation == "float16" and q.dtype != torch.float16:
        raise KernelContractError(f"{OP}: accumulation in float16 takes float16 tensors, not {q.dtype}")
