"""Whether an engine can do what a request asks of the choice of tokens."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from ..core.errors import RequestError
from .bad_words import bad_words
from .sampling_params import SamplingParams
from .token_ids import packed, unsigned
from .tokenizer import Tokenizer


def check_token_ids(prompt_token_ids: Sequence[int], vocab_size: int) -> None:
    """Raises RequestError naming the first token id of a prompt, of one token or more, that is not in the vocabulary."""
    try:
        if unsigned(packed(prompt_token_ids)).max() < vocab_size:
            return
    except ValueError:
        pass  # an id of more than 32 bits
    position, token_id = next((i, t) for i, t in enumerate(prompt_token_ids) if not 0 <= t < vocab_size)
    raise RequestError(
        f"token id {token_id} at position {position} is outside the vocabulary; accepted: 0 to {vocab_size - 1}"
    )


def check_params(
    params: SamplingParams, vocab_size: int, tokenizer: Tokenizer | None, eos_token_ids: Collection[int]
) -> None:
    """Raises RequestError, naming field, value and limit, for what an engine cannot do."""
    _check_vocabulary("stop_token_ids", params.stop_token_ids or (), vocab_size)
    _check_vocabulary("logit_bias", params.logit_bias or (), vocab_size)
    for ids in params.bad_words_ids or ():
        _check_vocabulary("bad_words_ids", ids, vocab_size)
    for name, count in (("logprobs", params.logprobs), ("prompt_logprobs", params.prompt_logprobs)):
        if count is not None and count > vocab_size:
            raise RequestError(f"{name} is {count}; accepted: 0 to the vocabulary's {vocab_size}", name)
    if params.stop_strings and tokenizer is None:
        raise RequestError(
            "stop strings need a tokenizer and this engine has none; use stop_token_ids", "stop"
        )
    _check_something_is_left(params, vocab_size, tokenizer, eos_token_ids)


def _check_vocabulary(name: str, token_ids: Iterable[int], vocab_size: int) -> None:
    for token_id in token_ids:
        if token_id >= vocab_size:
            raise RequestError(f"{name} has {token_id}; accepted: 0 to {vocab_size - 1}", name)


def _check_something_is_left(
    params: SamplingParams, vocab_size: int, tokenizer: Tokenizer | None, eos_token_ids: Collection[int]
) -> None:
    """A step that may choose no token at all would have nothing to give."""
    forbidden = bad_words(params, tokenizer).ever_forbidden
    if params.min_tokens:
        forbidden = forbidden.union(params.stop_token_ids or (), eos_token_ids)
    if len(forbidden) >= vocab_size:
        named = [name for name in ("bad_words", "bad_words_ids") if getattr(params, name)]
        name = named[0] if named else "stop_token_ids"
        raise RequestError(f"{name} may leave no token of the vocabulary's {vocab_size}; give fewer", name)
