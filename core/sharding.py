"""How weights are split over ranks: rules as data, and pure functions over shapes.

A job has tp_size * pp_size ranks: pp_size stages of a pipeline, one after the other, each of tp_size ranks that share its
layers. The rules below are about the latter; which weights a stage has follows from its graph (`core.passes.stage`).

Checkpoint conversion, engine building and the graph pass that inserts collectives all use the functions
below, so that a shard on disk always has the shape the graph expects.

What N does not divide is padded with zeros behind its end, which is exact: heads and columns of zeros meet zero columns in
the layer that sums over the ranks, and rows beyond the vocabulary are cut off again. Where there are fewer heads of keys and
values than ranks, several ranks hold the same one, and share the queries that read it.

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
    KV_HEADS = "kv_heads"
    """What becomes of HEADS for keys and values that several queries read: where there are fewer of them than ranks, each is
    whole on several. Tables say HEADS."""
    HEADS_ROW = "heads_row"
    """ROW by whole attention heads: the projection that takes what the heads of HEADS give."""
    VOCAB_HEAD = "vocab_head"
    """Axis 0 of the language-model head [vocab, hidden] or its bias; the vocabulary is padded with zero
    rows.
    """
    EMBEDDING = "embedding"
    """Token embedding [vocab, hidden]: whole, or split on the axis that ShardingOptions names."""

    @property
    def of_bias(self) -> Shard:
        """The rule of the bias of a linear layer whose weight has this one: what ranks sum gets its bias once, after."""
        return Shard.REPLICATE if self in (Shard.ROW, Shard.HEADS_ROW) else self


@dataclass(frozen=True)
class ShardingOptions:
    """How many ranks share the weights, and whether the token embedding is split as well.

    tp_size: number of ranks that share each layer (tensor parallelism), >= 1.
    use_parallel_embedding: split the token embedding instead of keeping it whole on every rank.
    embedding_sharding_dim: 0 splits the (padded) vocabulary, 1 the hidden size; read only with the above.
    pp_size: number of stages (pipeline parallelism), >= 1.
    Raises ConfigError on values outside these.
    """

    tp_size: int = 1
    use_parallel_embedding: bool = False
    embedding_sharding_dim: int = 0
    pp_size: int = 1

    def __post_init__(self) -> None:
        for name in ("tp_size", "pp_size"):
            size = getattr(self, name)
            if type(size) is not int or size < 1:
                raise ConfigError(f"{name} is {size!r}; accepted: a whole number >= 1")
        if type(self.use_parallel_embedding) is not bool:
            raise ConfigError(
                f"use_parallel_embedding is {self.use_parallel_embedding!r}; accepted: true, false"
            )
        if type(self.embedding_sharding_dim) is not int or self.embedding_sharding_dim not in (0, 1):
            raise ConfigError(
                f"embedding_sharding_dim is {self.embedding_sharding_dim!r}; accepted: 0 (vocabulary), 1"
            )

    @property
    def num_ranks(self) -> int:
        return self.tp_size * self.pp_size

    def place(self, rank: int) -> tuple[int, int]:
        """(stage, rank within the stage) of a rank of the job."""
        return divmod(rank, self.tp_size)

    def check_layers(self, num_layers: int) -> None:
        """Raises ConfigError when there are more stages than layers."""
        if self.pp_size > num_layers:
            raise ConfigError(
                f"pp_size {self.pp_size}: the model has {num_layers} layers; accepted: 1 to {num_layers}"
            )

    def to_json(self) -> dict[str, Any]:
        return {
            "tp_size": self.tp_size,
            "use_parallel_embedding": self.use_parallel_embedding,
            "embedding_sharding_dim": self.embedding_sharding_dim,
            "pp_size": self.pp_size,
        }

    @classmethod
    def from_json(cls, value: object, where: str) -> ShardingOptions:
        """The options written by `to_json`. Raises CheckpointError, naming `where`, on anything else."""
        if isinstance(value, dict):
            value = {"pp_size": 1, **value}  # checkpoints from before there were pipelines
        if not isinstance(value, dict) or value.keys() != cls().to_json().keys():
            expected = ", ".join(cls().to_json())
            raise CheckpointError(f"{where}: sharding must be an object with exactly the keys {expected}")
        try:
            return cls(**value)
        except ConfigError as error:
            raise CheckpointError(f"{where}: {error}") from None


@dataclass(frozen=True)
class AxisSlice:
    """The part [start, stop) of one axis that a rank holds; it may lie beyond the end, where zeros are added."""

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
        case Shard.COLUMN | Shard.HEADS | Shard.KV_HEADS | Shard.VOCAB_HEAD:
            return 0
        case Shard.ROW | Shard.HEADS_ROW:
            return 1
        case Shard.EMBEDDING:
            return options.embedding_sharding_dim if options.use_parallel_embedding else None


def padded(size: int, unit: int, tp_size: int) -> int:
    """The smallest multiple of tp_size units that holds `size`."""
    return -(-size // (unit * tp_size)) * unit * tp_size


def slice_bounds(
    shape: tuple[int, ...],
    shard: Shard,
    options: ShardingOptions,
    rank: int,
    *,
    name: str,
    unit: int = 1,
    head: int | None = None,
) -> AxisSlice | None:
    """The part of a weight of `shape` that `rank` holds, None for all of it.

    name: the weight, for the error.
    unit: what stays together along the axis; for heads, those that read one key and value, so that none is cut.
    head: what a unit may be cut into where there are fewer than ranks; None: nothing.
    Raises ConfigError when there are too few units: a rank would hold nothing but padding.
    """
    assert 0 <= rank < options.tp_size, f"rank {rank} of {options.tp_size}"
    axis = split_axis(shard, options)
    if axis is None:
        return None
    assert axis < len(shape), f"{name}: shard {shard} needs an axis {axis}, shape is {list(shape)}"
    assert shape[axis] % unit == 0, f"{name}: a size of {shape[axis]} is not whole units of {unit}"
    units = shape[axis] // unit
    sharing, rest = divmod(options.tp_size, units)
    if sharing > 1 and rest == 0 and shard is Shard.KV_HEADS:
        return AxisSlice(axis, rank // sharing * unit, (rank // sharing + 1) * unit)
    if sharing > 1 and rest == 0 and head is not None and head < unit:
        local = _share_of_a_unit(name, units, unit // head, sharing, options.tp_size) * head
    else:
        local = padded(shape[axis], unit, options.tp_size) // options.tp_size
        _check_every_rank_has_some(name, shape[axis], local, options.tp_size, shard, unit)
    return AxisSlice(axis, rank * local, (rank + 1) * local)


def _share_of_a_unit(name: str, units: int, heads: int, ranks: int, tp_size: int) -> int:
    """Of the `heads` of each unit that `ranks` share, how many one has. Only behind the last unit may zeros be added."""
    local = -(-heads // ranks)
    if (heads % ranks and units > 1) or local * (ranks - 1) >= heads:
        raise ConfigError(
            f"{name}: {units} head{'s' * (units > 1)} of keys and values over tp_size {tp_size}: the {heads} heads that read "
            f"{'each' if units > 1 else 'it'} cannot be shared by {ranks} ranks; use another tp_size"
        )
    return local


def local_shape(
    shape: tuple[int, ...],
    shard: Shard,
    options: ShardingOptions,
    *,
    name: str,
    unit: int = 1,
    head: int | None = None,
) -> tuple[int, ...]:
    """The shape that each rank holds of a weight of `shape` (all ranks hold the same shape).

    Arguments and errors as for `slice_bounds`.
    """
    part = slice_bounds(shape, shard, options, 0, name=name, unit=unit, head=head)
    if part is None:
        return shape
    return (*shape[: part.axis], part.stop - part.start, *shape[part.axis + 1 :])


def _check_every_rank_has_some(
    name: str, size: int, local: int, tp_size: int, shard: Shard, unit: int
) -> None:
    idle = tp_size - -(-size // local)
    if idle and shard not in (Shard.VOCAB_HEAD, Shard.EMBEDDING):
        heads = shard in (Shard.HEADS, Shard.KV_HEADS, Shard.HEADS_ROW)
        what = f"{size // unit} heads of keys and values" if heads else f"a size of {size}"
        raise ConfigError(
            f"{name}: {what} over tp_size {tp_size}, {local // unit} on each rank, would leave {idle} without any; "
            f"use a smaller tp_size"
        )


def narrow_or_pad(tensor: torch.Tensor, part: AxisSlice) -> torch.Tensor:
    """The `part` of a tensor, zeros where it lies beyond the end; a view where it does not."""
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
    return split_axis(first, options) == split_axis(second, options)
