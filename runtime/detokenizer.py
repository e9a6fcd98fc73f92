"""Output text, token by token: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from .sampling_params import SamplingParams
from .tokenizer import Tokenizer

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what decoding makes of bytes that are not a whole character
_PROMPT_CONTEXT = 5
"""Prompt tokens decoded before the output: some tokenizers drop the space of the first token."""
_MAX_CONTINUATION = 3
"""Bytes of a character in UTF-8 behind its first."""
_MAX_PENDING = 16
"""Tokens at whose end no character has ended, before the older ones are taken for what they decode to. A character has four
bytes at most; the others may be tokens without text."""
_KEPT_PENDING = 8
"""Of these, the tokens that may still be the beginning of a character."""


class Detokenizer:
    """The text of one sequence.

    It decodes a short window of tokens, not all of them: `_ids[:_read]` is decoded for good, the window
    begins at `_window_start`, before `_read`, and `_window_chars` of its text are already in `_text`.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = params.skip_special_tokens
        context = max(0, len(prompt_token_ids) - _PROMPT_CONTEXT)
        self._ids = list(prompt_token_ids[_character_start(tokenizer, prompt_token_ids, context) :])
        self._window_start = 0
        self._read = len(self._ids)
        self._window_chars = len(self._decode_window())
        self._text = ""
        self._stops = params.stop_strings
        self._max_stop_len = max(map(len, self._stops), default=0)
        self._keeps_stop = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        self._num_tokens = 0
        self._held = 0
        """Characters at the end of the first `_looked_at` that begin a stop string, the longest such end."""
        self._looked_at = 0
        self._finished = False

    @property
    def text(self) -> str:
        """What may be shown: while unfinished, without a tail that may still become part of a stop string."""
        if self._finished or self._keeps_stop:
            return self._text
        # When it is asked for: most requests show nothing before their end.
        self._held = self._longest_begun(self._held + len(self._text) - self._looked_at)
        self._looked_at = len(self._text)
        return self._text[: len(self._text) - self._held]

    def append(self, token_id: int) -> str | None:
        """Takes the next output token. Returns the stop string it completes, at which the text is cut."""
        assert not self._finished, "the text is finished"
        self._ids.append(token_id)
        self._num_tokens += 1
        if self._num_tokens == 1:
            self._read = _character_start(self._tokenizer, self._ids, self._read)
        checked = len(self._text)
        self._text += self._new_text()
        if self._num_tokens <= self._min_tokens:
            return None
        return self._cut_at_stop(checked)

    def finish(self) -> None:
        """Ends the text: what was held back for a stop string or half a character is shown as it is."""
        if not self._finished:
            self._text += self._decode_window()[self._window_chars :]
            self._finished = True

    def _decode_window(self) -> str:
        window = self._ids[self._window_start :]
        return self._tokenizer.decode(window, skip_special_tokens=self._skip_special_tokens)

    def _new_text(self) -> str:
        window = self._decode_window()
        # Bytes of an unfinished character decode to U+FFFD at the end; the next tokens may change them.
        stable = window.rstrip(_REPLACEMENT)
        new = stable[self._window_chars :]
        self._window_chars = max(self._window_chars, len(stable))
        if stable == window:
            self._window_start, self._read = self._read, len(self._ids)
            self._window_chars = len(self._decode_window())
        elif len(self._ids) - self._read >= _MAX_PENDING:
            new += self._shorten(window)
        return new

    def _shorten(self, window: str) -> str:
        """Lets the window begin later though its text, `window`, does not end with a whole character: else tokens that never
        make one would all be decoded again at each of them. Returns what of the text the new window does not hold.

        In UTF-8 characters are found again wherever one begins to read. Unlike of all at once, nothing is made of a character
        with as many tokens without text inside, and of a row of bytes with a wrong one byte fallback may make some.
        """
        self._window_start = self._read = len(self._ids) - _KEPT_PENDING
        kept = self._decode_window()
        held = max(0, min(len(window) - self._window_chars, len(kept) - len(kept.rstrip(_REPLACEMENT))))
        new = window[self._window_chars : len(window) - held]
        self._window_chars = len(kept) - held
        return new

    def _cut_at_stop(self, checked: int) -> str | None:
        """Finds the stop string that is complete first after `checked` characters, the longest of equals."""
        found = None
        for stop in self._stops:
            at = self._text.find(stop, max(0, checked - len(stop) + 1))
            if at >= 0 and (found is None or (at + len(stop), at) < (found[0] + len(found[1]), found[0])):
                found = (at, stop)
        if found is None:
            return None
        self._text = self._text[: found[0] + (len(found[1]) if self._keeps_stop else 0)]
        self._finished = True
        return found[1]

    def _longest_begun(self, limit: int) -> int:
        """Length of the longest end of the text that begins a stop string. limit: what was begun at the last look, and the
        characters since; more cannot be."""
        for length in range(min(self._max_stop_len - 1, limit), 0, -1):
            tail = self._text[-length:]
            if any(len(stop) > length and stop.startswith(tail) for stop in self._stops):
                return length
        return 0


def _character_start(tokenizer: Tokenizer, token_ids: Sequence[int], at: int) -> int:
    """Where a window about `at` begins: not within a character. Of a row of bytes that does, byte fallback makes no
    character, however far the row goes."""
    earliest = max(0, at - _MAX_CONTINUATION)
    while at > earliest and _within_character(tokenizer.token_bytes(token_ids[at])):
        at -= 1
    return at


def _within_character(encoded: bytes) -> bool:
    return bool(encoded) and encoded[0] & 0xC0 == 0x80
