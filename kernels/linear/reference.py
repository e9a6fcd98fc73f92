"""What the linear kernels compute, in float64 torch."""

from __future__ import annotations

import torch
from torch.nn import functional

from ..layer_norm.reference import norm as reference_norm


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    residual: torch.Tensor | None = None,
    activation: str = "none",
    norm: str = "none",
    epsilon: float = 1e-5,
) -> torch.Tensor:
    """`activation(norm(x) @ weight.T + bias) + residual`, [rows, out_features] float64; norm: none, layer or rms."""
    inputs = x.double() if norm == "none" else reference_norm(x, kind=norm, epsilon=epsilon)
    y = activate(inputs @ weight.double().T + (0 if bias is None else bias.double()), activation)
    return y if residual is None else y + residual.double()


def activate(x: torch.Tensor, kind: str) -> torch.Tensor:
    """The activation `kind` of the graph's ops, element by element."""
    if kind == "none":
        return x
    if kind == "relu":
        return functional.relu(x)
    if kind == "silu":
        return functional.silu(x)
    return functional.gelu(x, approximate={"gelu": "none", "gelu_tanh": "tanh"}[kind])
