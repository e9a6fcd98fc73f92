"""Typed reading of a Hugging Face config.json, for the config hooks of families."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from .config import is_token_id
from .errors import ConfigError

T = TypeVar("T")
_REQUIRED: Any = object()


class HFConfigReader:
    """Reads fields of a config.json; every method raises ConfigError naming the field, its value and what is accepted.

    A field that is absent or null has its `default`; a field without default must be there.
    """

    def __init__(self, hf_config: Mapping[str, Any], family: str, where: str = "config.json") -> None:
        """where: the file, for messages."""
        self._config = hf_config
        self._family = family
        self._where = where

    def _get(self, name: str, default: Any) -> Any:
        value = self._config.get(name)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise ConfigError(f"{self._where}: field {name!r} is missing; family {self._family} needs it")
        return default

    def _refuse(self, name: str, value: object, accepted: str) -> ConfigError:
        return ConfigError(f"{self._where}: field {name!r} is {value!r}; accepted: {accepted}")

    def positive_int(self, name: str, default: int = _REQUIRED) -> int:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self._refuse(name, value, "a positive integer")
        return value

    def number(self, name: str, default: float = _REQUIRED) -> float:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._refuse(name, value, "a number")
        return float(value)

    def boolean(self, name: str, default: bool = _REQUIRED) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self._refuse(name, value, "true or false")
        return value

    def choice(self, name: str, choices: Mapping[str, T], default: str = _REQUIRED) -> T:
        """The value of `choices` that the field's text names."""
        value = self._get(name, default)
        if not isinstance(value, str) or value not in choices:
            raise self._refuse(name, value, ", ".join(choices))
        return choices[value]

    def token_ids(self, name: str, default: tuple[int, ...] = ()) -> tuple[int, ...]:
        """One token id or a list of them, as a tuple."""
        value = self._get(name, default)
        ids = tuple(value) if isinstance(value, list | tuple) else (value,)
        if not all(map(is_token_id, ids)):
            raise self._refuse(name, value, "a token id or a list of token ids")
        return ids

    def token_id(self, name: str, default: int | None = None) -> int | None:
        ids = self.token_ids(name, () if default is None else (default,))
        return ids[0] if ids else None

    def architecture(self) -> str:
        """`architectures[0]`, or an empty text where the file names none (the family was chosen by the user)."""
        names = self._get("architectures", [])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise self._refuse("architectures", names, "a list of names")
        return names[0] if names else ""

    def dtype(self, default: str) -> str:
        """`dtype`, or `torch_dtype` as files of transformers 4 have it."""
        return str(self._get("dtype", self._get("torch_dtype", default)))
