"""What the layer-norm kernels compute, in float64 torch."""

from __future__ import annotations

import torch


def norm(
    x: torch.Tensor,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    *,
    kind: str = "layer",
    epsilon: float = 1e-5,
) -> torch.Tensor:
    """Layer norm (`kind="layer"`) or root-mean-square norm (`"rms"`) of the last axis, float64."""
    value = x.double()
    if kind == "layer":
        value = value - value.mean(dim=-1, keepdim=True)
    value = value * torch.rsqrt(value.square().mean(dim=-1, keepdim=True) + epsilon)
    if scale is not None:
        value = value * scale.double()
    return value if shift is None else value + shift.double()


def add_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    *,
    kind: str = "layer",
    epsilon: float = 1e-5,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x + residual rounded to the dtype of x, the norm of that sum in float64)."""
    total = (x.double() + residual.double()).to(x.dtype)
    return total, norm(total, scale, shift, kind=kind, epsilon=epsilon)
