"""Paged attention on the CPU: in compiled code where there is any; else through torch, sequences with one new token as one
batch, the others one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ...kernels import cpu_step
from ..dtypes import from_torch
from ..graph import Node
from ..ops.attention import as_cached, indexable

KVCache = list[tuple[torch.Tensor, torch.Tensor]]
"""Per layer the pages of k and v, each [num_pages, page_size, num_kv_heads, head_dim]: not as on target cuda, whose pages
have the tokens of a head together."""


@dataclass(frozen=True)
class _Single:
    """A sequence that is attended to on its own: one with several tokens in this step, or the only one with one."""

    rows: slice
    pages: torch.Tensor
    length: int
    mask: torch.Tensor | None
    """[rows, length], true where a token may look; None where causality or the length alone says it."""
    causal: bool


@dataclass(frozen=True)
class _Decode:
    """Several sequences with one token each in this step."""

    rows: torch.Tensor | None
    """Their rows; None when they are all rows there are."""
    slots: torch.Tensor
    """[sequences, longest] of a cache seen as [slots, kv_heads, head_dim]. Past its length a sequence names its own
    first token: the mask hides it, but a NaN that another request left in a page would get through a mask."""
    mask: torch.Tensor
    """[sequences, 1, 1, longest]."""


class CpuAttention:
    """Attention over `cache`. `begin_step` works out, once for all layers, where tokens go and what they see."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._slots = torch.empty(0, dtype=torch.int64)
        self._singles: list[_Single] = []
        self._decode: _Decode | None = None

    def begin_step(
        self, query_start: torch.Tensor, kv_length: torch.Tensor, page_table: torch.Tensor
    ) -> None:
        """query_start [B+1], kv_length [B], page_table [B, P], all int32: see `core.ops.attention`."""
        page_size = self._cache[0][0].shape[1]
        counts = query_start.diff()
        owner = torch.repeat_interleave(torch.arange(len(counts)), counts)
        position = torch.arange(len(owner)) - query_start[owner] + (kv_length - counts)[owner]
        self._slots = page_table[owner, position // page_size].long() * page_size + position % page_size
        starts, lengths = query_start.tolist(), kv_length.tolist()
        decoding = (counts == 1).nonzero().flatten()
        batched = set(decoding.tolist()) if len(decoding) > 1 else set()
        self._singles = [
            _single(slice(starts[b], starts[b + 1]), lengths[b], page_table[b], page_size)
            for b in range(len(lengths))
            if b not in batched
        ]
        self._decode = None
        if batched:
            rows = query_start[decoding].long() if self._singles else None
            self._decode = _decode(rows, kv_length[decoding], page_table[decoding], page_size)

    def kernel(self, node: Node) -> Callable[..., torch.Tensor]:
        """The implementation of the attention node `node`."""
        keys, values = self._cache[node.attrs["layer"]]
        key_slots, value_slots = keys.flatten(0, 1), values.flatten(0, 1)
        scale: float = node.attrs["scale"]

        def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
            indexable(key_slots)[self._slots] = indexable(as_cached(node.attrs, k))
            indexable(value_slots)[self._slots] = indexable(as_cached(node.attrs, v))
            decode = self._decode
            if decode is not None and decode.rows is None:
                return _attend_decode(q, key_slots, value_slots, decode, scale)
            out = torch.empty(q.shape, dtype=q.dtype)
            if decode is not None:
                out[decode.rows] = _attend_decode(q[decode.rows], key_slots, value_slots, decode, scale)
            for part in self._singles:
                out[part.rows] = _attend_single(q[part.rows], keys, values, part, scale)
            return out

        return attention


class CompiledAttention:
    """`CpuAttention` in compiled code: see `compiles`."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._step = (torch.empty(0, dtype=torch.int32),) * 3

    @staticmethod
    def compiles(cache: KVCache) -> bool:
        """Whether there is compiled code for `cache` and this processor."""
        return cpu_step.library() is not None and all(
            from_torch(part.dtype).value in cpu_step.WEIGHT_TYPES
            and part.dtype is not torch.int8
            and part.shape[3] <= cpu_step.MAX_HEAD_DIM
            and part.is_contiguous()
            for pair in cache
            for part in pair
        )

    def begin_step(
        self, query_start: torch.Tensor, kv_length: torch.Tensor, page_table: torch.Tensor
    ) -> None:
        """See `CpuAttention.begin_step`."""
        self._step = (query_start.contiguous(), kv_length.contiguous(), page_table.contiguous())

    def kernel(self, node: Node) -> Callable[..., torch.Tensor]:
        """The implementation of the attention node `node`."""
        keys, values = self._cache[node.attrs["layer"]]
        _, page_size, kv_heads, dim = keys.shape
        kind = cpu_step.WEIGHT_TYPES[from_torch(keys.dtype).value]
        scale: float = node.attrs["scale"]

        def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
            query_start, kv_length, page_table = self._step
            dtype, (q, k, v) = q.dtype, (_rows(part.to(keys.dtype)) for part in (q, k, v))
            out = torch.empty(q.shape, dtype=q.dtype)
            context = cpu_step.Context(
                type=kind, sequences=len(kv_length), heads=q.shape[1], kv_heads=kv_heads, dim=dim, page_size=page_size,
                pages=page_table.shape[1], ldq=q.stride(0), ldk=k.stride(0), ldv=v.stride(0), scale=scale,
                q=q.data_ptr(), k=k.data_ptr(), v=v.data_ptr(), keys=keys.data_ptr(), values=values.data_ptr(),
                y=out.data_ptr(), query_start=query_start.data_ptr(), kv_length=kv_length.data_ptr(),
                page_table=page_table.data_ptr(),
            )  # fmt: skip
            cpu_step.context_attention(context, torch.get_num_threads())
            return out.to(dtype)

        return attention


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[tokens, heads, head_dim] with the heads of a token behind each other."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def _single(rows: slice, length: int, pages: torch.Tensor, page_size: int) -> _Single:
    count = rows.stop - rows.start
    mask = None
    if 1 < count < length:  # a later chunk: its first token sees all that came before it
        mask = torch.ones(count, length, dtype=torch.bool).tril(length - count)
    return _Single(rows, pages[: -(-length // page_size)].long(), length, mask, causal=count == length)


def _decode(
    rows: torch.Tensor | None, kv_length: torch.Tensor, page_table: torch.Tensor, page_size: int
) -> _Decode:
    position = torch.arange(int(kv_length.max()))
    slots = page_table[:, position // page_size].long() * page_size + position % page_size
    visible = position < kv_length.unsqueeze(1)
    return _Decode(rows, torch.where(visible, slots, slots[:, :1]), visible[:, None, None, :])


def _attend_decode(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: _Decode, scale: float
) -> torch.Tensor:
    """q: [sequences, heads, head_dim], one token of each; keys, values: [slots, kv_heads, head_dim]."""
    k, v = (
        indexable(cache)[batch.slots].view(cache.dtype).to(q.dtype).transpose(1, 2)
        for cache in (keys, values)
    )
    out = F.scaled_dot_product_attention(
        q.unsqueeze(2), k, v, attn_mask=batch.mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.squeeze(2)


def _attend_single(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, part: _Single, scale: float
) -> torch.Tensor:
    """q: [rows, heads, head_dim]; keys, values: [num_pages, page_size, kv_heads, head_dim]."""
    k, v = (
        _tokens(cache, part.pages, part.length).to(q.dtype).transpose(0, 1).unsqueeze(0)
        for cache in (keys, values)
    )
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1).unsqueeze(0),
        k,
        v,
        attn_mask=part.mask,
        is_causal=part.causal,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out.squeeze(0).transpose(0, 1)


def _tokens(cache: torch.Tensor, pages: torch.Tensor, length: int) -> torch.Tensor:
    """[length, kv_heads, head_dim] of the tokens on `pages`."""
    first = int(pages[0])
    neighbours = bool((pages.diff() == 1).all())  # then a view does, without a copy
    held = cache[first : first + len(pages)] if neighbours else indexable(cache)[pages].view(cache.dtype)
    return held.flatten(0, 1)[:length]
