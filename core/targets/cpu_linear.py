"""Linear layers on the CPU through oneDNN, which torch carries.

`F.linear` sends float32 to MKL, whose matrix-vector product runs on one thread and whose small products are slow on some
processors. oneDNN reads the weight as it lies in the engine - mapped, neither packed nor copied - with all threads, at the
memory's speed, and takes bias, activation and residual along.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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


FEW_TOKENS = 12
"""In decode steps of so many tokens, activations in 16 bits cost no more than those in int8, for which weights are put in order
first: with one token a third of the time, with 12 nine tenths, with 64 twice as much."""


class QuantizedLinear:
    """Kernels of quantized_linear nodes: activation(x W^T + bias) + residual, W from integers.

    int8 rows with one scale each are multiplied as the integers they are: in decode steps of few tokens by activations in
    16 bits, as compiled steps do, in others by activations in int8 with a step for every 64 columns of a row. Other formats,
    and all that this processor has no kernel for, are dequantized first.
    """

    def __init__(self) -> None:
        self._wide = False

    def begin_step(self, tokens: int, *, decoding: bool) -> None:
        """decoding: whether the step is one that `DecodeLimits` allow. Other short ones are chunks of prompts, which must give
        what longer chunks do."""
        self._wide = decoding and tokens <= FEW_TOKENS

    def kernel(self, node: Node) -> Callable[..., torch.Tensor]:
        """The implementation of `node`; x may have any number of axes before its last."""
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
            runs = cpu_step.library() is not None if self._wide else cpu_step.has_int8()
            rows = weight.dtype is torch.int8 and scale.dim() == 1 and zero is None
            if kind is None or not rows or not runs:
                return plain(x, dequantize(weight, scale, zero), bias, residual)
            floats = {"x": x, "scale": scale, "bias": bias, "residual": residual}
            operands = {name: part.float().contiguous() for name, part in floats.items() if part is not None}
            operands |= {"w": weight.contiguous(), "y": torch.empty(*x.shape[:-1], len(weight))}
            (_multiply_wide if self._wide else _multiply_narrow)(kind, operands)
            return operands["y"].to(x.dtype)

        return linear


def _multiply_wide(kind: int, operands: Mapping[str, torch.Tensor]) -> None:
    """One layer of a compiled step by itself, activations in 16 bits. operands: those of `Instruction`."""
    n, k = operands["w"].shape
    count, widest, threads = operands["y"].numel() // n, -(-k // 32) * 32, torch.get_num_threads()
    narrow = torch.empty(threads, count, widest, dtype=torch.int16)
    kinds = {"op": cpu_step.Op.LINEAR, "kind": kind, "wtype": cpu_step.WEIGHT_TYPES["int8"]}
    layer = cpu_step.Instruction(**kinds, n=n, k=k, ldx=k, **_pointers(operands))
    step = cpu_step.Step(tokens=count, narrow=narrow.data_ptr(), narrow_k=widest)
    cpu_step.run((cpu_step.Instruction * 1)(layer), step, threads)


def _multiply_narrow(kind: int, operands: Mapping[str, torch.Tensor]) -> None:
    """Activations in int8. operands: those of `Int8Layer`."""
    n, k = operands["w"].shape
    count, groups = operands["y"].numel() // n, -(-k // cpu_step.INT8_GROUP)
    scratch = {
        "narrow": torch.empty(count, groups * cpu_step.INT8_GROUP, dtype=torch.int8),
        "steps": torch.empty(count, groups),
        "starts": torch.empty(count, groups, dtype=torch.int32),
    }
    layer = cpu_step.Int8Layer(tokens=count, n=n, k=k, kind=kind, **_pointers({**operands, **scratch}))
    cpu_step.int8_layer(layer, torch.get_num_threads())


def _pointers(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in tensors.items()}


@cache
def _has_onednn(dtype: torch.dtype) -> bool:
    """Whether oneDNN computes linear layers of `dtype` on this processor: tried, because torch does not say."""
    try:
        one = torch.ones(1, 16, dtype=dtype)
        torch.ops.mkldnn._linear_pointwise(one, one, None, "none", [], "")
    except (AttributeError, RuntimeError):  # torch without oneDNN; a dtype or processor that it does not know
        return False
    return True
