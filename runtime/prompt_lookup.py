"""Prompt lookup: guesses what follows from what stands in the prompt and the output already.

Where the last tokens of a sequence have occurred in it before, the tokens that followed there are tried: they go through the
model together with the last token, in one step, and those that the model chooses as well are kept. The tokens are the ones
of plain greedy decoding; only the number of steps changes (Saxena, "Prompt Lookup Decoding", 2023). Plain Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

from ..core.errors import RequestError

_MOST = 1000
"""Tokens: far more than one step verifies, and than repeat by chance."""


@dataclass(frozen=True)
class PromptLookup:
    """How to guess: the last `ngram` tokens are looked up, and at most `num_tokens` are tried. Raises RequestError."""

    ngram: int
    num_tokens: int

    def __post_init__(self) -> None:
        for name, value in (("ngram", self.ngram), ("num_tokens", self.num_tokens)):
            if not isinstance(value, Integral) or isinstance(value, bool) or not 1 <= value <= _MOST:
                raise _refusal(f"{self.ngram}:{self.num_tokens}")
            object.__setattr__(self, name, int(value))  # of numpy's too, as in SamplingParams

    @classmethod
    def parse(cls, text: str) -> PromptLookup:
        """`3:8` -> the last 3 tokens are looked up, at most 8 are tried. Raises RequestError."""
        ngram, colon, num_tokens = text.partition(":")
        if not (colon and all(part.isdecimal() and len(part) < 10 for part in (ngram, num_tokens))):
            raise _refusal(text)
        return cls(int(ngram), int(num_tokens))


def _refusal(text: str) -> RequestError:
    return RequestError(
        f"prompt_lookup is {text}; accepted: N:K, the last N tokens are looked up and K are tried, both 1 to {_MOST}"
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


WINDOW, SHARED_WINDOW = 20, 1000
"""Observations after which a sequence, and all sequences together, have forgotten most of what they saw before."""
_PRIOR_WEIGHT = 4.0


class Rate:
    """How often something has come true lately; while little is known, how often it has elsewhere."""

    def __init__(self, prior: Rate | float, window: int) -> None:
        self._prior, self._keep = prior, 1.0 - 1.0 / window
        self._hits = self._trials = 0.0

    @property
    def value(self) -> float:
        prior = self._prior.value if isinstance(self._prior, Rate) else self._prior
        return (self._hits + _PRIOR_WEIGHT * prior) / (self._trials + _PRIOR_WEIGHT)

    def add(self, hit: bool) -> None:
        self._hits = self._hits * self._keep + hit
        self._trials = self._trials * self._keep + 1.0
        if isinstance(self._prior, Rate):
            self._prior.add(hit)


class Rates:
    """What is known of the guesses for a sequence, or for all; counted for every token, whether its guess was tried or not.

    match: tokens for which there was a guess
    first: guesses that were right, after none or a wrong one; then: after a right one
    """

    def __init__(self, shared: Rates | None = None) -> None:
        """shared: what a sequence starts with, and adds to."""
        window = SHARED_WINDOW if shared is None else WINDOW
        self.match: Rate = Rate(0.5 if shared is None else shared.match, window)
        self.first: Rate = Rate(0.5 if shared is None else shared.first, window)
        self.then: Rate = Rate(0.7 if shared is None else shared.then, window)


class Lookup:
    """The n-grams of one growing sequence, each with the place after its last occurrence but the one at the end."""

    def __init__(self, config: PromptLookup, shared: Rates | None = None) -> None:
        self.rates = Rates(shared)
        self._config = config
        self._after: dict[tuple[int, ...], int] = {}
        self._seen = 0
        """Leading tokens whose n-grams are known."""
        self._source: int | None = None
        """Where the token stands that is the guess for the next one."""
        self._copying = False
        """The last token was guessed rightly."""

    def extend(self, token_ids: Sequence[int]) -> None:
        """Learns what `token_ids`, a sequence that only grows, holds beyond what it held at the last call: once per token."""
        size, output = self._config.ngram, self._seen > 0
        for end in range(self._seen, len(token_ids)):
            if output:
                self._score(token_ids, token_ids[end])
            if end + 1 >= size:
                ngram = tuple(token_ids[end + 1 - size : end + 1])
                self._source = self._after.get(ngram)
                self._after[ngram] = end + 1
        self._seen = max(self._seen, len(token_ids))

    def propose(self, token_ids: Sequence[int], limit: int) -> tuple[int, ...]:
        """At most `limit` tokens that may follow `token_ids`, a sequence that has only grown since the last call."""
        self.extend(token_ids)
        count = min(limit, self._config.num_tokens)
        if self._source is None or count < 1:
            return ()
        known = tuple(token_ids[self._source : self._source + count])
        # What reaches the end of the sequence repeats itself from there.
        return (known * -(-count // len(known)))[:count]

    def chances(self, count: int) -> list[float]:
        """For each of `count` guessed tokens, how likely it and all before it are right."""
        chance = (self.rates.then if self._copying else self.rates.first).value
        then = self.rates.then.value
        return [chance * then**i for i in range(count)]

    def likely(self) -> tuple[float, list[float]]:
        """How likely there is a guess for a token to come, and the chances of its tokens then."""
        first, then = self.rates.first.value, self.rates.then.value
        return self.rates.match.value, [first * then**i for i in range(self._config.num_tokens)]

    def _score(self, token_ids: Sequence[int], token_id: int) -> None:
        self.rates.match.add(self._source is not None)
        right = self._source is not None and token_ids[self._source] == token_id
        if self._source is not None:
            (self.rates.then if self._copying else self.rates.first).add(right)
        self._copying = right
