"""How weights are quantized, as data: the format of one weight, and what a checkpoint says of all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..dtypes import DType
from ..errors import CheckpointError, ConfigError
from ..sharding import AxisSlice, Shard, ShardingOptions
from ..weights import ResolvedWeight, Shape

PRECISIONS = ("int8", "int4", "fp8")
GROUP_SIZES = (32, 64, 128)
"""Columns that share a scale. 32 is for imported checkpoints and small models; `trtc convert` offers the others as well."""

FP8_ACTIVATIONS = "fp8"
KINDS = frozenset({"int8", "int4", "int4 with zero points", "fp8", "fp8 with fp8 activations"})
SCALE, ZERO = ".scale", ".zero"
"""What the parts of a quantized weight are called: its integers keep the name of the weight."""


@dataclass(frozen=True)
class WeightFormat:
    """The format of a quantized weight [out, in]: value = (integer - zero) * scale.

    precision:  int8: one integer of [-127, 127] a byte, int8 [out, in].
                int4: two integers of [-8, 7] a byte, uint8 [out, in / 2], the even column in the low four bits, both in
                two's complement.
                fp8: e4m3 numbers of up to 448 in place of the integers, float8_e4m3fn [out, in].
    group_size: columns of a row that share a scale, [out, in / group_size]; None: the whole row shares it, [out].
    zero_point: whether there are zeros, int8 of the shape of the scales; without, they are 0 (symmetric).
    Scales have the type that the model computes in.
    Raises ConfigError for what no target could run.
    """

    precision: str
    group_size: int | None = None
    zero_point: bool = False

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ConfigError(
                f"weight precision {self.precision!r} is not known; accepted: {', '.join(PRECISIONS)}"
            )
        if self.precision != "int4" and (self.group_size is not None or self.zero_point):
            raise ConfigError(
                f"{self.precision} weights have one scale a row and no zeros; found group size {self.group_size}"
            )
        if self.precision == "int4" and self.group_size not in GROUP_SIZES:
            accepted = ", ".join(map(str, GROUP_SIZES))
            raise ConfigError(
                f"int4 weights: group size {self.group_size!r} is not supported; accepted: {accepted}"
            )

    def __str__(self) -> str:
        group = "" if self.group_size is None else f", group size {self.group_size}"
        return f"{self.precision}{group}{', with zero points' if self.zero_point else ''}"

    @property
    def kind(self) -> str:
        """What a target must be able to run; one of `KINDS` (see `Quantization.kind`)."""
        return f"{self.precision}{' with zero points' if self.zero_point else ''}"

    @property
    def per_byte(self) -> int:
        """Integers in a byte."""
        return 2 if self.precision == "int4" else 1

    @property
    def largest(self) -> int:
        """What the largest weight of a row or group becomes when it is rounded to nearest."""
        return {"int4": 7, "int8": 127, "fp8": 448}[self.precision]

    @property
    def stored(self) -> DType:
        """Element type of the integers as they are stored."""
        return {"int4": DType.UINT8, "int8": DType.INT8, "fp8": DType.FLOAT8_E4M3}[self.precision]

    def parts(self, shape: Shape, dtype: DType) -> dict[str, tuple[DType, Shape]]:
        """Suffix of each stored tensor of a weight of `shape` -> its dtype and shape."""
        rows, columns = shape
        scales: Shape = (rows,) if self.group_size is None else (rows, columns // self.group_size)
        result = {"": (self.stored, (rows, columns // self.per_byte)), SCALE: (dtype, scales)}
        return result | ({ZERO: (DType.INT8, scales)} if self.zero_point else {})

    def cut(self, suffix: str, part: AxisSlice | None) -> AxisSlice | None:
        """The part of a stored tensor that belongs to the part `part` of the weight; None for all of it."""
        if part is None or part.axis == 0:
            return part
        if suffix and self.group_size is None:
            return None  # a row's scale counts for every rank's part of the row
        unit = self.group_size if suffix else self.per_byte
        assert unit is not None
        return AxisSlice(1, part.start // unit, part.stop // unit)

    def check(self, name: str, shape: Shape, part: AxisSlice | None, sharding: ShardingOptions) -> None:
        """Raises ConfigError when the groups of the weight `name` do not fill its rows, or straddle ranks."""
        if self.group_size is None:
            return
        columns = shape[1]
        if columns % self.group_size:
            raise ConfigError(
                f"{name}: {columns} columns are not whole groups of {self.group_size}; use another --group-size, or int8"
            )
        if part is not None and part.axis == 1 and (part.stop - part.start) % self.group_size:
            raise ConfigError(
                f"{name}: tp_size {sharding.tp_size} gives each rank {part.stop - part.start} columns, which are not whole "
                f"groups of {self.group_size}; use another --group-size or tp_size, or int8"
            )


@dataclass(frozen=True)
class Quantization:
    """What is quantized in a set of weights, and how.

    weights: names, sorted. method: how the integers were found, for people: `nearest`, `gptq`, ...
    activations: what the other factor of their products is rounded to, each row with a scale of its own: fp8, with fp8
        weights, or None, nothing.
    """

    format: WeightFormat
    weights: tuple[str, ...]
    method: str = "nearest"
    activations: str | None = None

    def __post_init__(self) -> None:
        if self.activations is None:
            return
        if self.activations != FP8_ACTIVATIONS or self.format.precision != "fp8":
            raise ConfigError(
                f"{self.activations} activations do not go with {self.format.precision} weights; accepted: fp8 with fp8"
            )

    def __str__(self) -> str:
        activations = "" if self.activations is None else f" with {self.activations} activations"
        return f"{self.format}{activations}, {self.method}"

    @property
    def kind(self) -> str:
        """What a target must be able to run; one of `KINDS`."""
        return (
            self.format.kind
            if self.activations is None
            else f"{self.format.kind} with {self.activations} activations"
        )

    def to_json(self) -> dict[str, Any]:
        data = asdict(self)
        if self.activations is None:
            del data["activations"]
        return data

    @classmethod
    def from_json(cls, data: object, where: str) -> Quantization:
        """The inverse of `to_json`. Raises CheckpointError, naming `where`, on anything else."""
        try:
            assert isinstance(data, Mapping) and data.keys() - {"activations"} == {
                "format",
                "weights",
                "method",
            }
            weights = data["weights"]
            assert isinstance(weights, list) and all(isinstance(name, str) for name in weights)
            how = WeightFormat(**data["format"])
            return cls(how, tuple(weights), str(data["method"]), data.get("activations"))
        except (AssertionError, TypeError):
            raise CheckpointError(
                f"{where}: quantization must be an object with format, weights and method"
            ) from None
        except ConfigError as error:
            raise CheckpointError(f"{where}: {error}") from None


@dataclass(frozen=True)
class QuantizeOptions:
    """What a user asks for. lm_head: quantize the language-model head too, which then shares nothing with the embedding;
    activations: see `Quantization`."""

    format: WeightFormat
    lm_head: bool = False
    activations: str | None = None

    def choose(self, weights: Iterable[ResolvedWeight], method: str = "nearest") -> Quantization:
        """What is done to `weights`.

        Raises ConfigError when there are none: the family's table marks none as quantizable.
        """
        chosen = sorted(
            weight.name
            for weight in weights
            if (self.lm_head if weight.shard is Shard.VOCAB_HEAD else weight.quantizable)
            and len(weight.shape) == 2
        )
        if not chosen:
            raise ConfigError(
                "weight-only quantization: the model's weight table marks no weight as quantizable"
            )
        return Quantization(self.format, tuple(chosen), method, self.activations)
