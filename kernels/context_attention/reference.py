"""What context_attention computes, in float64 torch."""

from __future__ import annotations

import torch

from ..paged import as_stored, causal_attention, gather_pages


def context_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    query_start: torch.Tensor,
    kv_length: torch.Tensor,
    page_table: torch.Tensor,
    *,
    scale: float,
) -> torch.Tensor:
    """[num_tokens, num_heads, head_dim] float64, 0 in padding rows; arguments as in `ContextAttention.__call__`.

    Caches are left unchanged; `append_kv.reference` says what they become.
    """
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    starts = query_start.tolist()
    for i, length in enumerate(kv_length.tolist()):
        new = slice(starts[i], starts[i + 1])
        past = length - (new.stop - new.start)
        keys, values = (
            torch.cat([gather_pages(cache, page_table[i], past), as_stored(rows[new], cache)])
            for cache, rows in ((k_cache, k), (v_cache, v))
        )
        out[new] = causal_attention(q[new], keys, values, scale)
    return out
