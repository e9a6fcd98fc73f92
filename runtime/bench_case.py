"""What to time. Imports nothing heavy: command lines are read before ranks are started."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.config import BuildConfig
from ..core.errors import ConfigError, RequestError

MIXED_INPUT, MIXED_OUTPUT = (64, 512), (32, 256)
"""Tokens of a request of the mixed load, at least and at most."""
LARGEST = 1_000_000
"""Of all numbers: requests beyond it would fill the memory of the host before anything is timed."""


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
        longest = len(str(LARGEST))  # first: Python reads no number of thousands of digits
        if len(parts) != 3 or not all(
            part.isdecimal() and len(part) <= longest and 1 <= int(part) <= LARGEST for part in parts
        ):
            raise ConfigError(
                f"case {text[:80]!r}: accepted: BxIxO, sequences, tokens in and tokens out, as 64x512x128, "
                f"each 1 to {LARGEST}"
            )
        return cls(*map(int, parts))


@dataclass(frozen=True)
class Load:
    """What to time. Lengths are in tokens. cases: instead of `batches`, each with lengths of its own.

    Raises ConfigError naming the number that is too small or too large.
    """

    batches: tuple[int, ...] = (1, 8, 64)
    input_len: int = 512
    output_len: int = 128
    mixed: int = 0
    """Requests of the mixed load, of MIXED_INPUT tokens in and MIXED_OUTPUT out; 0: none."""
    repeat: int = 3
    seed: int = 0
    cases: tuple[Case, ...] = ()

    def __post_init__(self) -> None:
        numbers = [("batch", batch, 1) for batch in self.batches]
        numbers += [(name, getattr(self, name), 1) for name in ("input_len", "output_len", "repeat")]
        for name, value, least in (*numbers, ("mixed", self.mixed, 0)):
            if not least <= value <= LARGEST:
                raise ConfigError(f"{name} is {value}; accepted: {least} to {LARGEST}")

    def fixed(self) -> tuple[Case, ...]:
        """The fixed batches."""
        return self.cases or tuple(Case(batch, self.input_len, self.output_len) for batch in self.batches)

    def check_fits(self, build: BuildConfig) -> None:
        """Raises RequestError naming the first case with a sequence that an engine cannot hold."""
        longest = [Case(self.mixed, MIXED_INPUT[1], MIXED_OUTPUT[1])] if self.mixed else []
        for case in (*self.fixed(), *longest):
            if case.input_len > build.max_input_len or case.input_len + case.output_len > build.max_seq_len:
                raise RequestError(
                    f"{case.input_len} tokens in and {case.output_len} out; the engine takes max_input_len = "
                    f"{build.max_input_len} and max_seq_len = {build.max_seq_len} together"
                )
