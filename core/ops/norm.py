"""Normalizations, alone and fused with the residual sum before them.

Statistics are kept in float32 whatever the dtype of the tensors.
Sources: layer norm arXiv:1607.06450, RMS norm arXiv:1910.07467.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from ..spec import TensorSpec
from .registry import Attrs, Op, ReferenceContext, Signature, register, widen

Norm = Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor | None, float], torch.Tensor]


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    wide = widen(x)
    normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    normed = normed if weight is None else normed * weight
    return normed if bias is None else normed + bias


NORMS: Mapping[str, Norm] = {"layer": layer_norm, "rms": rms_norm}
"""By the names that ops with a norm inside have for them."""
NORM_FLOPS = 8
"""An element: mean, variance, scale and shift, about."""


def check_affine(sig: Signature, first: int) -> None:
    """Inputs `first` and the next: weight and bias of a norm, each optional. Attribute: eps."""
    x = sig[0]
    sig.number("eps")
    for index, what in ((first, "weight"), (first + 1, "bias")):
        spec = sig.get(index)
        if spec is not None:
            sig.require(spec.shape == x.shape[-1:], f"{what} {spec} does not fit input {x}")
            sig.require(spec.dtype == x.dtype, f"dtypes differ: {what} {spec}, input {x}")


def _infer(sig: Signature) -> tuple[TensorSpec, ...]:
    check_affine(sig, 1)
    return (sig[0],)


def _infer_add(sig: Signature) -> tuple[TensorSpec, ...]:
    sig.require(sig[0] == sig[1], f"input {sig[0]} and residual {sig[1]} differ")
    check_affine(sig, 2)
    return (sig[0], sig[0])


def _flops(sig: Signature, outputs: tuple[TensorSpec, ...], sizes: Mapping[str, int]) -> int:
    return NORM_FLOPS * outputs[-1].numel(sizes)


def _plain(norm: Norm) -> Callable[..., Any]:
    def reference(
        _: ReferenceContext,
        attrs: Attrs,
        x: torch.Tensor,
        weight: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return norm(x, weight, bias, attrs["eps"])

    return reference


def _after_add(norm: Norm) -> Callable[..., Any]:
    def reference(
        _: ReferenceContext,
        attrs: Attrs,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total = x + residual
        return total, norm(total, weight, bias, attrs["eps"])

    return reference


LAYER_NORM = register(Op("layer_norm", _infer, _plain(layer_norm), _flops, attrs=("eps",)))
RMS_NORM = register(Op("rms_norm", _infer, _plain(rms_norm), _flops, attrs=("eps",)))
ADD_LAYER_NORM = register(Op("add_layer_norm", _infer_add, _after_add(layer_norm), _flops, attrs=("eps",)))
"""`add_layer_norm(x, residual, weight?, bias?; eps)` -> (x + residual, its layer norm)."""
ADD_RMS_NORM = register(Op("add_rms_norm", _infer_add, _after_add(rms_norm), _flops, attrs=("eps",)))
