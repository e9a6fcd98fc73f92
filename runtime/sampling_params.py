"""What a user may ask of generation: `SamplingParams`, with vLLM's names, defaults and meanings."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral, Real
from types import NoneType
from typing import Any

from ..core.errors import RequestError
from .beam_params import check_beam_params
from .prompt_lookup import PromptLookup
from .tokenizer import in_utf8

GREEDY_TEMPERATURE = 1e-5
"""Temperatures below this are greedy, as in vLLM: dividing logits by less says nothing more."""

MAX_LOGIT_BIAS = 100.0
"""OpenAI's limit: a hundred is more than any model's logits differ by."""

MAX_REPETITION_PENALTY = 1000.0
"""And its inverse the least: within them no logit that it divides or multiplies leaves float32."""

MAX_SEQUENCES = 10_000
"""Of one prompt: more than anyone reads, and little enough to make them all before the first step."""

_MAX_SEED = 2**64 - 1
_PLAIN = (int, float, bool, str, NoneType)


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen and when it ends. Checked when built: raises RequestError. Numbers that are
    numpy's become Python's.

    n:                  completions per prompt, each with its own random stream
    best_of:            completions to make, of which the n with the best mean log probability per token are given,
                        best first; None: n. Nothing can be streamed before the last of them has ended
    max_tokens:         output tokens at most; None: as many as the engine's max_seq_len leaves
    min_tokens:         output tokens before an end-of-sequence token, stop token or stop string may end it
    temperature:        divides the logits; 0 is greedy
    top_k:              keep the k most probable tokens (and ties of the k-th); 0 or -1 keeps all
    top_p:              keep the smallest set of most probable tokens whose probability reaches top_p
    min_p:              keep tokens at least min_p times as probable as the most probable one
    repetition_penalty: divides positive, multiplies negative logits of tokens in prompt or output (CTRL); 0.001 to 1000
    presence_penalty:   subtracted once from the logit of each token in the output (OpenAI)
    frequency_penalty:  subtracted from the logit of a token once per occurrence in the output (OpenAI)
    logit_bias:         added to the logits of token ids, from -100 (never) to 100 (always)
    bad_words:          texts that the output shall not contain, at the beginning or after a space, in the tokens that
                        the tokenizer makes of them; other ways to spell them in tokens are not found
    bad_words_ids:      sequences of token ids that prompt and output together shall not come to contain
    stop:               strings that end the request; the text is cut before the match
    include_stop_str_in_output: the text is cut after the match; stop tokens are part of it
    stop_token_ids:     token ids that end the request; kept in token_ids, left out of the text
    ignore_eos:         do not end at the model's end-of-sequence tokens
    seed:               of this request's random stream; None: the engine draws one
    logprobs:           report the k most probable tokens beside the chosen one at each output position
    prompt_logprobs:    the same for each prompt position
    prompt_lookup:      guess tokens from what prompt and output hold already, and verify several in one step: the same
                        tokens in fewer steps, where the output repeats the prompt. Plain greedy requests only
    skip_special_tokens: leave special tokens out of the text
    beam_width:         above 1: search for the n best outputs with so many beams, as `transformers` does; nothing is drawn or
                        streamed then, and what only changes single tokens is refused
    length_penalty:     an output's score is its log probability divided by its length to this power; above 0 favours long ones
    early_stopping:     True: end when beam_width outputs have ended; False: when no beam is likely to become better than
                        these; "never": when none can
    """

    n: int = 1
    best_of: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    bad_words: Sequence[str] | None = None
    bad_words_ids: Sequence[Sequence[int]] | None = None
    stop: str | Sequence[str] | None = None
    include_stop_str_in_output: bool = False
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    prompt_lookup: PromptLookup | None = None
    skip_special_tokens: bool = True
    beam_width: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False

    def __post_init__(self) -> None:
        for name, value in list(vars(self).items()):
            if type(value) not in _PLAIN:
                object.__setattr__(self, name, _plain(value))
        _check_int("n", self.n, 1, MAX_SEQUENCES)
        if self.best_of is not None:
            _check_int("best_of", self.best_of, 1, MAX_SEQUENCES)
            if self.best_of < self.n:
                raise _refusal("best_of", self.best_of, f"at least n ({self.n})")
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 1)
        _check_int("min_tokens", self.min_tokens, 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise _refusal("min_tokens", self.min_tokens, f"at most max_tokens ({self.max_tokens})")
        _check_int("top_k", self.top_k, -1)
        _check_float("temperature", self.temperature, "a finite number of at least 0", low=0.0)
        _check_float("top_p", self.top_p, "a number above 0 and at most 1", low=0.0, high=1.0, above=True)
        _check_float("min_p", self.min_p, "a number from 0 to 1", low=0.0, high=1.0)
        least, most = 1 / MAX_REPETITION_PENALTY, MAX_REPETITION_PENALTY
        accepted = f"a number from {least:g} to {most:g}"
        _check_float("repetition_penalty", self.repetition_penalty, accepted, low=least, high=most)
        for name in ("presence_penalty", "frequency_penalty"):
            _check_float(name, getattr(self, name), "a number from -2 to 2", low=-2.0, high=2.0)
        _check_logit_bias(self.logit_bias)
        if self.bad_words is not None and not isinstance(self.bad_words, list | tuple):
            raise _refusal("bad_words", self.bad_words, "a list of non-empty strings")
        _check_strings("bad_words", self.bad_words)
        _check_sequences("bad_words_ids", self.bad_words_ids)
        _check_strings("stop", self.stop)
        _check_token_ids("stop_token_ids", self.stop_token_ids)
        if self.prompt_lookup is not None and not isinstance(self.prompt_lookup, PromptLookup):
            raise _refusal("prompt_lookup", self.prompt_lookup, "a PromptLookup, or None")
        if self.prompt_lookup is not None and not self.plain_greedy:
            raise RequestError(
                "prompt_lookup verifies plain greedy decoding; accepted with temperature 0, without penalties, logit_bias, "
                "bad words, min_tokens and logprobs"
            )
        if self.seed is not None:
            _check_int("seed", self.seed, 0, _MAX_SEED)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), 0)
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                raise _refusal(name, getattr(self, name), "True or False")
        _check_int("beam_width", self.beam_width, 1)
        check_beam_params(self)

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_TEMPERATURE

    @cached_property
    def plain_greedy(self) -> bool:
        """Whether the next token is the largest logit, whatever came before, and nothing else is asked of the logits."""
        plain = not (self.has_penalties or self.min_tokens or self.logit_bias or self.beam_width > 1)
        return self.greedy and plain and self.logprobs is None and not (self.bad_words or self.bad_words_ids)

    @property
    def num_sequences(self) -> int:
        """Completions that are made of one prompt."""
        return max(self.beam_width, self.n if self.best_of is None else self.best_of)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def has_penalties(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


def _plain(value: Any, depth: int = 2) -> Any:
    """Python's numbers for those of other libraries, in lists and mappings too: what comes next writes JSON, or hands them
    to another process. depth: of lists in which numbers may lie."""
    if type(value) in _PLAIN:
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        with suppress(OverflowError):  # of a fraction; who checks what is no float refuses it
            return float(value)
    if depth and isinstance(value, Mapping):
        return {_plain(key, 0): _plain(item, 0) for key, item in value.items()}
    if depth and isinstance(value, list | tuple):
        items = (_plain(item, depth - 1) for item in value)
        return list(items) if isinstance(value, list) else tuple(items)
    return value


def _refusal(name: str, value: object, accepted: str) -> RequestError:
    return RequestError(f"{name} is {value!r}; accepted: {accepted}", name)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_int(name: str, value: object, low: int, high: int | None = None) -> None:
    accepted = f"an integer from {low} to {high}" if high is not None else f"an integer of at least {low}"
    if not isinstance(value, int) or isinstance(value, bool):
        raise _refusal(name, value, accepted)
    if value < low or (high is not None and value > high):
        raise _refusal(name, value, accepted)


def _check_float(
    name: str,
    value: object,
    accepted: str,
    *,
    low: float,
    high: float = sys.float_info.max,
    above: bool = False,
) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise _refusal(name, value, accepted)
    if not low <= value <= high or (above and value == low):  # NaN is in no range
        raise _refusal(name, value, accepted)


def _check_strings(name: str, value: object) -> None:
    accepted = "a non-empty string or a list of non-empty strings, that UTF-8 can encode"
    strings = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(strings, list | tuple):
        raise _refusal(name, value, accepted)
    if not all(isinstance(string, str) and string and in_utf8(string) for string in strings):
        raise _refusal(name, value, accepted)


def _check_token_ids(name: str, value: object) -> None:
    if value is not None and not _are_token_ids(value):
        raise _refusal(name, value, "a list of token ids of at least 0")


def _check_sequences(name: str, value: object) -> None:
    sequences = [] if value is None else value
    if not isinstance(sequences, list | tuple) or not all(ids and _are_token_ids(ids) for ids in sequences):
        raise _refusal(name, value, "a list of non-empty lists of token ids of at least 0")


def _check_logit_bias(value: object) -> None:
    accepted = f"token ids of at least 0 with numbers from {-MAX_LOGIT_BIAS:g} to {MAX_LOGIT_BIAS:g}"
    entries = {} if value is None else value
    if not isinstance(entries, Mapping) or not _are_token_ids(list(entries)):
        raise _refusal("logit_bias", value, accepted)
    for bias in entries.values():
        number = isinstance(bias, int | float) and not isinstance(bias, bool)
        if not number or not abs(bias) <= MAX_LOGIT_BIAS:
            raise _refusal("logit_bias", value, accepted)


def _are_token_ids(value: object) -> bool:
    return isinstance(value, list | tuple) and all(_is_int(item) and item >= 0 for item in value)
