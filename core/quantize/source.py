"""Weights quantized on the way from a checkpoint, block of rows by block of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch

from ..dtypes import DType, to_torch
from ..errors import CheckpointError
from ..sharding import AxisSlice, ShardingOptions
from ..weight_source import Blocks, HFWeights, ShardedWeights, cut_block
from ..weights import Shape
from .integers import Quantized, round_to_nearest
from .scheme import Quantization, QuantizeOptions


class QuantizedWeights:
    """A WeightSource over another one, with the chosen weights rounded to nearest.

    Whole rows are quantized and then cut into shards, so that ranks hold parts of one quantized model whatever the
    tp_size. A weight `w` becomes `w`, its integers, and `w.scale` (`core.quantize.scheme`).
    Raises ConfigError when groups do not fill the rows of a weight or straddle ranks.
    """

    def __init__(self, source: ShardedWeights, quantization: Quantization) -> None:
        self._source = source
        self.sharding: ShardingOptions = source.sharding
        self.quantization = quantization
        how, chosen = quantization.format, quantization.weights
        # A quantized head is a weight of its own: the embedding that it shares data with stays as it is.
        self.aliases: Mapping[str, str] = {
            name: owner for name, owner in source.aliases.items() if name not in chosen
        }
        for name in chosen:
            how.check(name, source.weight(name).shape, source.part(0, name), source.sharding)
        freed = [name for name in source.aliases if name in chosen]
        self._owners = (*source.names(0), *freed)
        self._stored = {name: self._parts(name) for name in self._owners}
        self._owner = {
            stored: (name, stored[len(name) :]) for name in self._owners for stored in self._stored[name]
        }

    def _parts(self, name: str) -> dict[str, tuple[DType, Shape]]:
        shape, dtype = self._source.shape(0, name), self._source.dtype(0, name)
        if name not in self.quantization.weights:
            return {name: (dtype, shape)}
        parts = self.quantization.format.parts(shape, dtype)
        return {name + suffix: part for suffix, part in parts.items()}

    def names(self, rank: int) -> tuple[str, ...]:
        """The stored tensors that `rank` holds, aliases left out."""
        return tuple(self._owner)

    def dtype(self, rank: int, name: str) -> DType:
        return self._entry(name)[0]

    def shape(self, rank: int, name: str) -> Shape:
        return self._entry(name)[1]

    def _entry(self, name: str) -> tuple[DType, Shape]:
        name = self.aliases.get(name, name)
        if name not in self._owner:
            raise CheckpointError(f"there is no weight {name!r}")
        return self._stored[self._owner[name][0]][name]

    def read(self, rank: int, name: str) -> torch.Tensor:
        """The shard of the stored tensor `name` that `rank` holds, in fresh memory."""
        name = self.aliases.get(name, name)
        owner, suffix = self._owner[name]
        if owner not in self.quantization.weights:
            return self._source.read(rank, owner)
        dtype, shape = self._entry(name)
        result = torch.empty(shape, dtype=to_torch(dtype))
        whole, part = self._source.part(rank, owner), self.part(rank, name)
        rows = (whole.start, whole.stop) if whole is not None and whole.axis == 0 else None
        for start, block in self._quantized(owner, rows):
            cut = cut_block(start, block.parts()[suffix], part)
            if cut is not None:
                result[cut[0] : cut[0] + len(cut[1])] = cut[1]
        return result

    # What conversion needs beside a WeightSource's own methods: see `weight_source.Convertible`.

    def owners(self) -> tuple[str, ...]:
        return self._owners

    def location(self, name: str) -> tuple[str, int]:
        return self._source.location(name)

    def part(self, rank: int, name: str) -> AxisSlice | None:
        owner, suffix = self._owner[name]
        part = self._source.part(rank, owner)
        return self.quantization.format.cut(suffix, part) if owner in self.quantization.weights else part

    def stored_blocks(self, name: str) -> Blocks:
        if name not in self.quantization.weights:
            yield from self._source.stored_blocks(name)
            return
        for start, block in self._quantized(name, None):
            yield start, {name + suffix: rows for suffix, rows in block.parts().items()}

    def _quantized(self, name: str, rows: tuple[int, int] | None) -> Iterator[tuple[int, Quantized]]:
        for start, block in self._source.blocks(name, rows):
            yield start, round_to_nearest(block, self.quantization.format, name=name)


Quantizer = Callable[[HFWeights], QuantizedWeights]
"""Makes quantized weights of the float ones of a checkpoint."""


def nearest(options: QuantizeOptions) -> Callable[[ShardedWeights], QuantizedWeights]:
    """Rounds the weights that the table marks as quantizable to nearest."""
    return lambda floats: QuantizedWeights(floats, options.choose(floats.weights()))
