"""Exchange between the ranks of a tensor-parallel group. What travels on the wire is the runtime's business."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..spec import TensorSpec, normal_axis
from .registry import Attrs, Op, ReferenceContext, Signature, register


def _all_gather(sig: Signature) -> tuple[TensorSpec, ...]:
    x, world = sig[0], sig.attr("tp_size")
    axis = normal_axis(sig.attr("axis"), x.rank)
    sig.require(0 <= axis < x.rank, f"axis {sig.attr('axis')} is outside of {x}")
    size = x.shape[axis]
    sig.require(isinstance(size, int), f"axis {axis} of {x} is not a known size")
    assert isinstance(size, int)
    return (x.with_shape((*x.shape[:axis], size * world, *x.shape[axis + 1 :])),)


def _all_reduce(sig: Signature) -> tuple[TensorSpec, ...]:
    sig.attr("tp_size")
    return (sig[0],)


def _all_reduce_reference(ctx: ReferenceContext, attrs: Attrs, x: torch.Tensor) -> torch.Tensor:
    assert ctx.communicator is not None, "all_reduce needs a communicator in the context"
    result: torch.Tensor = ctx.communicator.all_reduce(x)
    return result


def _all_gather_reference(ctx: ReferenceContext, attrs: Attrs, x: torch.Tensor) -> torch.Tensor:
    assert ctx.communicator is not None, "all_gather needs a communicator in the context"
    result: torch.Tensor = ctx.communicator.all_gather(x, attrs["axis"])
    return result


def _sum_flops(sig: Signature, outputs: tuple[TensorSpec, ...], sizes: Mapping[str, int]) -> int:
    return outputs[0].numel(sizes) * (int(sig.attr("tp_size")) - 1)


ALL_REDUCE = register(Op("all_reduce", _all_reduce, _all_reduce_reference, _sum_flops))
"""`all_reduce(x; tp_size)`: the sum over the ranks, on every rank."""
ALL_GATHER = register(Op("all_gather", _all_gather, _all_gather_reference))
"""`all_gather(x; axis, tp_size)`: the ranks' parts, in rank order along `axis`, on every rank."""
