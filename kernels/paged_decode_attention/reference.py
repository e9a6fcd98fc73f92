"""What paged_decode_attention computes, in float64 torch."""

from __future__ import annotations

import torch

from ..paged import as_stored, causal_attention, gather_pages


def paged_decode_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    kv_length: torch.Tensor,
    *,
    scale: float,
) -> torch.Tensor:
    """[num_seqs, num_heads, head_dim] float64; arguments as in `PagedDecodeAttention.__call__`, caches unchanged."""
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    for i, length in enumerate(kv_length.tolist()):
        if length > 0:
            keys, values = (
                torch.cat([gather_pages(cache, page_table[i], length - 1), as_stored(rows[i : i + 1], cache)])
                for cache, rows in ((k_cache, k), (v_cache, v))
            )
            out[i] = causal_attention(q[i : i + 1], keys, values, scale)[0]
    return out
