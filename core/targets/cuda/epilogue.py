"""What follows a large product where the library that multiplies has no epilogue for it."""

from __future__ import annotations

import torch

from ...ops.elementwise import ACTIVATIONS


def finished(y: torch.Tensor, activation: str, residual: torch.Tensor | None) -> torch.Tensor:
    """activation(y) + residual; y may be lost. activation: "none" or one of ACTIVATIONS."""
    if activation == "relu":
        y = y.relu_()
    elif activation != "none":
        y = ACTIVATIONS[activation](y)
    return y if residual is None else y.add_(residual)
