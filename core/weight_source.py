"""Where the weights of a build come from: a Hugging Face checkpoint converted on the way, or dummy values.

A `WeightSource` gives, for every rank, tensors by our names, in the dtype and with the shape that the sharded
graph expects. `core.checkpoint.TrtcCheckpoint`, a converted checkpoint on disk, is another one.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Protocol

import torch

from .dtypes import MODEL_DTYPES, DType, to_torch
from .errors import CheckpointError, PluginError
from .sharding import (
    AxisSlice,
    ShardingOptions,
    local_shape,
    narrow_or_pad,
    share_rows,
    slice_bounds,
)
from .weights import IDENTITY, ResolvedWeight, Shape, WeightTable

if TYPE_CHECKING:
    from .config import ModelConfig
    from .hf import HFCheckpoint
    from .quantize.scheme import Quantization

BLOCK_BYTES = 16 << 20
"""Tensors are read, converted and written in blocks of rows of this size in float32, which bounds memory: a
conversion with four workers peaked at 1.9 GiB with 64 MiB and at 0.9 GiB with 16 MiB, since the allocator keeps what
each thread frees."""

DUMMY_STD = 0.02


class WeightSource(Protocol):
    """The weights of all ranks; safe to read from many threads. A rank is one of the tp_size that share a layer: the stages
    of a pipeline differ in which weights they read.

    aliases: name -> name of the weight that holds its data on every rank. `names` leaves aliases out; the
        other
    methods accept them.
    """

    @property
    def sharding(self) -> ShardingOptions: ...
    @property
    def aliases(self) -> Mapping[str, str]: ...
    @property
    def quantization(self) -> Quantization | None:
        """Which weights are stored as integers, and how; None where all are floating point."""

    def names(self, rank: int) -> tuple[str, ...]: ...
    def dtype(self, rank: int, name: str) -> DType: ...
    def shape(self, rank: int, name: str) -> Shape: ...
    def read(self, rank: int, name: str) -> torch.Tensor:
        """The shard of `name` that `rank` holds."""


Blocks = Iterator[tuple[int, dict[str, torch.Tensor]]]
"""(first row, block of rows of each stored tensor of a weight, by name), in order."""


class Convertible(WeightSource, Protocol):
    """A WeightSource that conversion can write weight by weight, each for all ranks at once."""

    def owners(self) -> tuple[str, ...]:
        """The weights that hold data; a quantized one is stored as several tensors."""

    def location(self, name: str) -> tuple[str, int]:
        """(file, offset) of the data of a weight, to read weights in the order of the disk."""

    def stored_blocks(self, name: str) -> Blocks:
        """A weight as the tensors that it is stored as, padding included."""

    def part(self, rank: int, name: str) -> AxisSlice | None:
        """The part of a stored tensor that `rank` holds, None for all of it."""


class ShardedWeights(ABC):
    """A WeightSource that slices whole weights into shards, block of rows by block of rows.

    A tied weight is an alias where its shard equals that of its owner; elsewhere it is a weight of its own
    with the data of its owner.
    Raises ConfigError when a weight cannot be split over the ranks.
    """

    quantization: Quantization | None = None

    def __init__(self, weights: Iterable[ResolvedWeight], *, dtype: DType, sharding: ShardingOptions) -> None:
        self.sharding = sharding
        self._dtype = dtype
        self._all = {weight.name: weight for weight in weights}
        self.aliases: dict[str, str] = {}
        for name, weight in self._all.items():
            owner = weight.tied_to
            if owner is not None and share_rows(weight.shard, self._all[owner].shard, sharding):
                self.aliases[name] = owner
        self._names = tuple(name for name in self._all if name not in self.aliases)
        self._shapes = {
            name: local_shape(
                weight.shape, weight.shard, sharding, name=name, unit=weight.unit, head=weight.head
            )
            for name, weight in self._all.items()
        }

    def weights(self) -> tuple[ResolvedWeight, ...]:
        """All weights, tied ones included."""
        return tuple(self._all.values())

    def weight(self, name: str) -> ResolvedWeight:
        return self._all[name]

    def names(self, rank: int) -> tuple[str, ...]:
        """The weights that `rank` holds, aliases left out."""
        return self._names

    def whole(self, name: str) -> torch.Tensor:
        """A weight as one tensor, without padding."""
        rows = self._all[name].shape[0]
        return torch.cat([block for start, block in self.blocks(name) if start < rows])

    def owners(self) -> tuple[str, ...]:
        return self._names

    def location(self, name: str) -> tuple[str, int]:
        """(file, offset) of the data of a weight; here there is no file."""
        return "", 0

    def stored_blocks(self, name: str) -> Blocks:
        for start, block in self.blocks(name):
            yield start, {name: block}

    def dtype(self, rank: int, name: str) -> DType:
        return self._dtype

    def shape(self, rank: int, name: str) -> Shape:
        return self._shapes[name]

    def read(self, rank: int, name: str) -> torch.Tensor:
        """The shard of `name` that `rank` holds, in fresh memory."""
        name = self.aliases.get(name, name)
        part = self.part(rank, name)
        result = torch.empty(self._shapes[name], dtype=to_torch(self._dtype))
        rows = (part.start, part.stop) if part is not None and part.axis == 0 else None
        for start, block in self.blocks(name, rows):
            cut = cut_block(start, block, part)
            if cut is not None:
                result[cut[0] : cut[0] + len(cut[1])] = cut[1]
        return result

    def part(self, rank: int, name: str) -> AxisSlice | None:
        """The part of the whole weight that `rank` holds, None for all of it."""
        weight = self._all[name]
        return slice_bounds(
            weight.shape, weight.shard, self.sharding, rank, name=name, unit=weight.unit, head=weight.head
        )

    def padded_rows(self, name: str) -> int:
        """Rows of the whole weight with those of zeros behind it."""
        size = self._all[name].shape[0]
        last = self.part(self.sharding.tp_size - 1, name)
        return size if last is None or last.axis else max(size, last.stop)

    def blocks(self, name: str, rows: tuple[int, int] | None = None) -> Iterator[tuple[int, torch.Tensor]]:
        """The whole weight, rows of padding included, as (first row, block of rows), in order.

        rows: only the blocks that meet the rows [rows[0], rows[1]).
        """
        weight = self._all[name]
        size = weight.shape[0]
        padded = self.padded_rows(name)
        first, last = rows or (0, padded)
        origin = self._all[weight.tied_to] if weight.tied_to else weight
        step = self._rows_per_block(origin)
        for start in range(first - first % step, min(last, size), step):
            yield start, self._read_rows(origin, start, min(start + step, size))
        if last > size:
            yield size, torch.zeros((padded - size, *weight.shape[1:]), dtype=to_torch(self._dtype))

    def _rows_per_block(self, weight: ResolvedWeight) -> int:
        row_bytes = math.prod(weight.shape[1:]) * DType.FLOAT32.itemsize
        return max(1, BLOCK_BYTES // row_bytes)

    @abstractmethod
    def _read_rows(self, weight: ResolvedWeight, start: int, stop: int) -> torch.Tensor:
        """The rows [start, stop) of a weight that is not tied, in our layout and dtype."""


def cut_block(start: int, block: torch.Tensor, part: AxisSlice | None) -> tuple[int, torch.Tensor] | None:
    """What of the rows [start, start + len(block)) of a weight belongs to `part`.

    Returns (first row within the shard, rows), or None when nothing belongs to it.
    """
    if part is None:
        return start, block
    if part.axis == 1:
        return start, narrow_or_pad(block, part)
    begin, end = max(start, part.start), min(start + len(block), part.stop)
    if begin >= end:
        return None
    return begin - part.start, block[begin - start : end - start]


class HFWeights(ShardedWeights):
    """The weights of a Hugging Face checkpoint, mapped by its family's table, cast and sharded when read.

    dtype: the type the weights get.
    Raises CheckpointError when tensors are missing, unexpected, mis-shaped or not floating point (one error
    lists all), ConfigError when a weight cannot be split over the ranks. Reading raises CheckpointError when
    the file turns out truncated or when a finite value overflows `dtype`.
    """

    def __init__(
        self,
        source: HFCheckpoint,
        table: WeightTable,
        config: ModelConfig,
        *,
        dtype: DType,
        sharding: ShardingOptions,
    ) -> None:
        self._source = source
        plan = table.match(config, source.shapes, str(source.path))
        self._plan = plan
        _check_dtypes(source, plan.sources.values())
        super().__init__(plan.weights.values(), dtype=dtype, sharding=sharding)

    def source_name(self, name: str) -> str:
        """The checkpoint tensor that holds the data of a weight."""
        return self._plan.sources[name]

    def location(self, name: str) -> tuple[str, int]:
        """(file, offset) of the data of a weight, to read weights in the order of the disk."""
        tensor = self._source.tensors[self._plan.sources[name]]
        return tensor.file, tensor.offset

    def _rows_per_block(self, weight: ResolvedWeight) -> int:
        # Rows of a transformed weight are not rows of the file: it is read as a whole.
        return super()._rows_per_block(weight) if weight.transform == IDENTITY else weight.shape[0]

    def _read_rows(self, weight: ResolvedWeight, start: int, stop: int) -> torch.Tensor:
        source = self._plan.sources[weight.name]
        if weight.transform == IDENTITY:
            tensor = self._source.read_rows(source, start, stop)
        else:
            tensor = _transformed(weight, self._source.read(source))
        return _cast(tensor, self._dtype, f"{self._source.path}: tensor {source!r}")


def _transformed(weight: ResolvedWeight, tensor: torch.Tensor) -> torch.Tensor:
    """Raises PluginError where a transform, which may be a family's own, fails or does not give what its row promises."""
    where = (
        f"weight table: {weight.name!r}: transform ({weight.transform.describe()}) of {list(tensor.shape)}"
    )
    try:
        result = weight.transform.apply(tensor)
    except Exception as error:
        raise PluginError(f"{where} raised {type(error).__name__}: {error}") from error
    if tuple(result.shape) != weight.shape:
        raise PluginError(f"{where} gave {list(result.shape)}, expected {list(weight.shape)}")
    return result


def _check_dtypes(source: HFCheckpoint, names: Iterable[str]) -> None:
    bad = [
        f"{name} is {source.tensors[name].dtype}"
        for name in names
        if source.tensors[name].dtype not in MODEL_DTYPES
    ]
    if bad:
        raise CheckpointError(
            f"{source.path}: tensors of a dtype that cannot be converted: {'; '.join(bad)};"
            f" accepted: {', '.join(MODEL_DTYPES)}"
        )


def _cast(tensor: torch.Tensor, dtype: DType, where: str) -> torch.Tensor:
    """`tensor` as `dtype`. Raises CheckpointError when a finite value becomes infinite."""
    result = tensor.to(to_torch(dtype))
    may_overflow = torch.finfo(result.dtype).max < torch.finfo(tensor.dtype).max
    if may_overflow and result.isinf().any() and (result.isinf() & tensor.isfinite()).any():
        largest = tensor.abs().max().item()
        raise CheckpointError(
            f"{where}: values up to {largest:.4g} do not fit {dtype}; use --dtype bfloat16 or float32"
        )
    return result


def dummy_generator(seed: int, name: str, row: int) -> torch.Generator:
    """What draws the rows from `row` on of the dummy weight `name`."""
    digest = hashlib.sha256(f"{seed}/{name}/{row}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


class DummyWeights(ShardedWeights):
    """Random weights in the shapes of a model, for measurements without a checkpoint.

    Values depend on `seed`, the name of the weight and the position only: the shards of any tp_size are
    slices of the same whole. Normal with a standard deviation of 0.02; vectors called `.weight` (norms) are
    around 1.
    Raises ConfigError when a weight cannot be split over the ranks.
    """

    def __init__(
        self,
        table: WeightTable,
        config: ModelConfig,
        *,
        dtype: DType,
        sharding: ShardingOptions,
        seed: int = 0,
    ) -> None:
        self.seed = seed
        super().__init__(table.expand(config), dtype=dtype, sharding=sharding)

    def _read_rows(self, weight: ResolvedWeight, start: int, stop: int) -> torch.Tensor:
        generator = dummy_generator(self.seed, weight.name, start)
        values = torch.randn((stop - start, *weight.shape[1:]), generator=generator).mul_(DUMMY_STD)
        if len(weight.shape) == 1 and weight.name.endswith(".weight"):
            values += 1
        return values.to(to_torch(self._dtype))
