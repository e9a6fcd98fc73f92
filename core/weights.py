"""The weight-mapping table: how the tensors of a Hugging Face checkpoint become the weights of our graph.

A model family returns one `WeightTable`; conversion, sharding, validation and documentation are driven by it.
A row says which checkpoint tensor (`{i}` stands for the layer index), under which name we keep it, its shape
in terms of the configuration, how it is split over ranks, and what happens to the data on the way:

    WeightRule("layers.{i}.fc1.weight", "layers.{i}.mlp.up.weight", ("ffn_size", "hidden_size"), Shard.COLUMN)
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from .errors import CheckpointError, PluginError
from .sharding import Shard

if TYPE_CHECKING:
    import torch

    from .config import ModelConfig

Shape = tuple[int, ...]
Dim = str | int
"""A size: an integer, or a sum of products of integers and ModelConfig attributes: `max_positions+2`,
`num_heads*head_dim+2*num_kv_heads*head_dim`."""


# ---- dimensions ----------------------------------------------------------------------------------

_PRODUCT = r"\s*\w+\s*(?:\*\s*\w+\s*)*"
_SUM = re.compile(rf"{_PRODUCT}(?:[+-]{_PRODUCT})*")


def resolve_dim(dim: Dim, config: ModelConfig) -> int:
    """The value of `dim` for `config`.

    Raises PluginError when it does not parse or names something other than an integer attribute.
    """
    if isinstance(dim, int):
        return dim
    if not _SUM.fullmatch(dim):
        raise PluginError(f"weight table: cannot read the size {dim!r}; accepted: sums of products, a*b+2")
    total = 0
    for sign, product in re.findall(r"([+-]?)([^+-]+)", dim):
        value = math.prod(_resolve_factor(factor.strip(), dim, config) for factor in product.split("*"))
        total += -value if sign == "-" else value
    return total


def _resolve_factor(factor: str, dim: str, config: ModelConfig) -> int:
    if factor.isdecimal():
        return int(factor)
    value = getattr(config, factor, None)
    if type(value) is not int:
        raise PluginError(
            f"weight table: size {dim!r}: {type(config).__name__} has no integer attribute {factor!r}"
        )
    return value


# ---- transforms ----------------------------------------------------------------------------------


@runtime_checkable
class Transform(Protocol):
    """A change of a checkpoint tensor on its way into our layout. Frozen and comparable."""

    def describe(self) -> str:
        """A few words for the documentation."""

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor in our layout; may be a view."""

    def source_shape(self, shape: Shape) -> Shape:
        """The shape the checkpoint tensor must have for `apply` to give `shape`."""


@dataclass(frozen=True)
class Transpose:
    """Swaps the two axes: GPT-2's Conv1D keeps its weights as [in, out]."""

    def describe(self) -> str:
        return "transpose"

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.t()

    def source_shape(self, shape: Shape) -> Shape:
        return shape[::-1]


@dataclass(frozen=True)
class Chunk:
    """Part `index` of `of` equal parts along `axis`: takes a fused q, k, v projection apart."""

    index: int
    of: int
    axis: int = 0

    def describe(self) -> str:
        return f"part {self.index} of {self.of}, axis {self.axis}"

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        size = tensor.shape[self.axis] // self.of
        return tensor.narrow(self.axis, self.index * size, size)

    def source_shape(self, shape: Shape) -> Shape:
        return (*shape[: self.axis], shape[self.axis] * self.of, *shape[self.axis + 1 :])


@dataclass(frozen=True)
class DropRows:
    """Leaves out the first `count` rows."""

    count: int

    def describe(self) -> str:
        return f"without the first {self.count} rows"

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor[self.count :]

    def source_shape(self, shape: Shape) -> Shape:
        return (shape[0] + self.count, *shape[1:])


@dataclass(frozen=True)
class Compose:
    """Applies `steps` one after the other, the first one to the checkpoint tensor."""

    steps: tuple[Transform, ...] = ()

    def describe(self) -> str:
        return ", then ".join(step.describe() for step in self.steps)

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        for step in self.steps:
            tensor = step.apply(tensor)
        return tensor

    def source_shape(self, shape: Shape) -> Shape:
        for step in reversed(self.steps):
            shape = step.source_shape(shape)
        return shape


IDENTITY = Compose()


# ---- the table -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class WeightRule:
    """One row of the table: one weight, or one of every layer when the name holds `{i}`.

    source: name in the checkpoint without the prefix, or several accepted names; `{i}` is the layer index.
    name: our name of the weight.
    shape: our shape, [out, in] for linear layers; see `Dim`.
    shard: how ranks split it. Shard.HEADS and HEADS_ROW keep together what belongs to one head of keys and values.
    transform: one transform or a tuple of them, in the order in which they are applied.
    quantizable: whether weight-only quantization may replace it.
    tied_to: our name of the weight whose data this one shares; the checkpoint may then hold it or not.
    """

    source: str | tuple[str, ...]
    name: str
    shape: tuple[Dim, ...]
    shard: Shard = Shard.REPLICATE
    transform: Transform | tuple[Transform, ...] = IDENTITY
    quantizable: bool = False
    tied_to: str | None = None

    def __post_init__(self) -> None:
        """Raises PluginError for what is no rule or transform, which would fail far from here."""
        if not isinstance(self.shard, Shard):
            raise PluginError(
                f"weight table: {self.name!r}: shard is {self.shard!r}; accepted: Shard.{', '.join(Shard.__members__)}"
            )
        for step in self.transform if isinstance(self.transform, tuple) else (self.transform,):
            if isinstance(step, type) or not isinstance(step, Transform):
                raise PluginError(
                    f"weight table: {self.name!r}: transform {step!r} is not an object with describe, apply and source_shape"
                )
        if "{i}" not in self.name and any("{i}" in source for source in self.sources):
            raise PluginError(
                f"weight table: {self.name!r} has no {{i}}, and its source {self.source!r} has one for every layer"
            )

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source,) if isinstance(self.source, str) else self.source

    @property
    def steps(self) -> Transform:
        """The transform as one object."""
        return Compose(self.transform) if isinstance(self.transform, tuple) else self.transform


def linear_rules(
    source: str,
    name: str,
    shape: tuple[Dim, Dim],
    shard: Shard = Shard.REPLICATE,
    *,
    bias: bool = True,
    transform: tuple[Transform, ...] = (),
    transposed: bool = False,
) -> list[WeightRule]:
    """The rows of a linear layer: `<source>.weight`, which may be quantized, and with `bias` `<source>.bias`.

    shape: [out, in]. shard: of the weight; the bias follows from it. transform: of both.
    transposed: the checkpoint keeps the weight as [in, out].
    """
    steps = (Transpose(), *transform) if transposed else transform
    rules = [WeightRule(f"{source}.weight", f"{name}.weight", shape, shard, steps, quantizable=True)]
    if bias:
        rules.append(WeightRule(f"{source}.bias", f"{name}.bias", shape[:1], shard.of_bias, transform))
    return rules


def norm_rules(
    source: str | tuple[str, ...], name: str, *, bias: bool = True, size: Dim = "hidden_size"
) -> list[WeightRule]:
    """The rows of a norm over `size` numbers: `<source>.weight`, and with `bias` `<source>.bias`."""
    sources = (source,) if isinstance(source, str) else source
    parts = ("weight", "bias") if bias else ("weight",)
    return [WeightRule(tuple(f"{s}.{part}" for s in sources), f"{name}.{part}", (size,)) for part in parts]


@dataclass(frozen=True)
class ResolvedWeight:
    """A rule applied to a configuration: one weight, all sizes known.

    sources: names to look for in the checkpoint, prefixes included, the preferred one first.
    unit: rows (columns, where these are split) that a shard keeps together.
    head: those that ranks keep together that share a unit, where there are fewer than ranks; None: they cannot.
    """

    name: str
    sources: tuple[str, ...]
    shape: Shape
    shard: Shard
    transform: Transform
    unit: int = 1
    head: int | None = None
    quantizable: bool = False
    tied_to: str | None = None

    @property
    def source_shape(self) -> Shape:
        return self.transform.source_shape(self.shape)


@dataclass(frozen=True)
class WeightPlan:
    """What to read for each weight: the result of matching a table with the tensors of a checkpoint.

    weights: all weights by our name, in table order, tied ones included.
    sources: our name -> the checkpoint tensor that holds its data; a tied weight has its owner's.
    """

    weights: Mapping[str, ResolvedWeight]
    sources: Mapping[str, str]


@dataclass(frozen=True)
class WeightTable:
    """The rules of a family for one configuration.

    prefixes: what may stand before every `source`, as in ("model.decoder.", "decoder.", "").
    ignore: glob patterns of checkpoint names (with or without a prefix) that are known and not needed.
    """

    rules: tuple[WeightRule, ...]
    prefixes: tuple[str, ...] = ("",)
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises PluginError for a text where several belong, and for a row that is none."""
        for name in ("prefixes", "ignore"):
            if isinstance(getattr(self, name), str):
                raise PluginError(
                    f"weight table: {name} is the text {getattr(self, name)!r}; expected a tuple of texts"
                )
        for rule in self.rules:
            if not isinstance(rule, WeightRule):
                raise PluginError(f"weight table: {rule!r} is not a WeightRule")

    def expand(self, config: ModelConfig) -> list[ResolvedWeight]:
        """All weights of all layers.

        Raises PluginError on a rule that does not fit `config` or another rule.
        """
        weights = [weight for rule in self.rules for weight in self._expand_rule(rule, config)]
        _check_table(weights)
        return weights

    def _expand_rule(self, rule: WeightRule, config: ModelConfig) -> Iterator[ResolvedWeight]:
        shape = tuple(resolve_dim(dim, config) for dim in rule.shape)
        unit = _unit(rule, shape, config)
        shard, head = _by_head(rule, shape, config)
        layers = range(config.num_layers) if "{i}" in rule.name else range(1)
        for layer in layers:
            yield ResolvedWeight(
                name=_at_layer(rule.name, layer),
                sources=tuple(
                    prefix + _at_layer(source, layer) for source in rule.sources for prefix in self.prefixes
                ),
                shape=shape,
                shard=shard,
                transform=rule.steps,
                unit=unit,
                head=head,
                quantizable=rule.quantizable,
                tied_to=rule.tied_to,
            )

    def match(self, config: ModelConfig, available: Mapping[str, Shape], where: str) -> WeightPlan:
        """Finds every weight among the `available` checkpoint tensors (name -> shape).

        where: the checkpoint, for the error.
        Raises one CheckpointError that lists every missing, unexpected and mis-shaped tensor.
        """
        weights = {weight.name: weight for weight in self.expand(config)}
        candidates = _candidates(weights.values())
        sources: dict[str, str] = {}
        problems = _Problems(where)
        for name, names in candidates.items():
            found = next((source for source in names if source in available), None)
            if found is None:
                problems.missing.append(
                    f"{self._likely_name(weights[name], names, available)} {list(weights[name].source_shape)}"
                )
                continue
            sources[name] = found
            problems.compare(found, available[found], weights[name].source_shape)
        tied = {name: weight for name, weight in weights.items() if weight.tied_to is not None}
        known = {*sources.values(), *(source for weight in tied.values() for source in weight.sources)}
        problems.unexpected = [
            f"{name} {list(shape)}"
            for name, shape in available.items()
            if name not in known and not self._is_ignored(name)
        ]
        problems.raise_if_any()
        sources |= {name: sources[weight.tied_to] for name, weight in tied.items() if weight.tied_to}
        return WeightPlan(weights, sources)

    def describe(self) -> str:
        """The table as Markdown, for generated documentation."""
        rows = ["| Hugging Face name | name | shape | sharding | transform |", "|---|---|---|---|---|"]
        for rule in self.rules:
            sources = " or ".join(f"`{source}`" for source in rule.sources)
            change = f"tied to `{rule.tied_to}`" if rule.tied_to else rule.steps.describe()
            shape = f"[{', '.join(map(str, rule.shape))}]"
            rows.append(f"| {sources} | `{rule.name}` | {shape} | {rule.shard} | {change} |")
        return "\n".join(rows)

    def _is_ignored(self, name: str) -> bool:
        return any(
            fnmatchcase(name, prefix + glob) for glob in self.ignore for prefix in {*self.prefixes, ""}
        )

    def _likely_name(
        self, weight: ResolvedWeight, names: tuple[str, ...], available: Mapping[str, Shape]
    ) -> str:
        """Of several accepted names, the one with the prefix that most tensors of this checkpoint have.

        A head's is the one without: Hugging Face keeps it beside the model that the prefix names.
        """
        if weight.shard is Shard.VOCAB_HEAD:
            prefixes = tuple(prefix for prefix in self.prefixes if prefix)
            return next((name for name in names if not name.startswith(prefixes)), names[0])
        counts = {
            prefix: sum(name.startswith(prefix) for name in available) for prefix in self.prefixes if prefix
        }
        return max(
            names, key=lambda name: max((n for p, n in counts.items() if name.startswith(p)), default=0)
        )


def _unit(rule: WeightRule, shape: Shape, config: ModelConfig) -> int:
    """Grouped queries stay with the keys and values that they read, so that padding adds whole groups to each."""
    if rule.shard not in (Shard.HEADS, Shard.HEADS_ROW):
        return 1
    size = shape[1 if rule.shard is Shard.HEADS_ROW else 0]
    if size % (config.num_kv_heads * config.head_dim):
        raise PluginError(
            f"weight table: {rule.name!r}: a size of {size} is not so many whole heads (head_dim {config.head_dim}) for "
            f"each of {config.num_kv_heads} heads of keys and values, as {rule.shard} needs"
        )
    return size // config.num_kv_heads


def _by_head(rule: WeightRule, shape: Shape, config: ModelConfig) -> tuple[Shard, int | None]:
    """The rule that a weight has, and its head: queries can be divided where several read one head of keys and values."""
    if rule.shard not in (Shard.HEADS, Shard.HEADS_ROW) or config.num_kv_heads == config.num_heads:
        return rule.shard, None
    heads, rest = divmod(shape[1 if rule.shard is Shard.HEADS_ROW else 0], config.head_dim)
    if rule.shard is Shard.HEADS and (heads, rest) == (config.num_kv_heads, 0):
        return Shard.KV_HEADS, None
    return rule.shard, config.head_dim if (heads, rest) == (config.num_heads, 0) else None


def _at_layer(pattern: str, layer: int) -> str:
    return pattern.replace("{i}", str(layer))


def _candidates(weights: Iterable[ResolvedWeight]) -> dict[str, tuple[str, ...]]:
    """Checkpoint names to try for each weight that owns data.

    Some checkpoints keep a shared tensor under the name of the tied weight only, so those names come last.
    """
    weights = list(weights)
    result = {weight.name: weight.sources for weight in weights if weight.tied_to is None}
    for weight in weights:
        if weight.tied_to is not None:
            result[weight.tied_to] += weight.sources
    return result


def _check_table(weights: list[ResolvedWeight]) -> None:
    """Refuses a table that contradicts itself, with the name of the weight."""
    by_name: dict[str, ResolvedWeight] = {}
    for weight in weights:
        if weight.name in by_name:
            raise PluginError(f"weight table: two rules give the weight {weight.name!r}")
        if not weight.shape or min(weight.shape) < 1:
            raise PluginError(
                f"weight table: {weight.name!r} has the shape {list(weight.shape)}; sizes must be >= 1"
            )
        by_name[weight.name] = weight
    for weight in weights:
        if weight.tied_to is None:
            continue
        owner = by_name.get(weight.tied_to)
        if owner is None or owner.tied_to is not None or owner.shape != weight.shape:
            raise PluginError(
                f"weight table: {weight.name!r} is tied to {weight.tied_to!r},"
                f" which is not an untied weight of the shape {list(weight.shape)}"
            )


class _Problems:
    """Collects what does not fit, to report all of it at once."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.missing: list[str] = []
        self.unexpected: list[str] = []
        self.mis_shaped: list[str] = []

    def compare(self, name: str, found: Shape, expected: Shape) -> None:
        if found != expected:
            self.mis_shaped.append(f"{name} is {list(found)}, expected {list(expected)}")

    def raise_if_any(self) -> None:
        kinds = {"missing": self.missing, "unexpected": self.unexpected, "mis-shaped": self.mis_shaped}
        parts = [f"{len(items)} {kind}: {'; '.join(items)}" for kind, items in kinds.items() if items]
        if parts:
            raise CheckpointError(f"{self.where}: tensors do not fit config.json: {'; '.join(parts)}")
