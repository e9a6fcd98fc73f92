"""A network definition under construction: names, checks, and the memory that TensorRT points to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...dtypes import DType, from_torch
from .build_log import build_log
from .flavour import Flavour

ITensor = Any
"""`tensorrt.ITensor`; the bindings have no stubs."""
ILayer = Any

_DATA_TYPES = {
    DType.FLOAT32: "FLOAT",
    DType.FLOAT16: "HALF",
    DType.BFLOAT16: "BF16",
    DType.FLOAT8_E4M3: "FP8",
    DType.INT64: "INT64",
    DType.INT32: "INT32",
    DType.INT8: "INT8",
    DType.UINT8: "UINT8",
    DType.BOOL: "BOOL",
}


class Network:
    """A strongly typed `INetworkDefinition` and what must live as long as it: builder, log and constants' memory.

    `definition` is TensorRT's object; layers are added there and go through `output`, which names and checks them.
    """

    def __init__(self, flavour: Flavour) -> None:
        trt = flavour.trt
        self.flavour, self.trt = flavour, trt
        self.log = build_log(trt)
        self.builder = trt.Builder(self.log.logger)
        self.definition = self.builder.create_network(
            1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        )
        self.plugins: dict[str, None] = {}
        """Ops whose layers are plugins, in order."""
        self._kept: list[torch.Tensor] = []
        self._vectors: dict[tuple[DType, tuple[float, ...], int], ITensor] = {}

    def data_type(self, dtype: DType) -> Any:
        """TensorRT's name of `dtype`."""
        return getattr(self.trt.DataType, _DATA_TYPES[dtype])

    def input(self, name: str, dtype: DType, shape: Sequence[int]) -> ITensor:
        """A network input; -1 is a size known at run time."""
        return self.definition.add_input(name, self.data_type(dtype), tuple(shape))

    def mark_output(self, tensor: ITensor) -> None:
        self.definition.mark_output(tensor)

    def output(self, layer: ILayer, name: str) -> ITensor:
        """The output of a layer just added; layer and tensor get the name `name`.

        Raises BuildError, with TensorRT's reason, when the layer's inputs or options do not fit.
        """
        if layer is None:
            raise self.log.error(f"{self.flavour}: layer '{name}' cannot be added")
        layer.name = name
        tensor = layer.get_output(0)
        tensor.name = name
        try:
            tuple(tensor.shape)  # TensorRT checks a layer when somebody asks for the shape of its output
        except RuntimeError:
            raise self.log.error(f"{self.flavour}: layer '{name}' is not valid") from None
        return tensor

    def constant(self, name: str, value: torch.Tensor, shape: Sequence[int] | None = None) -> ITensor:
        """A constant with the values of `value` (any strides, any torch dtype that a graph uses)."""
        value = value.detach().contiguous()
        self._kept.append(value)
        weights = self.trt.Weights(self.data_type(from_torch(value.dtype)), value.data_ptr(), value.numel())
        return self.output(
            self.definition.add_constant(tuple(value.shape if shape is None else shape), weights), name
        )

    def int4_constant(self, name: str, packed: torch.Tensor) -> ITensor:
        """[rows, columns] of four-bit integers, two a byte in `packed`, uint8 [rows, columns / 2]."""
        packed = packed.contiguous()
        self._kept.append(packed)
        shape = (packed.shape[0], 2 * packed.shape[1])
        weights = self.trt.Weights(self.trt.DataType.INT4, packed.data_ptr(), shape[0] * shape[1])
        return self.output(self.definition.add_constant(shape, weights), name)

    def vector(self, dtype: DType, values: Sequence[float], rank: int = 1) -> ITensor:
        """A small constant of shape [1, ..., len(values)]; equal ones are the same tensor."""
        key = (dtype, tuple(values), rank)
        if key not in self._vectors:
            value = torch.tensor(values, dtype=getattr(torch, dtype.value))
            shape = [1] * (rank - 1) + [len(values)]
            self._vectors[key] = self.constant(f"constant.{len(self._vectors)}", value, shape)
        return self._vectors[key]

    def cast(self, x: ITensor, dtype: DType, name: str) -> ITensor:
        return self.output(self.definition.add_cast(x, self.data_type(dtype)), name)

    def binary(self, operation: str, a: ITensor, b: ITensor, name: str) -> ITensor:
        """Element-wise `a operation b`; sizes of 1 are stretched."""
        kind = getattr(self.trt.ElementWiseOperation, operation)
        return self.output(self.definition.add_elementwise(a, b, kind), name)

    def unary(self, operation: str, x: ITensor, name: str) -> ITensor:
        return self.output(self.definition.add_unary(x, getattr(self.trt.UnaryOperation, operation)), name)

    def activation(self, kind: str, x: ITensor, name: str) -> ITensor:
        return self.output(self.definition.add_activation(x, getattr(self.trt.ActivationType, kind)), name)

    def reshape(self, x: ITensor, shape: Sequence[int], name: str) -> ITensor:
        """`x` with a shape in which one size may be -1."""
        layer = self.definition.add_shuffle(x)
        layer.reshape_dims = tuple(shape)
        return self.output(layer, name)

    def transpose(self, x: ITensor, order: Sequence[int], name: str) -> ITensor:
        layer = self.definition.add_shuffle(x)
        layer.first_transpose = self.trt.Permutation(list(order))
        return self.output(layer, name)

    def slice(self, x: ITensor, axis: int, start: int, size: int, name: str) -> ITensor:
        """Elements start:start + size of one axis; the others stay whole, whatever their sizes at run time."""
        layer = self.definition.add_slice(x, (start,), (size,), (1,))
        layer.axes = (axis,)
        return self.output(layer, name)

    def gather(self, table: ITensor, index: ITensor, name: str) -> ITensor:
        """Rows `index` of `table`."""
        return self.output(self.definition.add_gather(table, index, 0), name)

    def concat(self, parts: Sequence[ITensor], axis: int, name: str) -> ITensor:
        layer = self.definition.add_concatenation(list(parts))
        layer.axis = axis
        return self.output(layer, name)

    def matmul(self, a: ITensor, b: ITensor, name: str, *, transpose_b: bool = False) -> ITensor:
        op = self.trt.MatrixOperation
        second = op.TRANSPOSE if transpose_b else op.NONE
        return self.output(self.definition.add_matrix_multiply(a, op.NONE, b, second), name)
