"""How a weight is split over the ranks of tensor parallelism: rules as data, and pure functions over shapes.

Checkpoint conversion, engine building and the graph pass that inserts collectives all use the functions
below, so that a shard on disk always has the shape the graph expects.

Linear weights are [out, in], as in torch. Axis 0 split is column parallel, axis 1 split is row parallel (the
names of Megatron-LM, arXiv:1909.08053).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from .errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    import torch


class Shard(StrEnum):
    """The sharding rule of one weight."""

    REPLICATE = "replicate"
    """Whole on every rank."""
    COLUMN = "column"
    """Axis 0 of a [out, in] weight or of its [out] bias; the output of the layer is split."""
    ROW = "row"
    """Axis 1 of a [out, in] weight; the layer's outputs are summed over ranks, so its bias is REPLICATE."""
    HEADS = "heads"
    """Axis 0 by whole attention heads: the query, key and value projections and their biases."""
    VOCAB_HEAD = "vocab_head"
    """Axis 0 of the language-model head [vocab, hidden] or its bias; the vocabulary is padded with zero
    rows.
    """
    EMBEDDING = "embedding"
    """Token embedding [vocab, hidden]: whole, or split on the axis that ShardingOptions names."""


@dataclass(frozen=True)
class ShardingOptions:
    """How many ranks share the weights, and whether the token embedding is split as well.

    tp_size: number of ranks of tensor parallelism, >= 1.
    use_parallel_embedding: split the token embedding instead of keeping it whole on every rank.
    embedding_sharding_dim: 0 splits the (padded) vocabulary, 1 the hidden size; read only with the above.
    Raises ConfigError on values outside these.
    """

    tp_size: int = 1
    use_parallel_embedding: bool = False
    embedding_sharding_dim: int = 0

    def __post_init__(self) -> None:
        if type(self.tp_size) is not int or self.tp_size < 1:
            raise ConfigError(f"tp_size is {self.tp_size!r}; accepted: a whole number >= 1")
        if type(self.use_parallel_embedding) is not bool:
            raise ConfigError(
                f"use_parallel_embedding is {self.use_parallel_embedding!r}; accepted: true, false"
            )
        if type(self.embedding_sharding_dim) is not int or self.embedding_sharding_dim not in (0, 1):
            raise ConfigError(
                f"embedding_sharding_dim is {self.embedding_sharding_dim!r}; accepted: 0 (vocabulary), 1"
            )

    def to_json(self) -> dict[str, Any]:
        return {
            "tp_size": self.tp_size,
            "use_parallel_embedding": self.use_parallel_embedding,
            "embedding_sharding_dim": self.embedding_sharding_dim,
        }

    @classmethod
    def from_json(cls, value: object, where: str) -> ShardingOptions:
        """The options written by `to_json`. Raises CheckpointError, naming `where`, on anything else."""
        if not isinstance(value, dict) or value.keys() != cls().to_json().keys():
            expected = ", ".join(cls().to_json())
            raise CheckpointError(f"{where}: sharding must be an object with exactly the keys {expected}")
        try:
            return cls(**value)
        except ConfigError as error:
            raise CheckpointError(f"{where}: {error}") from None


@dataclass(frozen=True)
class AxisSlice:
    """The part [start, stop) of one axis that a rank holds; stop may lie beyond the unpadded vocabulary."""

    axis: int
    start: int
    stop: int


def split_axis(shard: Shard, options: ShardingOptions) -> int | None:
    """The axis along which `shard` splits a weight under `options`; None when every rank holds all of it."""
    if options.tp_size == 1:
        return None
    match shard:
        case Shard.REPLICATE:
            return None
        case Shard.COLUMN | Shard.HEADS | Shard.VOCAB_HEAD:
            return 0
        case Shard.ROW:
            return 1
        case Shard.EMBEDDING:
            return options.embedding_sharding_dim if options.use_parallel_embedding else None


def is_padded(shard: Shard, options: ShardingOptions) -> bool:
    """Whether axis 0 of a weight is a vocabulary that gets zero rows up to a multiple of tp_size."""
    return shard in (Shard.VOCAB_HEAD, Shard.EMBEDDING) and split_axis(shard, options) == 0


def padded_vocab(vocab_size: int, tp_size: int) -> int:
    """The smallest multiple of tp_size that holds the vocabulary."""
    return -(-vocab_size // tp_size) * tp_size


def padded_shape(shape: tuple[int, ...], shard: Shard, options: ShardingOptions) -> tuple[int, ...]:
    """The shape of the shards put together: `shape`, or `shape` with a padded vocabulary."""
    if not is_padded(shard, options):
        return shape
    return (padded_vocab(shape[0], options.tp_size), *shape[1:])


def slice_bounds(
    shape: tuple[int, ...], shard: Shard, options: ShardingOptions, rank: int, *, name: str, unit: int = 1
) -> AxisSlice | None:
    """The part of a weight of `shape` that `rank` holds, None for all of it.

    name: the weight, for the error.
    unit: rows that stay together; head_dim for Shard.HEADS, so that a head is never cut.
    Raises ConfigError when the axis cannot be divided into tp_size equal parts of whole units.
    """
    assert 0 <= rank < options.tp_size, f"rank {rank} of {options.tp_size}"
    axis = split_axis(shard, options)
    if axis is None:
        return None
    assert axis < len(shape), f"{name}: shard {shard} needs an axis {axis}, shape is {list(shape)}"
    size = padded_shape(shape, shard, options)[axis]
    _check_divisible(name, size, unit, options.tp_size, shard)
    local = size // options.tp_size
    return AxisSlice(axis, rank * local, (rank + 1) * local)


def local_shape(
    shape: tuple[int, ...], shard: Shard, options: ShardingOptions, *, name: str, unit: int = 1
) -> tuple[int, ...]:
    """The shape that each rank holds of a weight of `shape` (all ranks hold the same shape).

    Arguments and errors as for `slice_bounds`.
    """
    part = slice_bounds(shape, shard, options, 0, name=name, unit=unit)
    if part is None:
        return shape
    return (*shape[: part.axis], part.stop - part.start, *shape[part.axis + 1 :])


def _check_divisible(name: str, size: int, unit: int, tp_size: int, shard: Shard) -> None:
    assert size % unit == 0, f"{name}: {size} rows are not whole units of {unit}"
    if (size // unit) % tp_size:
        what = f"{size // unit} heads" if shard is Shard.HEADS else f"a size of {size}"
        raise ConfigError(
            f"{name}: {what} cannot be split evenly over tp_size {tp_size}; use a tp_size that divides it"
        )


def slice_tensor(
    tensor: torch.Tensor, shard: Shard, options: ShardingOptions, rank: int, *, name: str, unit: int = 1
) -> torch.Tensor:
    """The shard that `rank` holds of a whole tensor; a view where no padding is needed.

    Arguments and errors as for `slice_bounds`.
    """
    part = slice_bounds(tuple(tensor.shape), shard, options, rank, name=name, unit=unit)
    if part is None:
        return tensor
    stop = min(part.stop, tensor.shape[part.axis])
    start = min(part.start, stop)
    local = tensor.narrow(part.axis, start, stop - start)
    missing = (part.stop - part.start) - local.shape[part.axis]
    if not missing:
        return local
    import torch

    zeros = local.new_zeros((*local.shape[: part.axis], missing, *local.shape[part.axis + 1 :]))
    return torch.cat([local, zeros], dim=part.axis)


def share_rows(first: Shard, second: Shard, options: ShardingOptions) -> bool:
    """Whether a [vocab, hidden] weight split by `first` and by `second` gives every rank the same shard."""
    same_axis = split_axis(first, options) == split_axis(second, options)
    return same_axis and is_padded(first, options) == is_padded(second, options)
