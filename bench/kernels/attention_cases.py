"""Random paged batches for the attention kernels, with everything that must not be read or left unwritten poisoned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...kernels.paged import as_bytes


@dataclass(frozen=True)
class Model:
    """Sizes of one attention layer."""

    num_heads: int = 12
    num_kv_heads: int = 12
    head_dim: int = 64
    page_size: int = 32
    dtype: torch.dtype = torch.float16
    cache_dtype: torch.dtype | None = None
    """Of the cache; None: dtype."""

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)


@dataclass(frozen=True)
class PagedBatch:
    """Inputs of one step over a paged cache; q, k, v are slices of one fused buffer. See `kernels/paged.py`."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    query_start: torch.Tensor
    kv_length: torch.Tensor
    page_table: torch.Tensor


def paged_batch(
    model: Model,
    new_tokens: Sequence[int],
    past: Sequence[int],
    *,
    device: str,
    seed: int = 0,
    padding: int = 0,
) -> PagedBatch:
    """A batch of sequences with `past` tokens in the cache and `new_tokens` rows of q, k, v.

    Pages are dealt in random order. Rows of the cache that hold no earlier token are NaN, as are `padding` surplus rows
    of q, k, v; unused entries of the page table are -1.
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    nan = float("nan")
    lengths = [new + old for new, old in zip(new_tokens, past, strict=True)]
    pages = [-(-length // model.page_size) for length in lengths]
    num_pages = sum(pages) + 2
    order = torch.randperm(num_pages, generator=generator, device=device).tolist()
    table = torch.full((len(lengths), max(*pages, 1) + 1), -1, dtype=torch.int32)
    shape = (num_pages, model.num_kv_heads, model.page_size, model.head_dim)
    held = model.cache_dtype or model.dtype
    k_cache, v_cache = (torch.full(shape, nan, device=device).to(held) for _ in range(2))
    taken = 0
    for i, count in enumerate(pages):
        own = order[taken : taken + count]
        taken += count
        table[i, :count] = torch.tensor(own, dtype=torch.int32)
        for cache in (k_cache, v_cache):
            rows = torch.randn(
                past[i], model.num_kv_heads, model.head_dim, generator=generator, device=device
            ).to(held)
            for page, start in zip(own, range(0, past[i], model.page_size), strict=False):
                part = rows[start : start + model.page_size]
                as_bytes(cache)[page, :, : len(part)] = as_bytes(part).transpose(0, 1)
    num_tokens = sum(new_tokens)
    widths = [model.num_heads * model.head_dim, *[model.num_kv_heads * model.head_dim] * 2]
    fused = torch.randn(num_tokens + padding, sum(widths), generator=generator, device=device).to(model.dtype)
    fused[num_tokens:] = nan
    q, k, v = (part.view(len(part), -1, model.head_dim) for part in torch.split(fused, widths, dim=1))
    starts = torch.tensor([0, *new_tokens]).cumsum(0).to(torch.int32)
    kv_length = torch.tensor(lengths, dtype=torch.int32)
    return PagedBatch(q, k, v, k_cache, v_cache, starts.to(device), kv_length.to(device), table.to(device))


def row_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """The largest ||out - reference|| / ||reference|| over rows and heads [rows, heads, head_dim]; NaN is inf."""
    distance = (out.double() - reference).norm(dim=-1)
    size = reference.norm(dim=-1).clamp(min=1e-30)
    return float((distance / size).nan_to_num(nan=torch.inf, posinf=torch.inf).max())
