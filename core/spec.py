"""Tensor types of a graph: an element type and a shape whose sizes may be symbols."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .dtypes import DType

Dim = int | str
"""A size: a number, or the name of a size known only at run time (`T` tokens, `B` sequences, ...)."""


@dataclass(frozen=True)
class TensorSpec:
    """The type of a tensor: dtype and shape."""

    dtype: DType
    shape: tuple[Dim, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"

    @property
    def rank(self) -> int:
        return len(self.shape)

    def with_shape(self, shape: Sequence[Dim]) -> TensorSpec:
        return TensorSpec(self.dtype, tuple(shape))

    def numel(self, sizes: Mapping[str, int] | None = None) -> int:
        """Number of elements; `sizes` gives the symbols their values (KeyError for one it lacks)."""
        return math.prod(d if isinstance(d, int) else (sizes or {})[d] for d in self.shape)

    def nbytes(self, sizes: Mapping[str, int] | None = None) -> int:
        return self.numel(sizes) * self.dtype.itemsize

    def to_json(self) -> list[Any]:
        return [self.dtype.value, list(self.shape)]

    @classmethod
    def from_json(cls, data: Sequence[Any]) -> TensorSpec:
        dtype, shape = data
        return cls(DType(dtype), tuple(shape))


def normal_axis(axis: int, rank: int) -> int:
    """`axis` counted from the front; negative axes count from the back."""
    return axis + rank if axis < 0 else axis
