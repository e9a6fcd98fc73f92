"""Random weights that are integers from the start, for measurements without a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from ..dtypes import to_torch
from ..weight_source import BLOCK_BYTES, DUMMY_STD, DummyWeights, dummy_generator
from .integers import Quantized
from .scheme import QuantizeOptions, WeightFormat
from .source import QuantizedWeights

_FP8_DEVIATION = 100.0
"""Of e4m3 numbers of random bits, about: most are small."""


class DummyQuantizedWeights(QuantizedWeights):
    """Uniformly random integers, and scales that give weights a standard deviation of about 0.02.

    No float weight is made on the way: bytes are drawn block of rows by block of rows. They depend on the seed, the name of the
    weight and the row only, so that the shards of any tp_size are parts of one model.
    """

    def __init__(self, floats: DummyWeights, options: QuantizeOptions) -> None:
        super().__init__(floats, options.choose(floats.weights(), "dummy"))
        self._seed = floats.seed

    def _quantized(self, name: str, rows: tuple[int, int] | None) -> Iterator[tuple[int, Quantized]]:
        size, columns = self._source.weight(name).shape
        how = self.quantization.format
        dtype = to_torch(self._source.dtype(0, name))
        padded = self._source.padded_rows(name)
        first, last = rows or (0, padded)
        step = max(1, BLOCK_BYTES * how.per_byte // columns)
        for start in range(first - first % step, min(last, size), step):
            count = min(step, size - start)
            yield start, _random(how, count, columns, dtype, dummy_generator(self._seed, name, start))
        if last > size:
            yield size, _zeros(how, padded - size, columns, dtype)


def _random(
    how: WeightFormat, rows: int, columns: int, dtype: torch.dtype, generator: torch.Generator
) -> Quantized:
    width = columns // how.per_byte
    words = torch.empty(-(-rows * width // 8), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    drawn = words.view(torch.uint8)[: rows * width].view(rows, width)
    if how.stored.is_float:
        drawn[(drawn & 127) == 127] -= 1  # NaN
        integers, deviation = drawn.view(to_torch(how.stored)), _FP8_DEVIATION
    else:
        integers = drawn if how.per_byte == 2 else drawn.view(torch.int8).clamp_(min=-how.largest)
        deviation = how.largest / math.sqrt(3)  # of numbers that are uniform from -largest to largest
    scale = torch.rand(_scales(how, rows, columns), generator=generator) + 0.5
    return Quantized(integers, (scale * (DUMMY_STD / deviation)).to(dtype))


def _zeros(how: WeightFormat, rows: int, columns: int, dtype: torch.dtype) -> Quantized:
    integers = torch.zeros(rows, columns // how.per_byte, dtype=to_torch(how.stored))
    return Quantized(integers, torch.ones(_scales(how, rows, columns), dtype=dtype))


def _scales(how: WeightFormat, rows: int, columns: int) -> tuple[int, ...]:
    return (rows,) if how.group_size is None else (rows, columns // how.group_size)
