"""How many guessed tokens a step verifies: as many as make more tokens per second, by what steps have cost so far.

A step with guesses gives more tokens and takes longer: little where reading the weights is what takes the time, much where a
step is short or has many sequences already. Neither is known beforehand, so both are measured: the share of guesses that come
true (`prompt_lookup.Rates`), and the seconds of steps. Where guesses do not pay, decode steps run ahead of the host as if there
were none; what would have been guessed is still compared with what came: a text that begins to repeat itself is noticed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from math import prod

from .prompt_lookup import Lookup, PromptLookup, Rates

HOLD = 16
"""Steps that run ahead before it is asked again whether guesses pay."""
_AHEAD, _BUCKETS = -1, 12


class StepCosts:
    """Seconds of steps as measured lately, by their number of sequences and of guessed tokens, in powers of two.

    SHARE:   of a new measurement in what is known; no more than OUTLIER times that counts, for the machine has others to serve
    FORGET:  what every refusal of guesses leaves of their cost until one is measured: so they are tried again one day
    REFRESH: steps of the host after which those without guesses are measured again
    SLOPE:   what a guessed token is taken to cost, as a share of the step, where nothing is known
    """

    SHARE, OUTLIER, FORGET, REFRESH, SLOPE = 0.25, 2.0, 0.995, 512, 0.05

    def __init__(self) -> None:
        self._seconds: dict[tuple[int, int], float | None] = {}
        self._age: dict[int, int] = {}
        self._refused: dict[int, int] = {}

    def plain(self, sequences: int) -> float | None:
        """Of a step without guesses, one that runs ahead of the host where there are such. None: to be measured (again)."""
        size = sequences.bit_length()
        if self._age.get(size, self.REFRESH) >= self.REFRESH:
            return None
        return self._seconds.get((size, _AHEAD)) or self._seconds.get((size, 0))

    def of(self, sequences: int, drafted: int) -> float:
        """Of a step of the host: no more than one with more tokens. What was not measured is estimated from what fewer tokens
        cost; `plain` is known."""
        size, bucket = sequences.bit_length(), min(drafted.bit_length(), _BUCKETS - 1)
        measured = [self._seconds.get((size, known)) for known in range(bucket, _BUCKETS)]
        below = next(known for known in range(bucket, _AHEAD - 1, -1) if self._seconds.get((size, known)))
        least, host = self._seconds[size, below], self._seconds.get((size, 0))
        assert least is not None
        tokens = (1 << max(0, below)) // 2
        slope = (least - host) / tokens if tokens and host else self.SLOPE * least
        estimate = least if below == bucket else least + max(0.0, slope) * (drafted - tokens)
        return min([estimate, *filter(None, measured)]) * self.FORGET ** self._refused.get(size, 0)

    def measured(self, sequences: int, drafted: int | None, seconds: float) -> None:
        """drafted: None for a step that ran ahead. The first of a kind is not typical: memory is touched, code is made."""
        size, seconds = sequences.bit_length(), max(seconds, 1e-9)
        key = (size, _AHEAD if drafted is None else min(drafted.bit_length(), _BUCKETS - 1))
        if key not in self._seconds:
            self._seconds[key] = None
            return
        if drafted is not None:
            self._refused[size] = 0
        before = self._seconds[key]
        if before is not None:
            seconds = before + self.SHARE * (min(seconds, self.OUTLIER * before) - before)
        self._seconds[key] = seconds
        self._age[size] = self._age.get(size, self.REFRESH) + 1 if drafted else 0

    def refused(self, sequences: int) -> None:
        """After guesses were not worth their cost."""
        size = sequences.bit_length()
        self._refused[size] = self._refused.get(size, 0) + 1


class Drafting:
    """Decides for all sequences of an engine what is guessed. max_tokens: of a step with guesses, None: no limit of its own."""

    def __init__(self, max_tokens: int | None = None) -> None:
        self.max_tokens = max_tokens
        self.costs = StepCosts()
        self._rates = Rates()

    def lookup(self, config: PromptLookup) -> Lookup:
        """For a new sequence."""
        return Lookup(config, self._rates)

    def lengths(self, chances: Sequence[Sequence[float]], sequences: int) -> list[int]:
        """How many of its guessed tokens each should run, in a step of the host with so many sequences.

        chances: of the tokens guessed for one sequence, falling
        """
        taken = self._take(chances, sequences)
        if not taken and any(chances):
            self.costs.refused(sequences)
        counts = Counter(row for _, row in taken)
        return [counts[row] for row in range(len(chances))]

    def pays(self, lookups: Iterable[tuple[Lookup, Sequence[int]]], sequences: int) -> bool:
        """Whether the host should run the next step, instead of letting `HOLD` of them run ahead.

        lookups: those of the sequences that have one, with all tokens so far
        """
        plain = self.costs.plain(sequences)
        if plain is None:
            return False
        known = [(lookup, lookup.propose(token_ids, len(token_ids))) for lookup, token_ids in lookups]
        if (
            self._take([lookup.chances(len(guess)) for lookup, guess in known], sequences)
            or self._speed([lookup.likely() for lookup, _ in known], sequences) > sequences / plain
        ):
            return True
        self.costs.refused(sequences)
        return False

    def _take(self, chances: Sequence[Sequence[float]], sequences: int) -> list[tuple[float, int]]:
        """The guessed tokens that are worth their cost, each (chance, row of `chances`)."""
        plain = self.costs.plain(sequences)
        if plain is None:
            return []
        ranked = sorted(((one, row) for row, ones in enumerate(chances) for one in ones), reverse=True)
        count, gain, best = 0, 0.0, sequences / plain
        for number, (chance, _) in enumerate(ranked, 1):
            gain += chance
            speed = (sequences + gain) / self.costs.of(sequences, number)
            if speed > best:
                count, best = number, speed
        return ranked[:count]

    def _speed(self, likely: Sequence[tuple[float, Sequence[float]]], sequences: int) -> float:
        """Tokens per second of host steps, from how likely each sequence has a guess, and the chances of its tokens then."""
        taken = self._take([chances for _, chances in likely], sequences)
        gain = sum(likely[row][0] * chance for chance, row in taken)
        drafted = sum(likely[row][0] for _, row in taken)
        some = 1.0 - prod(1.0 - likely[row][0] for row in {row for _, row in taken})
        longer = self.costs.of(sequences, round(drafted / some)) if some else 0.0
        return (sequences + gain) / ((1.0 - some) * self.costs.of(sequences, 0) + some * longer)
