"""What the all-reduce kernels compute, in float64 torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..layer_norm.reference import norm


def all_reduce(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of what the ranks bring, in float64."""
    return torch.stack([part.double() for part in parts]).sum(0)


def rounded_once(parts: Sequence[torch.Tensor], residual: torch.Tensor | None = None) -> torch.Tensor:
    """The float32 sum in the order of ranks, the residual last, in the type of the parts: the kernels' very bits."""
    total = parts[0].float()
    for part in (*parts[1:], *([] if residual is None else [residual])):
        total = total + part.float()
    return total.to(parts[0].dtype)


def all_reduce_norm(
    parts: Sequence[torch.Tensor],
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    *,
    residual: torch.Tensor | None = None,
    kind: str = "layer",
    epsilon: float = 1e-5,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(the sum with the residual, rounded once; the norm of that in float64)."""
    total = rounded_once(parts, residual)
    return total, norm(total, scale, shift, kind=kind, epsilon=epsilon)
