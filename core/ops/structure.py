"""Ops that move elements and compute nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from math import prod

import torch

from ..dtypes import DType
from ..spec import TensorSpec, normal_axis
from .registry import Attrs, Op, ReferenceContext, Signature, no_flops, register


def _axis(sig: Signature) -> int:
    rank = sig[0].rank
    axis = normal_axis(sig.integer("axis"), rank)
    sig.require(0 <= axis < rank, f"axis {sig.attr('axis')} is outside of {sig[0]}")
    return axis


def _reshape(sig: Signature) -> tuple[TensorSpec, ...]:
    shape = sig.dims("shape")
    old = sig[0].shape
    same = prod(d for d in old if isinstance(d, int)) == prod(d for d in shape if isinstance(d, int))
    same &= Counter(d for d in old if isinstance(d, str)) == Counter(d for d in shape if isinstance(d, str))
    sig.require(same, f"{sig[0]} has another number of elements than shape {list(shape)}")
    sig.require(sum(isinstance(d, str) for d in shape) <= 1, f"shape {list(shape)} has more than one symbol")
    return (sig[0].with_shape(shape),)


def _concat(sig: Signature) -> tuple[TensorSpec, ...]:
    axis = _axis(sig)
    parts = [sig[i] for i in range(len(sig.inputs))]
    total = 0
    for part in parts:
        size = part.shape[axis] if part.rank == parts[0].rank else None
        rest_fits = size is not None and part.with_shape(
            (*part.shape[:axis], *part.shape[axis + 1 :])
        ) == parts[0].with_shape((*parts[0].shape[:axis], *parts[0].shape[axis + 1 :]))
        sig.require(rest_fits, f"{part} does not fit {parts[0]} along axis {axis}")
        sig.require(isinstance(size, int), f"axis {axis} of {part} is not a known size")
        assert isinstance(size, int)
        total += size
    return (parts[0].with_shape((*parts[0].shape[:axis], total, *parts[0].shape[axis + 1 :])),)


def _split(sig: Signature) -> tuple[TensorSpec, ...]:
    axis, sizes, shape = _axis(sig), sig.dims("sizes"), sig[0].shape
    known = [size for size in sizes if isinstance(size, int)]
    sig.require(
        len(known) == len(sizes) and sum(known) == shape[axis],
        f"sizes {sizes} do not add up to axis {axis} of {sig[0]}",
    )
    return tuple(sig[0].with_shape((*shape[:axis], size, *shape[axis + 1 :])) for size in sizes)


def _slice(sig: Signature) -> tuple[TensorSpec, ...]:
    axis, start, stop = _axis(sig), sig.integer("start"), sig.integer("stop")
    size = sig[0].shape[axis]
    inside = isinstance(size, int) and 0 <= start < stop <= size
    sig.require(inside, f"[{start}:{stop}] is outside of axis {axis} of {sig[0]}")
    return (sig[0].with_shape((*sig[0].shape[:axis], stop - start, *sig[0].shape[axis + 1 :])),)


def _transpose(sig: Signature) -> tuple[TensorSpec, ...]:
    sig.require(sig[0].rank == 2, f"{sig[0]} is not a matrix")
    return (sig[0].with_shape(sig[0].shape[::-1]),)


def _select_rows(sig: Signature) -> tuple[TensorSpec, ...]:
    x, index = sig[0], sig[1]
    sig.require(index.rank == 1 and index.dtype == DType.INT32, f"index {index} is not int32[rows]")
    return (x.with_shape((index.shape[0], *x.shape[1:])),)


def _reshape_reference(_: ReferenceContext, attrs: Attrs, x: torch.Tensor) -> torch.Tensor:
    return x.reshape([-1 if isinstance(d, str) else d for d in attrs["shape"]])


def _slice_reference(_: ReferenceContext, attrs: Attrs, x: torch.Tensor) -> torch.Tensor:
    return x.narrow(attrs["axis"], attrs["start"], attrs["stop"] - attrs["start"])


def _moves_nothing(_: Signature, outputs: tuple[TensorSpec, ...], sizes: Mapping[str, int]) -> int:
    return 0  # a view


def _moves_output(_: Signature, outputs: tuple[TensorSpec, ...], sizes: Mapping[str, int]) -> int:
    return 2 * outputs[0].nbytes(sizes)


RESHAPE = register(Op("reshape", _reshape, _reshape_reference, no_flops, _moves_nothing, attrs=("shape",)))
CONCAT = register(
    Op("concat", _concat, lambda ctx, attrs, *xs: torch.cat(xs, attrs["axis"]), no_flops, attrs=("axis",))
)
SPLIT = register(
    Op(
        "split",
        _split,
        lambda ctx, attrs, x: torch.split(x, list(attrs["sizes"]), attrs["axis"]),
        no_flops,
        _moves_nothing,
        attrs=("axis", "sizes"),
    )
)
SLICE = register(
    Op("slice", _slice, _slice_reference, no_flops, _moves_nothing, attrs=("axis", "start", "stop"))
)
TRANSPOSE = register(
    Op("transpose", _transpose, lambda ctx, attrs, x: x.t(), no_flops, _moves_nothing, attrs=())
)
SELECT_ROWS = register(
    Op(
        "select_rows",
        _select_rows,
        lambda ctx, attrs, x, index: x.index_select(0, index),
        no_flops,
        _moves_output,
        attrs=(),
    )
)
"""`select_rows(x[T, ...], index[R])` -> [R, ...]: the rows whose logits are wanted, before the head is applied."""
