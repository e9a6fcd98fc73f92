"""The state of one sequence from arrival to its last token."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from .bad_words import NONE, BadWords
from .outputs import FinishReason, Logprob
from .sampling_params import SamplingParams


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
    seed, sample_index:  key of its random stream; sample_index tells the n completions of one prompt apart
    token_ids:           prompt and output, one list
    logprobs:            per output token, filled when `params.logprobs` is set
    prompt_logprobs:     per prompt token (None for the first), filled when `params.prompt_logprobs` is set
    num_computed_tokens: leading tokens whose keys and values are in the cache
    page_ids:            its cache pages, in the order of the sequence
    arrival:             its place in line, given once
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    eos_token_ids: frozenset[int] = frozenset()
    seed: int = 0
    sample_index: int = 0
    bad_words: BadWords = NONE

    token_ids: list[int] = field(init=False)
    output_token_ids: list[int] = field(init=False, default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(init=False, default_factory=list)
    prompt_logprobs: list[dict[int, Logprob] | None] = field(init=False, default_factory=list)
    num_computed_tokens: int = field(init=False, default=0)
    page_ids: list[int] = field(init=False, default_factory=list)
    status: RequestStatus = field(init=False, default=RequestStatus.WAITING)
    arrival: int = field(init=False, default=-1)
    finish_reason: FinishReason | None = field(init=False, default=None)
    stop_reason: int | str | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt_token_ids)
        if self.params.prompt_logprobs is not None:
            self.prompt_logprobs.append(None)

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
