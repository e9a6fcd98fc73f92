"""Element-wise ops: activation functions, sums, products, casts."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..dtypes import DType, to_torch
from ..spec import TensorSpec
from .registry import Attrs, Op, ReferenceContext, Signature, no_flops, register

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}
"""Activation functions by name; `gelu` is exact (erf), `gelu_tanh` the approximation of arXiv:1606.08415."""


def _same(sig: Signature) -> tuple[TensorSpec, ...]:
    return (sig[0],)


def _activation(sig: Signature) -> tuple[TensorSpec, ...]:
    sig.attr("kind", *ACTIVATIONS)
    return _same(sig)


def _binary(sig: Signature) -> tuple[TensorSpec, ...]:
    a, b = sig[0], sig[1]
    sig.require(a.dtype == b.dtype, f"dtypes differ: {a} and {b}")
    fits = a.shape == b.shape or b.shape == a.shape[-1:]
    sig.require(fits, f"shapes differ: {a} and {b} (the second may be a vector over the last axis)")
    return (a,)


def _cast(sig: Signature) -> tuple[TensorSpec, ...]:
    return (TensorSpec(DType(sig.attr("dtype", *DType)), sig[0].shape),)


def _activation_reference(_: ReferenceContext, attrs: Attrs, x: torch.Tensor) -> torch.Tensor:
    return ACTIVATIONS[attrs["kind"]](x)


def _cast_reference(_: ReferenceContext, attrs: Attrs, x: torch.Tensor) -> torch.Tensor:
    dtype = DType(attrs["dtype"])
    if x.dtype == torch.float64 and dtype.is_float:
        return x  # an oracle's run in float64 stays one to the end
    return x.to(to_torch(dtype))


ACTIVATION = register(Op("activation", _activation, _activation_reference, attrs=("kind",)))
ADD = register(Op("add", _binary, lambda ctx, attrs, a, b: a + b, attrs=()))
MUL = register(Op("mul", _binary, lambda ctx, attrs, a, b: a * b, attrs=()))
CAST = register(Op("cast", _cast, _cast_reference, no_flops, attrs=("dtype",)))
