"""Token sequences that must not come about."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..core.errors import RequestError
from .sampling_params import SamplingParams
from .tokenizer import Tokenizer


class BadWords:
    """Which tokens may not come next, because they would complete a forbidden sequence.

    Looked up by what comes before the last token, so that a long list costs no more than the lengths that are in it.
    """

    def __init__(self, sequences: Iterable[Sequence[int]]) -> None:
        """sequences: of one token id or more each."""
        self._last_ids: dict[tuple[int, ...], set[int]] = {}
        for *before, last in sequences:
            self._last_ids.setdefault(tuple(before), set()).add(last)
        self._lengths = sorted({len(before) for before in self._last_ids})

    def __bool__(self) -> bool:
        return bool(self._last_ids)

    def forbidden_after(self, token_ids: Sequence[int]) -> set[int]:
        """Ids that must not follow `token_ids`."""
        found: set[int] = set()
        for length in self._lengths:
            if length <= len(token_ids):
                found |= self._last_ids.get(tuple(token_ids[len(token_ids) - length :]), set())
        return found

    @property
    def ever_forbidden(self) -> set[int]:
        """Ids that may be forbidden somewhere."""
        return set().union(*self._last_ids.values())


NONE = BadWords(())


def bad_words(params: SamplingParams, tokenizer: Tokenizer | None) -> BadWords:
    """What `params.bad_words` and `params.bad_words_ids` forbid. Raises RequestError for words without tokens.

    A word is looked for at the beginning of a text and after a space, for which a tokenizer has different tokens.
    """
    if not params.bad_words and not params.bad_words_ids:
        return NONE
    sequences = [tuple(ids) for ids in params.bad_words_ids or ()]
    for word in params.bad_words or ():
        if tokenizer is None:
            message = "bad_words need a tokenizer and this engine has none; use bad_words_ids"
            raise RequestError(message, "bad_words")
        bare = word.strip() or word
        spellings = [tokenizer.encode(text, special_tokens=False) for text in (bare, f" {bare}")]
        if not all(spellings):
            raise RequestError(f"bad_words has {word!r}, of which the tokenizer makes no tokens", "bad_words")
        sequences += map(tuple, spellings)
    return BadWords(sequences)
