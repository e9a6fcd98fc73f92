"""The way of outputs from the engine's thread to the event loop that reads them.

The engine's thread hands over what is new, which is cheap however long an output has become; the reader puts it together.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from ..core.errors import EngineError
from .groups import Completion, Group, request_output
from .outputs import CompletionOutput, FinishReason, Logprob, RequestOutput
from .tokenizer import Tokenizer


class Piece(NamedTuple):
    """What is new in one completion; the fields as `CompletionOutput` has them."""

    token_ids: list[int]
    text: str
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None


class Pieces(NamedTuple):
    """What is new in all completions of a request. prompt_logprobs: None where none were asked for."""

    pieces: list[Piece]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    num_cached_tokens: int
    finished: bool


Update: TypeAlias = Pieces | RequestOutput
"""What is new, or all of a request that is told only of its end."""


class Cutter:
    """Says what is new in a request since it was asked last. Used by the engine's thread."""

    def __init__(self, num_completions: int) -> None:
        self._tokens, self._chars = [0] * num_completions, [0] * num_completions
        self._prompt_logprobs = 0

    def update(self, group: Group, tokenizer: Tokenizer | None) -> Update:
        if not group.stream:
            return request_output(group, tokenizer)
        first, prompt_logprobs = group.first, None
        if first.params.prompt_logprobs is not None:
            prompt_logprobs = first.prompt_logprobs[self._prompt_logprobs :]
            self._prompt_logprobs += len(prompt_logprobs)
        pieces = [self._piece(index, sequence) for index, sequence in enumerate(group.sequences)]
        return Pieces(pieces, prompt_logprobs, first.num_cached_tokens or 0, group.finished)

    def _piece(self, index: int, sequence: Completion) -> Piece:
        request, detokenizer, old = sequence.request, sequence.detokenizer, self._tokens[index]
        token_ids, text = request.output_token_ids[old:], ""
        self._tokens[index] = old + len(token_ids)
        if detokenizer is not None:
            text = detokenizer.text[self._chars[index] :]
            self._chars[index] += len(text)
        logprobs = None if request.params.logprobs is None else request.logprobs[old:]
        return Piece(token_ids, text, logprobs, request.finish_reason, request.stop_reason)


class OutputStream:
    """Carries the outputs of one request to the event loop that reads them.

    It holds one output, which grows: a slow reader skips some and never makes memory grow.
    """

    def __init__(
        self, request_id: str, prompt: str | None, prompt_token_ids: Sequence[int], num_completions: int
    ) -> None:
        """Belongs to the running event loop."""
        self.loop = asyncio.get_running_loop()
        self._request_id, self._prompt = request_id, prompt
        self._prompt_token_ids = list(prompt_token_ids)
        self._completions = [_Growing(index) for index in range(num_completions)]
        self._prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        self._num_cached_tokens, self._finished = 0, False
        self._whole: RequestOutput | None = None
        self._error: str | None = None
        self._changed = False
        self._reader: asyncio.Future[None] | None = None

    def put(self, update: Update) -> None:
        if isinstance(update, RequestOutput):
            self._whole = update
        else:
            for completion, piece in zip(self._completions, update.pieces, strict=True):
                completion.add(piece)
            if update.prompt_logprobs is not None:
                self._prompt_logprobs = [*(self._prompt_logprobs or ()), *update.prompt_logprobs]
            self._num_cached_tokens, self._finished = update.num_cached_tokens, update.finished
        self._wake()

    def fail(self, reason: str) -> None:
        self._error = reason
        self._wake()

    async def get(self) -> RequestOutput:
        """Waits for an output that was not read yet. Raises EngineError when the engine has ended the request."""
        if not self._changed:
            self._reader = self.loop.create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        self._changed = False
        if self._error is not None:
            raise EngineError(self._error)
        return self._output() if self._whole is None else self._whole

    def _wake(self) -> None:
        self._changed = True
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def _output(self) -> RequestOutput:
        scored = self._prompt_logprobs
        return RequestOutput(
            request_id=self._request_id,
            prompt=self._prompt,
            prompt_token_ids=self._prompt_token_ids,
            prompt_logprobs=None if scored is None else list(scored),
            outputs=[completion.output() for completion in self._completions],
            finished=self._finished,
            num_cached_tokens=self._num_cached_tokens,
        )


class _Growing:
    """One completion on the reader's side."""

    def __init__(self, index: int) -> None:
        self._index, self._text = index, ""
        self._token_ids: list[int] = []
        self._logprobs: list[dict[int, Logprob]] | None = None
        self._cumulative = 0.0
        self._finish_reason: FinishReason | None = None
        self._stop_reason: int | str | None = None

    def add(self, piece: Piece) -> None:
        self._token_ids += piece.token_ids
        self._text += piece.text
        if piece.logprobs is not None:
            chosen = zip(piece.logprobs, piece.token_ids, strict=True)
            self._cumulative += sum(entry[token_id].logprob for entry, token_id in chosen)
            self._logprobs = [*(self._logprobs or ()), *piece.logprobs]
        self._finish_reason, self._stop_reason = piece.finish_reason, piece.stop_reason

    def output(self) -> CompletionOutput:
        scored = self._logprobs
        return CompletionOutput(
            index=self._index,
            text=self._text,
            token_ids=self._token_ids.copy(),
            cumulative_logprob=None if scored is None else self._cumulative,
            logprobs=None if scored is None else scored.copy(),
            finish_reason=self._finish_reason,
            stop_reason=self._stop_reason,
        )
