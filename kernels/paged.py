"""What the kernels over the paged KV cache share: the contract of their tensors, and references in torch.

Per layer k_cache and v_cache are [num_pages, page_size, num_kv_heads, head_dim]; page_table [num_seqs, pages_per_seq]
int32 says which page holds tokens i * page_size ... of a sequence (-1: unused); kv_length [num_seqs] int32 counts the
tokens of a sequence, those of the current step included.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .contract import ALIGNMENT, check_tensor
from .errors import KernelContractError

if TYPE_CHECKING:
    import torch

PAGE_SIZES = (16, 32, 64)
HEAD_DIMS = (64, 80, 96, 128)
ELEMENTS = ("float16", "bfloat16")
LOG2_E = 1.4426950408889634


def check_model(
    op: str, *, dtype: str, head_dim: int, num_heads: int, num_kv_heads: int, page_size: int
) -> None:
    """Raise KernelContractError for what no attention kernel here supports; dtype is torch's name of it."""
    for name, value, accepted in (
        ("dtype", dtype, ELEMENTS),
        ("head_dim", head_dim, HEAD_DIMS),
        ("page_size", page_size, PAGE_SIZES),
    ):
        if value not in accepted:
            raise KernelContractError(
                f"{op}: {name} {value} is not supported; accepted: {', '.join(map(str, accepted))}"
            )
    if num_heads % num_kv_heads:
        raise KernelContractError(
            f"{op}: num_heads {num_heads} is not a multiple of num_kv_heads {num_kv_heads}; every kv head serves "
            "equally many query heads"
        )


def check_rows(op: str, name: str, tensor: torch.Tensor, like: torch.Tensor, sizes: dict[str, int]) -> None:
    """Raise KernelContractError unless `tensor` is `sizes` = [rows, heads, head_dim] of the dtype and device of `like`.

    Rows may lie apart (slices of a fused buffer); within a row heads are contiguous. Everything is 16-byte aligned.
    """
    got = f"{op}: {name} is {list(tensor.shape)} {tensor.dtype} on {tensor.device}, stride {tensor.stride()}"
    if (
        list(tensor.shape) != list(sizes.values())
        or tensor.dtype != like.dtype
        or tensor.device != like.device
    ):
        wanted = ", ".join(f"{label}={size}" for label, size in sizes.items())
        raise KernelContractError(f"{got}; expected [{wanted}] {like.dtype} on {like.device}")
    row_stride, head_stride, element_stride = tensor.stride()
    is_aligned = row_stride * tensor.element_size() % ALIGNMENT == 0 and tensor.data_ptr() % ALIGNMENT == 0
    if head_stride != tensor.shape[2] or element_stride != 1 or not is_aligned:
        raise KernelContractError(f"{got}; expected contiguous heads and {ALIGNMENT}-byte aligned rows")


def check_cache(op: str, k_cache: torch.Tensor, v_cache: torch.Tensor, num_heads: int) -> None:
    """Raise KernelContractError unless the caches are as the module's docstring says and `num_heads` heads fit them."""
    num_pages, page_size, num_kv_heads, head_dim = k_cache.shape
    dtype = str(k_cache.dtype).removeprefix("torch.")
    check_model(
        op,
        dtype=dtype,
        head_dim=head_dim,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        page_size=page_size,
    )
    sizes = {
        "num_pages": num_pages,
        "page_size": page_size,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
    }
    check_tensor(op, "k_cache", k_cache, k_cache.dtype, sizes, k_cache)
    check_tensor(op, "v_cache", v_cache, k_cache.dtype, sizes, k_cache)


def check_int32(op: str, name: str, tensor: torch.Tensor, like: torch.Tensor, sizes: dict[str, int]) -> None:
    """Raise KernelContractError unless `tensor` is a contiguous int32 tensor of `sizes` on the device of `like`."""
    import torch

    check_tensor(op, name, tensor, torch.int32, sizes, like)


def contract_key(*tensors: torch.Tensor | None) -> tuple[object, ...]:
    """All of the tensors that a contract looks at (of addresses, the alignment): calls with equal keys need one check."""
    return tuple(
        None if t is None else (t.shape, t.stride(), t.dtype, t.device, t.data_ptr() % ALIGNMENT)
        for t in tensors
    )


def page_shift(k_cache: torch.Tensor) -> int:
    """log2 of the page size."""
    return k_cache.shape[1].bit_length() - 1


def gather_pages(cache: torch.Tensor, pages: torch.Tensor, length: int) -> torch.Tensor:
    """The first `length` tokens of one sequence, [length, num_kv_heads, head_dim]; pages: its row of the page table."""
    page_size = cache.shape[1]
    used = pages[: -(-length // page_size)].long()
    return cache[used].flatten(0, 1)[:length]


def cache_slots(
    page_table: torch.Tensor, sequence: torch.Tensor, position: torch.Tensor, page_size: int
) -> torch.Tensor:
    """Rows of cache.flatten(0, 1) that hold tokens: sequence and position are [N] int64, the result too."""
    pages = page_table[sequence, position // page_size].long()
    return pages * page_size + position % page_size


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Float64 attention of the last rows of one sequence: q [Q, H, D], k and v [L, KV, D], Q <= L. Returns [Q, H, D]."""
    import torch

    group = q.shape[1] // k.shape[1]
    keys, values = (t.double().repeat_interleave(group, dim=1) for t in (k, v))
    scores = torch.einsum("qhd,lhd->hql", q.double(), keys) * scale
    first_position = k.shape[0] - q.shape[0]
    positions = torch.arange(k.shape[0], device=q.device)
    hidden = positions[None, :] > positions[first_position:, None]
    return torch.einsum("hql,lhd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(dim=-1), values)
