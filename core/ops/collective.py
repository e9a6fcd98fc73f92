"""Exchange between the ranks of a tensor-parallel group. What travels on the wire is the runtime's business."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..spec import TensorSpec, normal_axis
from .norm import NORM_FLOPS, NORMS, check_affine
from .registry import Attrs, Op, ReferenceContext, Signature, register


def _all_gather(sig: Signature) -> tuple[TensorSpec, ...]:
    x, world = sig[0], sig.integer("tp_size")
    axis = normal_axis(sig.integer("axis"), x.rank)
    sig.require(0 <= axis < x.rank, f"axis {sig.attr('axis')} is outside of {x}")
    size = x.shape[axis]
    sig.require(isinstance(size, int), f"axis {axis} of {x} is not a known size")
    assert isinstance(size, int)
    return (x.with_shape((*x.shape[:axis], size * world, *x.shape[axis + 1 :])),)


def _all_reduce(sig: Signature) -> tuple[TensorSpec, ...]:
    sig.integer("tp_size")
    return (sig[0],)


def _all_reduce_reference(ctx: ReferenceContext, attrs: Attrs, x: torch.Tensor) -> torch.Tensor:
    assert ctx.communicator is not None, "all_reduce needs a communicator in the context"
    result: torch.Tensor = ctx.communicator.all_reduce(x)
    return result


def _all_reduce_norm(sig: Signature) -> tuple[TensorSpec, ...]:
    sig.integer("tp_size")
    sig.attr("norm", *NORMS)
    residual = sig.get(1)
    sig.require(residual in (None, sig[0]), f"input {sig[0]} and residual {residual} differ")
    check_affine(sig, 2)
    return (sig[0], sig[0])


def _all_reduce_norm_reference(
    ctx: ReferenceContext,
    attrs: Attrs,
    x: torch.Tensor,
    residual: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    total = _all_reduce_reference(ctx, attrs, x)
    if residual is not None:
        total = total + residual
    return total, NORMS[attrs["norm"]](total, weight, bias, attrs["eps"])


def _all_gather_reference(ctx: ReferenceContext, attrs: Attrs, x: torch.Tensor) -> torch.Tensor:
    assert ctx.communicator is not None, "all_gather needs a communicator in the context"
    result: torch.Tensor = ctx.communicator.all_gather(x, attrs["axis"])
    return result


def _sum_flops(sig: Signature, outputs: tuple[TensorSpec, ...], sizes: Mapping[str, int]) -> int:
    return outputs[0].numel(sizes) * (sig.integer("tp_size") - 1)


def _sum_norm_flops(sig: Signature, outputs: tuple[TensorSpec, ...], sizes: Mapping[str, int]) -> int:
    added = 0 if sig.get(1) is None else outputs[0].numel(sizes)
    return _sum_flops(sig, outputs, sizes) + added + NORM_FLOPS * outputs[0].numel(sizes)


ALL_REDUCE = register(Op("all_reduce", _all_reduce, _all_reduce_reference, _sum_flops, attrs=("tp_size",)))
"""`all_reduce(x; tp_size)`: the sum over the ranks, on every rank."""
ALL_REDUCE_NORM = register(
    Op(
        "all_reduce_norm",
        _all_reduce_norm,
        _all_reduce_norm_reference,
        _sum_norm_flops,
        attrs=("tp_size", "norm", "eps"),
    )
)
"""`all_reduce_norm(x, residual?, weight?, bias?; tp_size, norm, eps)` -> (the sum over the ranks + residual, its norm).

norm: layer or rms.
"""
ALL_GATHER = register(Op("all_gather", _all_gather, _all_gather_reference, attrs=("axis", "tp_size")))
"""`all_gather(x; axis, tp_size)`: the ranks' parts, in rank order along `axis`, on every rank."""
