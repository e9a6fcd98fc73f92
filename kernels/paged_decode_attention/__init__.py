"""Attention of one new token per sequence over a paged KV cache, with the append of its k and v."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..contract import ELEMENT_TYPES, addresses_and_key, check_tensor
from ..errors import KernelContractError
from ..launch import BoundKernel
from ..library import KernelLibrary
from ..nvrtc import KernelSource
from ..paged import ELEMENTS, LOG2_E, check_cache, check_int32, check_rows, is_fp8, page_shift
from .plan import SIGNATURE, SOURCE, DecodePlan, choose_plan, entry, sources

if TYPE_CHECKING:
    import torch

__all__ = ["ELEMENTS", "SIGNATURE", "DecodePlan", "PagedDecodeAttention", "choose_plan", "entry", "sources"]

OP = "paged_decode_attention"


class PagedDecodeAttention:
    """Launcher of the decode attention kernels; see `__call__`. One per device and thread."""

    def __init__(self, library: KernelLibrary) -> None:
        self._library = library
        self._bound: dict[tuple[object, ...], BoundKernel] = {}

    def plan(self, num_seqs: int, num_heads: int, k_cache: torch.Tensor, max_kv_length: int) -> DecodePlan:
        """`choose_plan` for this GPU; its `workspace_bytes` say what `__call__` needs."""
        _, num_kv_heads, _, head_dim = k_cache.shape
        return choose_plan(
            num_seqs, num_heads, num_kv_heads, head_dim, max_kv_length, fp8_cache=is_fp8(k_cache),
            capability=self._library.capability, multiprocessors=self._library.multiprocessors,
            shared_limit=self._library.shared_limit,
        )  # fmt: skip

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        page_table: torch.Tensor,
        kv_length: torch.Tensor,
        *,
        out: torch.Tensor,
        plan: DecodePlan,
        scale: float,
        workspace: torch.Tensor | None = None,
        dependent: bool = True,
        early: bool = False,
    ) -> torch.Tensor:
        """Attention of the last token of each sequence over all of its tokens, written to `out`.

        q, out:           [num_seqs, num_heads, head_dim]                  rows may lie apart (a fused qkv buffer)
        k, v:             [num_seqs, num_kv_heads, head_dim]               the new token's; dtype of q
        k_cache, v_cache: [num_pages, num_kv_heads, page_size, head_dim]   dtype of q, or float8_e4m3fn; the new row is written,
                          and seen as the cache holds it
        page_table:       [num_seqs, pages_per_seq] int32                  -1 where unused
        kv_length:        [num_seqs] int32   the new token included; 0 marks an unused row, whose output becomes 0
        plan:      from `plan`, for a bound on kv_length. Lengths are read on the device: a captured launch serves any.
        scale:     factor on q.k, 1 / sqrt(head_dim) for most models. Sums are float32.
        workspace: [>= plan.workspace_bytes] uint8, zero before its first use; launches that may overlap must not share
                   one. None when the plan needs none.
        dependent: programmatic dependent launch.
        early:     read kv_length, page_table and the cache before the predecessors have ended. Right only when none of
                   the kernels since the last full dependency (the start of a CUDA graph, a launch that is not
                   `dependent`) wrote kv_length, page_table or cached rows of earlier tokens.
        Equal inputs give equal bits; another plan may round differently.
        Raises KernelContractError for tensors that do not fit; DeviceError without a GPU.
        Source: PagedAttention, arXiv:2309.06180; split over context as in Flash-Decoding.
        """
        tensors = (q, k, v, k_cache, v_cache, page_table, kv_length, out)
        (*addresses, counters), contract = addresses_and_key((*tensors, workspace))
        key = (contract, plan, dependent)
        kernel = self._bound.get(key)
        if kernel is None:
            check(*tensors, plan, workspace)
            kernel = self._bound[key] = self._bind(q, plan, dependent)
        kernel(
            *addresses, counters + plan.counter_bytes, counters,
            q.stride(0), k.stride(0), v.stride(0), out.stride(0), plan.num_kv_heads, q.shape[1] // plan.num_kv_heads,
            page_shift(k_cache), page_table.shape[1], scale * LOG2_E, int(early),
        )  # fmt: skip
        return out

    def _bind(self, q: torch.Tensor, plan: DecodePlan, dependent: bool) -> BoundKernel:
        name = plan.entry(ELEMENT_TYPES[str(q.dtype).removeprefix("torch.")])
        shape = plan.launch_shape(dependent)
        return self._library.bind(KernelSource(SOURCE, (name,)), name, SIGNATURE, shape)


def check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    kv_length: torch.Tensor,
    out: torch.Tensor,
    plan: DecodePlan,
    workspace: torch.Tensor | None,
) -> None:
    """Raise KernelContractError unless the tensors fit the contract of `PagedDecodeAttention.__call__`."""
    import torch

    num_seqs, num_heads = q.shape[:2]
    num_kv_heads, _, head_dim = k_cache.shape[1:]
    check_cache(OP, k_cache, v_cache, num_heads, q)
    new_rows = {"num_seqs": num_seqs, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    rows = {"num_seqs": num_seqs, "num_heads": num_heads, "head_dim": head_dim}
    for name, tensor, sizes in (("q", q, rows), ("k", k, new_rows), ("v", v, new_rows), ("out", out, rows)):
        check_rows(OP, name, tensor, k_cache, q, sizes)
    check_int32(
        OP, "page_table", page_table, q, {"num_seqs": num_seqs, "pages_per_seq": page_table.shape[-1]}
    )
    check_int32(OP, "kv_length", kv_length, q, {"num_seqs": num_seqs})
    if plan.fp8_cache != is_fp8(k_cache):
        made_for = "float8_e4m3fn" if plan.fp8_cache else "16-bit"
        raise KernelContractError(f"{OP}: the plan is for a {made_for} cache, this one is {k_cache.dtype}")
    planned = (plan.num_seqs, plan.num_kv_heads, plan.head_dim)
    if planned != (num_seqs, num_kv_heads, head_dim):
        raise KernelContractError(
            f"{OP}: the plan is for num_seqs, num_kv_heads, head_dim = {planned}, the tensors have "
            f"{(num_seqs, num_kv_heads, head_dim)}"
        )
    if plan.workspace_bytes:
        size = 0 if workspace is None else workspace.numel()
        if workspace is None or size < plan.workspace_bytes:
            raise KernelContractError(
                f"{OP}: workspace has {size} bytes; the plan needs {plan.workspace_bytes}"
            )
        check_tensor(OP, "workspace", workspace, torch.uint8, {"workspace_bytes": size}, q)
