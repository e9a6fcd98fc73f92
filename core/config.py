"""Configurations: what a model is (`ModelConfig`) and what an engine of it shall be able to do (`BuildConfig`).

Both are frozen, checked once when they are made, and travel as JSON in checkpoints and engines.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Any, Self, TypedDict, get_args, get_origin, get_type_hints

from .dtypes import DType, parse_model_dtype
from .errors import ConfigError

MAX_LAYERS = 10_000
"""Far more than any model has; weights and graph are listed layer by layer, which takes minutes for millions."""


class AttentionSizes(TypedDict):
    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer, as far as the core and the runtime need to know it.

    A family that needs more (where its norms stand, say) derives a frozen dataclass of its own; the extra fields must
    be JSON values. Sizes are those of the whole model, never of one rank's part.
    """

    family: str
    """Name of the plugin that owns the model: the name of its entry point."""
    architecture: str
    """`architectures[0]` of the Hugging Face config.json."""
    dtype: DType
    """Type of weights and activations."""
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    max_positions: int
    """Longest sequence, in tokens, that the position information of the model covers."""
    tie_word_embeddings: bool
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        sizes = (
            "vocab_size",
            "hidden_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "ffn_size",
            "max_positions",
        )
        for name in sizes:
            require_positive_int(getattr(self, name), f"{self.family} config: {name}")
        if not isinstance(self.dtype, DType):
            raise ConfigError(
                f"{self.family} config: dtype {self.dtype!r} is not a DType; parse_model_dtype makes one"
            )
        for name in ("bos_token_id", "pad_token_id"):
            value = getattr(self, name)
            if value is not None and not is_token_id(value):
                raise ConfigError(f"{self.family} config: {name}: {value!r} is not a token id")
        if not isinstance(self.eos_token_ids, tuple) or not all(map(is_token_id, self.eos_token_ids)):
            raise ConfigError(
                f"{self.family} config: eos_token_ids: {self.eos_token_ids!r} is not a tuple of token ids"
            )
        if self.num_layers > MAX_LAYERS:
            raise ConfigError(
                f"{self.family} config: num_layers {self.num_layers} is too large; accepted: 1 to {MAX_LAYERS}"
            )
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"{self.family} config: num_heads {self.num_heads} is not a multiple of "
                f"num_kv_heads {self.num_kv_heads}"
            )

    @property
    def attention_sizes(self) -> AttentionSizes:
        """What `layers.self_attention` needs to know of the heads."""
        return {"num_heads": self.num_heads, "num_kv_heads": self.num_kv_heads, "head_dim": self.head_dim}

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: str = "config.json") -> Self:
        """The inverse of `to_json`. Raises ConfigError for unknown, missing or bad fields."""
        values = checked_fields(cls, data, where)
        values["dtype"] = parse_model_dtype(values["dtype"], where)
        values["eos_token_ids"] = tuple(values.get("eos_token_ids", ()))
        return cls(**values)

    def base(self) -> ModelConfig:
        """The fields every family has: what an engine keeps, so that it runs without the family's plugin."""
        names = [f.name for f in dataclasses.fields(ModelConfig)]
        return ModelConfig(**{name: getattr(self, name) for name in names})


PAGE_SIZES = (16, 32, 64)
KV_CACHE_DTYPES: Mapping[str, DType | None] = {"auto": None, "fp8": DType.FLOAT8_E4M3}
"""What a KV cache can hold: k and v in the model's dtype, or rounded to e4m3 numbers."""
TARGETS = ("cpu", "cuda", "tensorrt")


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """What an engine is built for. Lengths and sizes are in tokens unless the name says otherwise."""

    max_seq_len: int
    """Longest prompt and output together."""
    max_input_len: int
    """Longest prompt."""
    target: str = "cpu"
    max_batch_size: int = 8
    """Sequences in one step."""
    max_num_tokens: int = 8192
    """Tokens of all sequences in one step; longer prompts are taken in chunks."""
    max_beam_width: int = 1
    """Beams of one prompt; 1: no beam search."""
    page_size: int = 32
    """Tokens of one page of the KV cache."""
    kv_cache_dtype: str = "auto"
    """What the KV cache holds, a key of KV_CACHE_DTYPES."""
    tp_size: int = 1
    """Ranks that share each layer."""
    pp_size: int = 1
    """Stages that the layers are dealt out to."""
    target_options: Mapping[str, Any] = field(default_factory=dict)
    """Options that only the target knows (compute capabilities, profiles, ...); JSON values."""

    def __post_init__(self) -> None:
        for name in (
            "max_batch_size",
            "max_input_len",
            "max_seq_len",
            "max_num_tokens",
            "max_beam_width",
            "tp_size",
            "pp_size",
        ):
            require_positive_int(getattr(self, name), f"build option {name}")
        if self.page_size not in PAGE_SIZES:
            raise ConfigError(
                f"build option page_size: {self.page_size} is not supported; accepted: {PAGE_SIZES}"
            )
        if self.kv_cache_dtype not in KV_CACHE_DTYPES:
            raise ConfigError(
                f"build option kv_cache_dtype: {self.kv_cache_dtype!r} is not supported; accepted: {', '.join(KV_CACHE_DTYPES)}"
            )
        if self.max_beam_width > self.max_batch_size:
            raise ConfigError(
                f"build option max_beam_width {self.max_beam_width} exceeds max_batch_size {self.max_batch_size}: every beam "
                f"is a sequence of a step"
            )
        if self.max_input_len >= self.max_seq_len:
            raise ConfigError(
                f"build option max_input_len {self.max_input_len} leaves no room for output: "
                f"max_seq_len is {self.max_seq_len}"
            )
        if self.max_num_tokens < self.max_batch_size:
            raise ConfigError(
                f"build option max_num_tokens {self.max_num_tokens} is smaller than max_batch_size "
                f"{self.max_batch_size}: every sequence takes at least one token of a step"
            )

    @classmethod
    def for_model(
        cls,
        model: ModelConfig,
        *,
        max_seq_len: int | None = None,
        max_input_len: int | None = None,
        **options: Any,
    ) -> BuildConfig:
        """The configuration with lengths that are not given taken from the model: all of its positions for a sequence,
        all but one of them for a prompt. Raises ConfigError for options that do not fit each other or the model.
        """
        max_seq_len = model.max_positions if max_seq_len is None else max_seq_len
        max_input_len = max(max_seq_len - 1, 1) if max_input_len is None else max_input_len
        build = cls(max_seq_len=max_seq_len, max_input_len=max_input_len, **options)
        build.check_model(model)
        return build

    @property
    def num_ranks(self) -> int:
        return self.tp_size * self.pp_size

    def check_model(self, model: ModelConfig) -> None:
        """Raises ConfigError when `model` has fewer positions than the longest sequence needs."""
        if self.max_seq_len > model.max_positions:
            raise ConfigError(
                f"build option max_seq_len {self.max_seq_len} exceeds the {model.max_positions} positions "
                f"of the model (max_position_embeddings)"
            )

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: str = "engine.json") -> Self:
        return cls(**checked_fields(cls, data, where))


def is_token_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def require_positive_int(value: object, where: str) -> None:
    """Raises ConfigError unless `value` is an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{where}: {value!r} is not a positive integer")


def checked_fields(cls: type, data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`data`, of JSON values, as a dict of constructor arguments of the dataclass `cls`. ConfigError names those that are
    unknown, missing or of another type."""
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where}: expected an object, found {type(data).__name__}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(data) - set(fields))
    missing = sorted(
        name
        for name, f in fields.items()
        if name not in data and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    )
    if unknown or missing:
        parts = [f"unknown: {', '.join(unknown)}"] * bool(unknown) + [
            f"missing: {', '.join(missing)}"
        ] * bool(missing)
        raise ConfigError(f"{where}: fields do not fit {cls.__name__} ({'; '.join(parts)})")
    types = get_type_hints(cls)
    for name, value in data.items():
        if not _fits(value, types[name]):
            raise ConfigError(f"{where}: {name} is {value!r}; accepted: {_accepted(types[name])}")
    return dict(data)


_JSON_KINDS = {int: "a whole number", bool: "true, false", str: "a text", NoneType: "null"}


def _fits(value: object, kind: Any) -> bool:
    """Whether a JSON value can stand for what a field of type `kind` holds; True for kinds that JSON does not have."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is UnionType:
        return any(_fits(value, argument) for argument in arguments)
    if origin is tuple:
        return isinstance(value, list | tuple) and all(_fits(item, arguments[0]) for item in value)
    if isinstance(origin, type):
        return isinstance(value, origin)
    return type(value) is kind if kind in _JSON_KINDS else True


def _accepted(kind: Any) -> str:
    """What `_fits` accepts, for people."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is UnionType:
        return " or ".join(map(_accepted, arguments))
    return "a list" if origin is tuple else _JSON_KINDS.get(kind, "an object")
