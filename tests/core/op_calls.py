"""What tests of ops share: types, and calls of an op by its name, with arrays of numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from trtc.core.dtypes import DType
from trtc.core.ops import Cost, ReferenceContext, Signature, get_op
from trtc.core.spec import Dim, TensorSpec
from trtc.tests.tolerances import OP_FLOAT64_ABS, max_error

Array = npt.NDArray[np.float64]
F32, I32 = DType.FLOAT32, DType.INT32
SIZES = {"T": 5, "B": 2, "B+1": 3, "P": 4, "R": 2, "C": 7}


def f32(*shape: Dim) -> TensorSpec:
    return TensorSpec(F32, shape)


def i32(*shape: Dim) -> TensorSpec:
    return TensorSpec(I32, shape)


def int8(*shape: int) -> TensorSpec:
    return TensorSpec(DType.INT8, shape)


def uint8(*shape: int) -> TensorSpec:
    return TensorSpec(DType.UINT8, shape)


def infer(op: str, *inputs: TensorSpec | None, **attrs: Any) -> tuple[TensorSpec, ...]:
    return get_op(op).infer(Signature(op, "n", inputs, attrs))


def cost(op: str, *inputs: TensorSpec | None, **attrs: Any) -> Cost:
    signature = Signature(op, "n", inputs, attrs)
    return get_op(op).cost(signature, get_op(op).infer(signature), SIZES)


def run(op: str, *inputs: Array | npt.NDArray[Any] | None, context: Any = None, **attrs: Any) -> Any:
    tensors = [None if x is None else torch.from_numpy(np.ascontiguousarray(x)) for x in inputs]
    return get_op(op).reference(context or ReferenceContext(), attrs, *tensors)


def values(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape)


def close(result: Any, expected: Any) -> bool:
    return max_error(result, expected) <= OP_FLOAT64_ABS
