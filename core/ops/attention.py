"""Causal attention over a paged KV cache, and rotary position embedding."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..dtypes import DType, to_torch
from ..spec import TensorSpec
from .registry import Attrs, Op, ReferenceContext, Signature, register, widen


def _attention(sig: Signature) -> tuple[TensorSpec, ...]:
    q, k, v = sig[0], sig[1], sig[2]
    sig.require(q.rank == 3, f"q {q} is not [tokens, heads, head_dim]")
    sig.require(k == v, f"k {k} and v {v} differ")
    fits = k.rank == 3 and q.dtype == k.dtype and (q.shape[0], q.shape[2]) == (k.shape[0], k.shape[2])
    sig.require(fits, f"q {q} and k {k} do not fit")
    heads, kv_heads = q.shape[1], k.shape[1]
    fits = isinstance(heads, int) and isinstance(kv_heads, int) and kv_heads > 0 and heads % kv_heads == 0
    sig.require(fits, f"{heads} heads are not a multiple of {kv_heads} kv heads")
    for index, what in ((3, "query_start"), (4, "kv_length"), (5, "page_table")):
        sig.require(sig[index].dtype == DType.INT32, f"{what} {sig[index]} is not int32")
    sig.integer("layer")
    sig.number("scale")
    if CACHE_DTYPE in sig.attrs:
        sig.attr(CACHE_DTYPE, DType.FLOAT8_E4M3.value)
    return (q,)


CACHE_DTYPE = "cache_dtype"
"""The attribute that says what the cache holds; without it, the type of k and v."""
FP8_MAX = 448.0


def cached_as(attrs: Attrs, dtype: DType) -> DType:
    """Type of the cache of an attention node whose k and v have type `dtype`."""
    return DType(attrs.get(CACHE_DTYPE, dtype))


def as_cached(attrs: Attrs, rows: torch.Tensor) -> torch.Tensor:
    """k or v as the node's cache holds them: rounded to nearest; what e4m3 has no number for, to its largest."""
    if CACHE_DTYPE not in attrs:
        return rows
    return rows.clamp(-FP8_MAX, FP8_MAX).to(to_torch(DType(attrs[CACHE_DTYPE])))


def indexable(cache: torch.Tensor) -> torch.Tensor:
    """`cache`, or a view of its bytes where it holds e4m3 numbers, which torch does not index everywhere."""
    return cache.view(torch.uint8) if cache.dtype is torch.float8_e4m3fn else cache


def append_to_pages(
    cache: tuple[torch.Tensor, torch.Tensor],
    k: torch.Tensor,
    v: torch.Tensor,
    pages: torch.Tensor,
    first: int,
) -> None:
    """Writes k, v [n, kv_heads, head_dim] at positions `first`.. of the sequence that owns `pages`."""
    page_size = cache[0].shape[1]
    position = torch.arange(first, first + k.shape[0], device=k.device)
    page, slot = pages[position // page_size].long(), position % page_size
    for held, rows in zip(cache, (k, v), strict=True):
        indexable(held)[page, slot] = indexable(rows.to(held.dtype))


def _attention_reference(
    ctx: ReferenceContext,
    attrs: Attrs,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    query_start: torch.Tensor,
    kv_length: torch.Tensor,
    page_table: torch.Tensor,
) -> torch.Tensor:
    """Written for clarity: one sequence at a time, scores and sums in float32 (float64 stays float64).

    The cache may be of a wider type than it is said to hold: what is written is rounded all the same.
    """
    cache = ctx.kv_cache[attrs["layer"]]
    out = torch.empty_like(q)
    group = q.shape[1] // k.shape[1]
    k, v = as_cached(attrs, k), as_cached(attrs, v)
    for b in range(kv_length.shape[0]):
        start, stop, length = int(query_start[b]), int(query_start[b + 1]), int(kv_length[b])
        first = length - (stop - start)
        append_to_pages(cache, k[start:stop], v[start:stop], page_table[b], first)
        num_pages = -(-length // cache[0].shape[1])
        keys, values = (
            widen(indexable(part)[page_table[b, :num_pages].long()].view(part.dtype).flatten(0, 1)[:length])
            .to(widen(q).dtype)
            .repeat_interleave(group, 1)
            for part in cache
        )
        scores = torch.einsum("qhd,khd->hqk", widen(q[start:stop]), keys) * attrs["scale"]
        positions = torch.arange(length, device=q.device)
        future = positions > positions[first:].unsqueeze(1)
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        out[start:stop] = torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype)
    return out


def _attention_flops(sig: Signature, outputs: tuple[TensorSpec, ...], sizes: Mapping[str, int]) -> int:
    return 4 * outputs[0].numel(sizes) * sizes["C"]


def _attention_bytes(sig: Signature, outputs: tuple[TensorSpec, ...], sizes: Mapping[str, int]) -> int:
    cached = TensorSpec(cached_as(sig.attrs, sig[1].dtype), sig[1].shape[1:])
    per_token = 2 * cached.nbytes()
    return sizes["B"] * sizes["C"] * per_token + sum(
        spec.nbytes(sizes) for spec in (sig[0], sig[1], sig[2], *outputs)
    )


def _rotary(sig: Signature) -> tuple[TensorSpec, ...]:
    x, positions = sig[0], sig[1]
    sig.require(x.rank == 3, f"input {x} is not [tokens, heads, head_dim]")
    head_dim = x.shape[2]
    sig.require(isinstance(head_dim, int) and head_dim % 2 == 0, f"head_dim of {x} is not even")
    sig.require(positions.shape == x.shape[:1], f"positions {positions} do not fit {x}")
    sig.require(
        sig.number("theta") > 0, f"attribute theta is {sig.attr('theta')}; accepted: a number above 0"
    )
    return (x,)


def _rotary_reference(
    _: ReferenceContext, attrs: Attrs, x: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    half = x.shape[-1] // 2
    wide = widen(x)
    frequency = attrs["theta"] ** (-torch.arange(half, dtype=wide.dtype, device=x.device) / half)
    angle = positions.to(wide.dtype).unsqueeze(-1) * frequency
    cos, sin = angle.cos().unsqueeze(1), angle.sin().unsqueeze(1)
    first, second = wide.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


ATTENTION = register(
    Op(
        "attention",
        _attention,
        _attention_reference,
        _attention_flops,
        _attention_bytes,
        attrs=("layer", "scale", "cache_dtype"),
    )
)
"""`attention(q[T, heads, head_dim], k[T, kv_heads, head_dim], v, query_start[B+1], kv_length[B], page_table[B, P];
layer, scale, cache_dtype?)` -> [T, heads, head_dim].

First appends the tokens' k and v to slot `layer` of the cache, then lets every token see itself and all tokens
before it in its sequence: softmax(scale q k^T) v. Sequence b owns rows query_start[b]:query_start[b+1], which are
its last tokens; kv_length[b] counts all its tokens, these included. With cache_dtype float8_e4m3fn, k and v are rounded as
they are appended, so that a token sees the same whatever steps the others came in. Source: arXiv:1706.03762, pages:
arXiv:2309.06180.
"""
ROTARY = register(Op("rotary", _rotary, _rotary_reference, column_wise=True, attrs=("theta",)))
"""`rotary(x[T, heads, head_dim], positions[T]; theta)`: halves rotated against each other. Source: arXiv:2104.09864."""
