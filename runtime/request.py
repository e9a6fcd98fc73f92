"""The state of one sequence from arrival to its last token."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from ..core.errors import RequestError
from .bad_words import NONE, BadWords
from .kv_cache import PageKey
from .outputs import FinishReason, Logprob
from .prompt_lookup import Lookup
from .sampling_params import SamplingParams

PENDING = -1
"""Stands for a token that a step under way is choosing."""

PRIORITY_STEP = 1024
"""Places in line that one step of priority is worth. A waiting request is overtaken by so many newcomers at most, for each
step that they are ahead: enough that priorities decide, and nobody waits for ever."""


class RequestStatus(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)
class Request:
    """One sequence. Compared by identity. The scheduler owns status, arrival, pages and counts.

    request_id:          unique among unfinished requests
    prompt_token_ids:    at least one
    eos_token_ids:       the model's end-of-sequence ids; they count for nothing under `params.ignore_eos`
    bad_words:           what must not come about in token_ids
    seed, sample_index:  key of its random stream; sample_index tells the n completions, or the beams, of one prompt apart
    priority:            its place in line as if it had come so many times `PRIORITY_STEP` requests later, or earlier
    token_ids:           prompt and output, 32 bits each: steps and page keys take them as they lie
    logprobs:            per output token, filled when `params.logprobs` is set
    prompt_logprobs:     per prompt token (None for the first), filled when `params.prompt_logprobs` is set
    lookup:              what guesses its next tokens, given by the scheduler where `params.prompt_lookup` asks for it
    num_computed_tokens: leading tokens whose keys and values are in the cache
    page_ids:            its cache pages, in the order of the sequence
    page_keys:           content of its leading full pages, as far as somebody wanted to know
    num_cached_tokens:   prompt tokens that were in the cache when it first got pages; None before
    arrival:             how many requests came before it, given once
    max_total_tokens:    tokens, prompt and output, at which it ends, given by the scheduler
    ending_token_ids:    the tokens that end it
    num_pending:         tokens at the end of token_ids that are being chosen: `PENDING` stands for each
    """

    request_id: str
    prompt_token_ids: Sequence[int]
    params: SamplingParams
    eos_token_ids: frozenset[int] = frozenset()
    seed: int = 0
    sample_index: int = 0
    bad_words: BadWords = NONE
    priority: int = 0

    token_ids: array[int] = field(init=False)
    output_token_ids: list[int] = field(init=False, default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(init=False, default_factory=list)
    prompt_logprobs: list[dict[int, Logprob] | None] = field(init=False, default_factory=list)
    num_computed_tokens: int = field(init=False, default=0)
    page_ids: list[int] = field(init=False, default_factory=list)
    page_keys: list[PageKey] = field(init=False, default_factory=list)
    num_cached_tokens: int | None = field(init=False, default=None)
    status: RequestStatus = field(init=False, default=RequestStatus.WAITING)
    arrival: int = field(init=False, default=-1)
    finish_reason: FinishReason | None = field(init=False, default=None)
    stop_reason: int | str | None = field(init=False, default=None)
    lookup: Lookup | None = field(init=False, default=None)
    max_total_tokens: int = field(init=False, default=0)
    ending_token_ids: frozenset[int] = field(init=False)
    num_pending: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.token_ids = array("i", self.prompt_token_ids)
        ends = frozenset() if self.params.ignore_eos else self.eos_token_ids
        self.ending_token_ids = ends.union(self.params.stop_token_ids or ())
        if self.params.prompt_logprobs is not None:
            self.prompt_logprobs.append(None)

    @property
    def place(self) -> tuple[int, int, int]:
        """Orders the line: lower goes first."""
        return self.arrival + PRIORITY_STEP * self.priority, self.arrival, self.sample_index

    @property
    def is_beam(self) -> bool:
        return self.params.beam_width > 1

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def finished(self) -> bool:
        return self.status is RequestStatus.FINISHED

    def append_output(self, token_id: int) -> None:
        self.token_ids.append(token_id)
        self.output_token_ids.append(token_id)

    def append_pending(self) -> None:
        self.token_ids.append(PENDING)
        self.num_pending += 1

    def drop_pending(self, count: int) -> None:
        """Takes back the last `count` stand-ins."""
        if count:
            del self.token_ids[-count:]
            self.num_pending -= count


def check_line(priority: object, timeout_s: Any) -> None:
    """Raises RequestError for what is no priority, or no time that a request may take."""
    if not isinstance(priority, int) or isinstance(priority, bool):
        raise RequestError(f"priority is {priority!r}; accepted: an integer, lower goes first")
    if timeout_s is None:
        return
    number = isinstance(timeout_s, int | float) and not isinstance(timeout_s, bool)
    if not number or not 0 < timeout_s <= sys.float_info.max:
        raise RequestError(f"timeout_s is {timeout_s!r}; accepted: a number of seconds above 0, or None")
