"""What the kernels over the paged KV cache share: the contract of their tensors, and references in torch.

Per layer k_cache and v_cache are [num_pages, num_kv_heads, page_size, head_dim], in the dtype of q, k and v or float8_e4m3fn,
to which k and v are rounded: the tokens that a page holds of one head lie together, and a block of threads, which reads
one head, reads whole lines. page_table [num_seqs, pages_per_seq]
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
FP8_MAX = 448.0
"""The largest number of float8_e4m3fn: larger ones are cut off, for it has no infinity."""
FP8_ELEMENT = "trtc::E4m3"
"""CUDA C++ type of an element of such a cache."""


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


def check_rows(
    op: str, name: str, tensor: torch.Tensor, cache: torch.Tensor, like: torch.Tensor, sizes: dict[str, int]
) -> None:
    """Raise KernelContractError unless `tensor` is `sizes` = [rows, heads, head_dim], on the device of `cache` and of its
    dtype, or where that is float8 of the dtype of `like`.

    Rows may lie apart (slices of a fused buffer); within a row heads are contiguous. Everything is 16-byte aligned.
    """
    dtype = like.dtype if is_fp8(cache) else cache.dtype
    got = f"{op}: {name} is {list(tensor.shape)} {tensor.dtype} on {tensor.device}, stride {tensor.stride()}"
    if list(tensor.shape) != list(sizes.values()) or tensor.dtype != dtype or tensor.device != cache.device:
        wanted = ", ".join(f"{label}={size}" for label, size in sizes.items())
        raise KernelContractError(f"{got}; expected [{wanted}] {dtype} on {cache.device}")
    row_stride, head_stride, element_stride = tensor.stride()
    is_aligned = row_stride * tensor.element_size() % ALIGNMENT == 0 and tensor.data_ptr() % ALIGNMENT == 0
    if head_stride != tensor.shape[2] or element_stride != 1 or not is_aligned:
        raise KernelContractError(f"{got}; expected contiguous heads and {ALIGNMENT}-byte aligned rows")


def is_fp8(cache: torch.Tensor) -> bool:
    """Whether a cache holds e4m3 numbers."""
    import torch

    return cache.dtype is torch.float8_e4m3fn


def as_bytes(cache: torch.Tensor) -> torch.Tensor:
    """`cache`, or where it holds e4m3 numbers, which torch does not index everywhere, a view of its bytes."""
    import torch

    return cache.view(torch.uint8) if is_fp8(cache) else cache


def as_stored(rows: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
    """`rows` in their own dtype, rounded to what `cache` can hold."""
    return rows.clamp(-FP8_MAX, FP8_MAX).to(cache.dtype).to(rows.dtype) if is_fp8(cache) else rows


def check_cache(
    op: str, k_cache: torch.Tensor, v_cache: torch.Tensor, num_heads: int, rows: torch.Tensor
) -> None:
    """Raise KernelContractError unless the caches are as the module's docstring says, for q, k and v like `rows`, and
    `num_heads` heads fit them."""
    num_pages, num_kv_heads, page_size, head_dim = k_cache.shape
    dtype = str((rows if is_fp8(k_cache) else k_cache).dtype).removeprefix("torch.")
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
        "num_kv_heads": num_kv_heads,
        "page_size": page_size,
        "head_dim": head_dim,
    }
    check_tensor(op, "k_cache", k_cache, k_cache.dtype, sizes, rows)
    check_tensor(op, "v_cache", v_cache, k_cache.dtype, sizes, rows)


def check_int32(op: str, name: str, tensor: torch.Tensor, like: torch.Tensor, sizes: dict[str, int]) -> None:
    """Raise KernelContractError unless `tensor` is a contiguous int32 tensor of `sizes` on the device of `like`."""
    import torch

    check_tensor(op, name, tensor, torch.int32, sizes, like)


def page_shift(k_cache: torch.Tensor) -> int:
    """log2 of the page size."""
    return k_cache.shape[2].bit_length() - 1


def gather_pages(cache: torch.Tensor, pages: torch.Tensor, length: int) -> torch.Tensor:
    """The first `length` tokens of one sequence, [length, num_kv_heads, head_dim]; pages: its row of the page table.

    In the dtype of the cache, or float32 where that is float8.
    """
    page_size = cache.shape[2]
    used = pages[: -(-length // page_size)].long()
    tokens = as_bytes(cache)[used].view(cache.dtype).transpose(1, 2).flatten(0, 1)[:length]
    return tokens.float() if is_fp8(cache) else tokens


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
