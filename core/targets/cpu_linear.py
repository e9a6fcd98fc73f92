"""Linear layers on the CPU through oneDNN, which torch carries.

`F.linear` sends float32 to MKL, whose matrix-vector product runs on one thread and whose small products are slow on some
processors. oneDNN reads the weight as it lies in the engine - mapped, neither packed nor copied - with all threads, at the
memory's speed, and takes bias, activation and residual along.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F

from ..graph import Node
from ..ops.elementwise import ACTIVATIONS
from ..passes.fuse import POSITIONS, RESIDUAL

EPILOGUES = frozenset({RESIDUAL, POSITIONS})
"""Fusions that save a pass over the result."""

_ACTIVATIONS = {
    None: ("none", ""),
    "relu": ("relu", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "silu": ("swish", ""),
}
"""oneDNN's name and algorithm for an activation; None stands for no activation."""


def linear_kernel(node: Node) -> Callable[..., torch.Tensor]:
    """The implementation of the linear node `node`: activation(x weight^T + bias) + residual."""
    activation: str | None = node.attrs.get("activation")
    attr, algorithm = _ACTIVATIONS[activation]

    def linear(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if not _has_onednn(weight.dtype):
            plain = F.linear(x, weight, bias)
            plain = plain if activation is None else ACTIVATIONS[activation](plain)
            return plain if residual is None else plain + residual
        product = torch.ops.mkldnn._linear_pointwise
        y: torch.Tensor = product(x, weight, bias, attr, [], algorithm)
        return y if residual is None else y.add_(residual)

    return linear


@cache
def _has_onednn(dtype: torch.dtype) -> bool:
    """Whether oneDNN computes linear layers of `dtype` on this processor: tried, because torch does not say."""
    try:
        one = torch.ones(1, 16, dtype=dtype)
        torch.ops.mkldnn._linear_pointwise(one, one, None, "none", [], "")
    except (AttributeError, RuntimeError):  # torch without oneDNN; a dtype or processor that it does not know
        return False
    return True
