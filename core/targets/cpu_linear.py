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

    int8 rows with one scale each are multiplied as the integers they are, by activations of 16 bits a token as in the compiled
    step. Other formats, and all where there are no compiled kernels, are dequantized first.
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
        rows = weight.dtype is torch.int8 and scale.dim() == 1 and zero is None
        if kind is None or not rows or not _has_integers():
            return plain(x, dequantize(weight, scale, zero), bias, residual)
        return _integer_linear(kind, x, weight, scale, bias, residual)

    return linear


_TOKENS = 256
"""Tokens that are multiplied at a time, so that their sums stay in the processor's cache until they are results."""


def _integer_linear(
    kind: int,
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """Every activation is two int8 parts, so that oneDNN's product of int8 by int8, whose sums are exact, keeps 16 bits."""
    (n, k), threads = weight.shape, torch.get_num_threads()
    source, factor, y = x.float().contiguous(), scale.float().contiguous(), torch.empty(len(x), n)
    added = None if bias is None else bias.float().contiguous()
    carried = None if residual is None else residual.float().contiguous()
    for begin in range(0, len(x), _TOKENS):
        count = min(_TOKENS, len(x) - begin)
        layer = cpu_step.Instruction(
            kind=kind, n=n, k=k, x=source.data_ptr() + 4 * begin * k, scale=factor.data_ptr(),
            bias=None if added is None else added.data_ptr(),
            residual=None if carried is None else carried.data_ptr() + 4 * begin * n, y=y.data_ptr() + 4 * begin * n,
        )  # fmt: skip
        parts, steps = torch.empty(bucket(2 * count), k, dtype=torch.int8), torch.empty(count)
        cpu_step.split(layer, count, parts.data_ptr(), steps.data_ptr(), threads)
        sums = torch._int_mm(parts, weight.t())
        cpu_step.join(layer, count, sums.data_ptr(), steps.data_ptr(), threads)
    return y.to(x.dtype)


@cache
def _has_integers() -> bool:
    """Whether oneDNN multiplies int8 by int8 exactly here: without VNNI, sums of two products saturate."""
    if cpu_step.library() is None:
        return False
    try:
        large = torch.full((2, 64), 127, dtype=torch.int8)
        return bool((torch._int_mm(large, large.t()) == 64 * 127 * 127).all())
    except (AttributeError, RuntimeError):
        return False


@cache
def _has_onednn(dtype: torch.dtype) -> bool:
    """Whether oneDNN computes linear layers of `dtype` on this processor: tried, because torch does not say."""
    try:
        one = torch.ones(1, 16, dtype=dtype)
        torch.ops.mkldnn._linear_pointwise(one, one, None, "none", [], "")
    except (AttributeError, RuntimeError):  # torch without oneDNN; a dtype or processor that it does not know
        return False
    return True
