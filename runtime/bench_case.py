"""A batch to time. Imports nothing heavy: command lines are read before ranks are started."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.errors import ConfigError


@dataclass(frozen=True)
class Case:
    """A fixed batch. Lengths are in tokens; an output of one token times the prompts alone."""

    batch: int
    input_len: int
    output_len: int

    @classmethod
    def parse(cls, text: str) -> Case:
        """`64x512x128` -> 64 sequences, 512 tokens in and 128 out. Raises ConfigError."""
        parts = text.split("x")
        if len(parts) != 3 or not all(part.isdecimal() and int(part) > 0 for part in parts):
            raise ConfigError(
                f"case {text!r}: accepted: BxIxO, sequences, tokens in and tokens out, as 64x512x128"
            )
        return cls(*map(int, parts))
