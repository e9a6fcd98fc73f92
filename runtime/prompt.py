"""Prompts in the forms that they are given in, and their token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, TypeAlias

from ..core.errors import RequestError
from .token_ids import packed, unsigned
from .tokenizer import Tokenizer

Prompt: TypeAlias = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, {"prompt": text} or {"prompt_token_ids": ids}."""

Prompts: TypeAlias = str | Mapping[str, Any] | Sequence[int | Prompt]
"""One of these or a list of them. One kind of sequence, so that type checkers take lists of several kinds as they stand."""

ACCEPTED = 'text, a list of token ids, {"prompt": text} or {"prompt_token_ids": ids}'


def is_text(prompt: Prompt) -> bool:
    """Whether a tokenizer has to read it, which may take a while. Raises RequestError for what is no prompt."""
    return isinstance(_value(prompt), str)


def tokenized(prompt: Prompt, tokenizer: Tokenizer | None) -> tuple[str | None, Sequence[int]]:
    """The text of a prompt, if it has one, and its token ids. Raises RequestError for what is no prompt."""
    value = _value(prompt)
    if not isinstance(value, str):
        return None, _token_ids(value)
    if tokenizer is None:
        raise RequestError("text needs a tokenizer and this engine has none; give a list of token ids")
    return value, tokenizer.encode(value)


def _value(prompt: object) -> object:
    """What stands for the prompt: its text or its token ids."""
    if not isinstance(prompt, Mapping):
        return prompt
    known = [key for key in ("prompt", "prompt_token_ids") if key in prompt]
    if len(prompt) != 1 or not known:
        raise RequestError(f"it has the keys {sorted(map(str, prompt))}; accepted: {ACCEPTED}")
    return prompt[known[0]]


def _token_ids(value: object) -> Sequence[int]:
    if not isinstance(value, list | tuple):
        raise RequestError(f"it is a {type(value).__name__}; accepted: {ACCEPTED}")
    try:
        token_ids = packed(value)
    except ValueError:
        pass  # an item that is no integer, or a large one
    else:  # as nearly always; only what has become 0 or 1 may have been a bool
        if not token_ids or unsigned(token_ids).min() > 1 or set(map(type, value)) <= {int}:
            return token_ids
    for position, item in enumerate(value):
        if isinstance(item, bool) or not isinstance(item, Integral):
            raise RequestError(f"its item {position} is {item!r}; accepted: integers, as token ids")
    return [int(item) for item in value]
