"""What one engine step computes: parts of requests."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from .request import Request


class ScheduledRequest(NamedTuple):
    """The part of one request that runs in a step: tokens first .. first + num_tokens - 1.

    num_prompt_rows: logits rows, just before the last one of `samples`, that score prompt tokens
    samples:         the part ends at the last known token, so that its logits choose the next one
    draft:           tokens that may follow, run behind the part; each has a row of logits, after that of `samples`
    """

    request: Request
    first: int
    num_tokens: int
    num_prompt_rows: int
    samples: bool
    draft: tuple[int, ...] = ()

    @property
    def end(self) -> int:
        return self.first + self.num_tokens

    @property
    def wants_token_alone(self) -> bool:
        """Whether the largest logit's index is all that is asked of the part's logits."""
        return self.request.params.plain_greedy and not self.num_prompt_rows

    @property
    def num_rows(self) -> int:
        return self.num_prompt_rows + self.samples + len(self.draft)

    @property
    def token_ids(self) -> array[int]:
        """What runs, the draft included."""
        token_ids = self.request.token_ids[self.first : self.end]
        token_ids.extend(self.draft)
        return token_ids


@dataclass(frozen=True)
class Batch:
    """One engine step: sequences that decode first, prefill after them. Empty when nothing can run."""

    scheduled: tuple[ScheduledRequest, ...]

    @property
    def num_tokens(self) -> int:
        return count_tokens(self.scheduled)

    @property
    def sampling(self) -> list[Request]:
        """The requests that get a token from this step, in the order of their logits rows."""
        return [part.request for part in self.scheduled if part.samples]


def count_tokens(scheduled: Iterable[ScheduledRequest]) -> int:
    return sum(part.num_tokens + len(part.draft) for part in scheduled)


def next_part(request: Request, num_tokens: int) -> ScheduledRequest:
    """The next `num_tokens` tokens of a request, with the logits rows it wants from them."""
    first = request.num_computed_tokens
    end = first + num_tokens
    num_prompt_rows = 0
    if request.params.prompt_logprobs is not None:
        # Row i scores token i + 1. What was reported before a preemption is not asked for again.
        start = max(first, len(request.prompt_logprobs) - 1)
        num_prompt_rows = max(0, min(end, request.num_prompt_tokens - 1) - start)
    return ScheduledRequest(request, first, num_tokens, num_prompt_rows, samples=end == request.num_tokens)
