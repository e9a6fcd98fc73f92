"""Nodes without inputs: what the runtime feeds a graph with, and weights."""

from __future__ import annotations

from typing import Any, NoReturn

from ..dtypes import DType
from ..spec import TensorSpec
from .registry import Attrs, Op, ReferenceContext, Signature, no_flops, register


def _infer(sig: Signature) -> tuple[TensorSpec, ...]:
    return (TensorSpec(DType(sig.attr("dtype", *DType)), sig.dims("shape")),)


def _reference(_: ReferenceContext, attrs: Attrs, *inputs: Any) -> NoReturn:
    raise AssertionError("inputs and weights are bound by the interpreter, not computed")


INPUT = register(Op("input", _infer, _reference, no_flops, no_flops, attrs=("dtype", "shape")))
WEIGHT = register(
    Op("weight", _infer, _reference, no_flops, no_flops, attrs=("dtype", "shape", "shard", "unit", "head"))
)
