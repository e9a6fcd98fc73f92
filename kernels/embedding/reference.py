"""What the embedding kernel computes, in float64 torch."""

from __future__ import annotations

import torch


def embedding(
    ids: torch.Tensor,
    table: torch.Tensor,
    *,
    offset: int = 0,
    masked: bool = False,
    position_ids: torch.Tensor | None = None,
    position_table: torch.Tensor | None = None,
    position_offset: int = 0,
) -> torch.Tensor:
    """`table[ids + offset]`, zero outside the table when `masked`, plus the row of the position; float64."""
    rows = ids.long() + offset
    inside = (rows >= 0) & (rows < table.shape[0])
    y = table.double()[rows.clamp(0, table.shape[0] - 1)]
    if masked:
        y = y * inside[:, None]
    if position_ids is not None and position_table is not None:
        y = y + position_table.double()[position_ids.long() + position_offset]
    return y
