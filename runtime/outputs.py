"""What generation returns, in the shapes vLLM's users know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "timeout"]


@dataclass(frozen=True)
class Logprob:
    """One candidate token at one position.

    logprob:       natural logarithm of the probability the model itself gives it: log-softmax of the logits
                   as they left the model, before penalties, temperature and filters
    rank:          1 for the most probable token of the vocabulary
    decoded_token: its text alone; None when the engine has no tokenizer
    """

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass(frozen=True)
class CompletionOutput:
    """One completion of a prompt, as far as it has got.

    text:               cut before a matched stop string; while unfinished, without what may still become part
                        of one and without half a character; empty when the engine has no tokenizer
    token_ids:          every token chosen, the one that ended the request included
    cumulative_logprob: sum over the chosen tokens; None unless `logprobs` was asked for
    logprobs:           per output token, {token id: Logprob}, the chosen token first
    finish_reason:      None while running; "stop" (end-of-sequence, stop token or string), "length", "abort", "timeout"
    stop_reason:        the stop string or stop token id that ended it; None for end-of-sequence
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(frozen=True)
class RequestOutput:
    """All completions of one prompt, as far as they have got.

    prompt:          the text given; None when token ids were given
    prompt_logprobs: per prompt token, None for the first and for those that a timeout left unscored; None unless
                     `prompt_logprobs` was asked for
    finished:        True when every completion has a finish_reason
    num_cached_tokens: prompt tokens that were not computed, because an earlier request had left them in the KV cache
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int = 0
