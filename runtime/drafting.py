"""How many guessed tokens a step verifies: as many as make more tokens per second, by what steps have cost so far.

A step with guesses gives more tokens and takes longer: little where reading the weights is what takes the time, much where a
step is short or has many sequences already. Neither is known beforehand, so both are measured: the share of guesses that come
true (`prompt_lookup.Rates`), and the seconds of steps. Where guesses do not pay, decode steps run ahead of the host as if there
were none; what would have been guessed is still compared with what came: a text that begins to repeat itself is noticed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate

from .prompt_lookup import Lookup, PromptLookup, Rates

HOLD, MAX_HOLD = 16, 128
"""Steps that run ahead before it is asked again whether guesses pay: twice as many after every no, for each start drains the
device. On an H100, 125M and 8 sequences, 16 each time cost 14 % of the tokens per second."""
MARGIN = 1.05
"""How much faster a step with guesses has to promise to be: what is measured is never quite right."""
_AHEAD, _BUCKETS = -1, 12


class StepCosts:
    """Seconds of steps as measured lately, by their number of sequences and of guessed tokens, in powers of two.

    SHARE:   of a new measurement in what is known; no more than OUTLIER times that counts, for the machine has others to serve
    FORGET:  what every refusal for its cost leaves of it until it is measured: so it is tried again one day
    REFRESH: steps of the host after which those without guesses are measured again
    SLOPE:   what a guessed token is taken to cost, as a share of the step, where nothing is known
    """

    SHARE, OUTLIER, FORGET, REFRESH, SLOPE = 0.25, 2.0, 0.99, 512, 0.05

    def __init__(self) -> None:
        self._seconds: dict[tuple[int, int], float | None] = {}
        self._refusals: Counter[tuple[int, int]] = Counter()
        self._age: dict[int, int] = {}

    def plain(self, sequences: int) -> float | None:
        """Of a step without guesses: one that runs ahead, or one of the host where that is known to take no longer. None: to
        be measured (again)."""
        size = sequences.bit_length()
        if self._age.get(size, self.REFRESH) >= self.REFRESH:
            return None
        return min(filter(None, (self._seconds.get((size, kind)) for kind in (_AHEAD, 0))), default=None)

    def of(self, sequences: int) -> Callable[[int], float]:
        """Of a step of the host, by its guessed tokens: no more than one with more of them. What was not measured is estimated
        from what fewer cost; `plain` is known."""
        size = sequences.bit_length()
        known = {one: hoped for one in range(_AHEAD, _BUCKETS) if (hoped := self._hoped(size, one))}
        least = list(accumulate((known.get(one, math.inf) for one in range(_BUCKETS - 1, -1, -1)), min))[::-1]

        def seconds(drafted: int) -> float:
            bucket = _bucket(drafted)
            if bucket in known:
                return least[bucket]
            below = max(one for one in known if one < bucket)
            tokens = (1 << max(0, below)) // 2
            slope = (known[below] - known[0]) / tokens if tokens and 0 in known else self.SLOPE * known[below]
            return min(least[bucket], known[below] + max(0.0, slope) * (drafted - tokens))

        return seconds

    def measured(self, sequences: int, drafted: int | None, seconds: float) -> None:
        """drafted: None for a step that ran ahead. The first of a kind is not typical: memory is touched, code is made."""
        size, seconds = sequences.bit_length(), max(seconds, 1e-9)
        key = (size, _AHEAD if drafted is None else _bucket(drafted))
        if key not in self._seconds:
            self._seconds[key] = None
            return
        before = self._seconds[key]
        if before is not None:
            seconds = before + self.SHARE * (min(seconds, self.OUTLIER * before) - before)
        self._seconds[key] = seconds
        self._refusals[key] = 0
        self._age[size] = self._age.get(size, self.REFRESH) + 1 if drafted else 0

    def refused(self, sequences: int, drafted: range) -> None:
        """So many tokens were not worth their cost."""
        for bucket in {_bucket(number) for number in drafted}:
            self._refusals[sequences.bit_length(), bucket] += 1

    def _hoped(self, size: int, bucket: int) -> float | None:
        seconds = self._seconds.get((size, bucket))
        return seconds and seconds * self.FORGET ** self._refusals[size, bucket]


def _bucket(drafted: int) -> int:
    return min(drafted.bit_length(), _BUCKETS - 1)


class Drafting:
    """Decides for all sequences of an engine what is guessed. max_tokens: of a step with guesses, None: no limit of its own."""

    def __init__(self, max_tokens: int | None = None) -> None:
        self.max_tokens = max_tokens
        self.costs = StepCosts()
        self.hold = HOLD // 2
        """Steps that may run ahead when `pays` has said no."""
        self._rates = Rates()

    def lookup(self, config: PromptLookup) -> Lookup:
        """For a new sequence."""
        return Lookup(config, self._rates)

    def lengths(self, chances: Sequence[Sequence[float]], sequences: int) -> list[int]:
        """How many of its guessed tokens each should run, in a step of the host with so many sequences.

        chances: of the tokens guessed for one sequence, falling
        """
        taken = self._take(chances, sequences)
        self.costs.refused(sequences, range(1 << len(taken).bit_length(), sum(map(len, chances)) + 1))
        counts = Counter(row for _, row in taken)
        return [counts[row] for row in range(len(chances))]

    def pays(self, lookups: Iterable[tuple[Lookup, Sequence[int]]], sequences: int) -> bool:
        """Whether the host should run the next step, instead of letting `hold` of them run ahead.

        lookups: those of the sequences that have one, with all tokens so far
        """
        plain = self.costs.plain(sequences)
        if plain is None:
            return False
        known = [(lookup, lookup.propose(token_ids, len(token_ids))) for lookup, token_ids in lookups]
        likely = [lookup.likely() for lookup, _ in known]
        if (
            self._take([lookup.chances(len(guess)) for lookup, guess in known], sequences)
            or self._speed(likely, sequences) > sequences / plain
        ):
            self.hold = HOLD // 2
            return True
        self.hold = min(2 * self.hold, MAX_HOLD)
        self.costs.refused(sequences, range(sum(len(chances) for _, chances in likely) + 1))
        return False

    def _take(self, chances: Sequence[Sequence[float]], sequences: int) -> list[tuple[float, int]]:
        """The guessed tokens that are worth their cost, each (chance, row of `chances`)."""
        plain = self.costs.plain(sequences)
        if plain is None:
            return []
        cost = self.costs.of(sequences)
        ranked = sorted(((one, row) for row, ones in enumerate(chances) for one in ones), reverse=True)
        count, gain, best = 0, 0.0, MARGIN * sequences / plain
        for number, (chance, _) in enumerate(ranked, 1):
            gain += chance
            speed = (sequences + gain) / cost(number)
            if speed > best:
                count, best = number, speed
        return ranked[:count]

    def _speed(self, likely: Sequence[tuple[float, Sequence[float]]], sequences: int) -> float:
        """Tokens per second of host steps, from how likely each sequence has a guess, and the chances of its tokens then."""
        taken = self._take([chances for _, chances in likely], sequences)
        gain = sum(likely[row][0] * chance for chance, row in taken)
        drafted = sum(likely[row][0] for _, row in taken)
        some = 1.0 - math.prod(1.0 - likely[row][0] for row in {row for _, row in taken})
        cost = self.costs.of(sequences)
        longer = cost(round(drafted / some)) if some else 0.0
        return (sequences + gain) / ((1.0 - some) * cost(0) + some * longer)
