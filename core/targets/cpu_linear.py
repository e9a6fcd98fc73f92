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

from ...kernels import cpu_step
from ..graph import Node
from ..ops.elementwise import ACTIVATIONS
from ..ops.quantized import ACTIVATIONS as ROUNDED_ACTIVATIONS
from ..ops.quantized import rounded_rows
from ..passes.fuse import POSITIONS, RESIDUAL
from ..quantize.integers import dequantize

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


def bucket(rows: int) -> int:
    """The number of rows that a product of `rows` rows is computed with: at most an eighth more.

    oneDNN generates code for every shape and keeps it: a server whose steps have any number of tokens would grow by hundreds of
    megabytes. There are eight buckets from one power of two to the next.
    """
    step = 1 << max(0, rows.bit_length() - 4)
    return -(-rows // step) * step


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
        spare = bucket(len(x)) - len(x)
        y: torch.Tensor = product(
            F.pad(x, (0, 0, 0, spare)) if spare else x, weight, bias, attr, [], algorithm
        )
        y = y[: len(x)]
        return y if residual is None else y.add_(residual)

    return linear


def quantized_linear_kernel(node: Node) -> Callable[..., torch.Tensor]:
    """The implementation of the quantized_linear node `node`: activation(x W^T + bias) + residual, W from integers.

    int8 rows with one scale each are multiplied as the integers they are, by activations in int8 with a step for every 64
    columns of a token. Other formats, and all where there are no compiled kernels or no VNNI, are dequantized first.
    """
    plain = linear_kernel(node)
    kind = cpu_step.ACTIVATION_KINDS.get(node.attrs.get("activation"))

    def linear(
        x: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor,
        zero: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if ROUNDED_ACTIVATIONS in node.attrs:
            x = rounded_rows(x)
        rows = weight.dtype is torch.int8 and scale.dim() == 1 and zero is None
        if kind is None or not rows or not cpu_step.has_int8():
            return plain(x, dequantize(weight, scale, zero), bias, residual)
        return _integer_linear(kind, x, weight, scale, bias, residual)

    return linear


def _integer_linear(
    kind: int,
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    source, factor = x.float().contiguous(), scale.float().contiguous()
    added = None if bias is None else bias.float().contiguous()
    carried = None if residual is None else residual.float().contiguous()
    (tokens, k), n, rows = x.shape, len(weight), weight.contiguous()
    groups = -(-k // cpu_step.INT8_GROUP)
    y = torch.empty(tokens, n)
    narrow = torch.empty(tokens, groups * cpu_step.INT8_GROUP, dtype=torch.int8)
    steps, starts = torch.empty(tokens, groups), torch.empty(tokens, groups, dtype=torch.int32)
    layer = cpu_step.Int8Layer(
        tokens=tokens, n=n, k=k, kind=kind, x=source.data_ptr(), scale=factor.data_ptr(),
        bias=None if added is None else added.data_ptr(), residual=None if carried is None else carried.data_ptr(),
        w=rows.data_ptr(), y=y.data_ptr(), narrow=narrow.data_ptr(), steps=steps.data_ptr(), starts=starts.data_ptr(),
    )  # fmt: skip
    cpu_step.int8_layer(layer, torch.get_num_threads())
    return y.to(x.dtype)


@cache
def _has_onednn(dtype: torch.dtype) -> bool:
    """Whether oneDNN computes linear layers of `dtype` on this processor: tried, because torch does not say."""
    try:
        one = torch.ones(1, 16, dtype=dtype)
        torch.ops.mkldnn._linear_pointwise(one, one, None, "none", [], "")
    except (AttributeError, RuntimeError):  # torch without oneDNN; a dtype or processor that it does not know
        return False
    return True
