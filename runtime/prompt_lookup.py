"""Prompt lookup: guesses what follows from what stands in the prompt and the output already.

Where the last tokens of a sequence have occurred in it before, the tokens that followed there are tried: they go through the
model together with the last token, in one step, and those that the model chooses as well are kept. The tokens are the ones
of plain greedy decoding; only the number of steps changes (Saxena, "Prompt Lookup Decoding", 2023). Plain Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..core.errors import RequestError


@dataclass(frozen=True)
class PromptLookup:
    """How to guess: the last `ngram` tokens are looked up, and at most `num_tokens` are tried. Raises RequestError."""

    ngram: int
    num_tokens: int

    def __post_init__(self) -> None:
        for value in (self.ngram, self.num_tokens):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise _refusal(f"{self.ngram}:{self.num_tokens}")

    @classmethod
    def parse(cls, text: str) -> PromptLookup:
        """`3:8` -> the last 3 tokens are looked up, at most 8 are tried. Raises RequestError."""
        ngram, colon, num_tokens = text.partition(":")
        if not (colon and ngram.isdecimal() and num_tokens.isdecimal()):
            raise _refusal(text)
        return cls(int(ngram), int(num_tokens))


def _refusal(text: str) -> RequestError:
    return RequestError(
        f"prompt_lookup is {text}; accepted: N:K, the last N tokens are looked up and K are tried, both at least 1"
    )


@dataclass
class LookupStats:
    """What guessing has brought. steps: those with a guess; proposed, accepted: tokens that were guessed, and rightly so.

    Every step of a sequence gives one token; an accepted token is one more.
    """

    steps: int = 0
    proposed: int = 0
    accepted: int = 0

    @property
    def acceptance(self) -> float:
        return self.accepted / self.proposed if self.proposed else 0.0

    def since(self, earlier: LookupStats) -> LookupStats:
        return LookupStats(
            self.steps - earlier.steps, self.proposed - earlier.proposed, self.accepted - earlier.accepted
        )

    def tokens_per_step(self, num_tokens: int) -> float:
        """Of sequences that have got `num_tokens` tokens meanwhile."""
        return num_tokens / max(1, num_tokens - self.accepted)

    def describe(self, num_tokens: int) -> str:
        """One line for people; num_tokens: what all sequences have got."""
        return (
            f"{self.accepted} of {self.proposed} guessed tokens accepted ({100 * self.acceptance:.1f} %), "
            f"{self.tokens_per_step(num_tokens):.2f} tokens per step of a sequence"
        )


class Lookup:
    """The n-grams of one growing sequence, each with the place after its last occurrence but the one at the end."""

    def __init__(self, config: PromptLookup) -> None:
        self._config = config
        self._after: dict[tuple[int, ...], int] = {}
        self._seen = 0
        """Leading tokens whose n-grams are known."""

    def propose(self, token_ids: Sequence[int], limit: int) -> tuple[int, ...]:
        """At most `limit` tokens that may follow `token_ids`, a sequence that has only grown since the last call."""
        size = self._config.ngram
        for end in range(
            max(self._seen, size), len(token_ids)
        ):  # an n-gram ends before `end`; the last one is asked for
            self._after[tuple(token_ids[end - size : end])] = end
        self._seen = max(self._seen, len(token_ids))
        start = self._after.get(tuple(token_ids[-size:]))
        if start is None or len(token_ids) < size:
            return ()
        return tuple(token_ids[start : start + min(limit, self._config.num_tokens)])
