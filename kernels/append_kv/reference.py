"""What append_kv does, in torch."""

from __future__ import annotations

import torch

from ..paged import as_bytes, as_stored


def append_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    query_start: torch.Tensor,
    kv_length: torch.Tensor,
    page_table: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The caches after the append, as new tensors; arguments as in `AppendKv.__call__`."""
    k_cache, v_cache = k_cache.clone(), v_cache.clone()
    lengths = (query_start[1:] - query_start[:-1]).long()
    sequence = torch.arange(len(lengths), device=k.device).repeat_interleave(lengths)
    token = torch.arange(len(sequence), device=k.device)
    position = kv_length.long()[sequence] - (query_start.long()[sequence + 1] - token)
    page_size = k_cache.shape[2]
    pages, places = page_table[sequence, position // page_size].long(), position % page_size
    for cache, rows in ((k_cache, k), (v_cache, v)):
        new = as_stored(rows[: len(sequence)], cache).to(cache.dtype)
        as_bytes(cache)[pages, :, places] = as_bytes(new)
    return k_cache, v_cache
