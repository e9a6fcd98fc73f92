"""Engine outputs as OpenAI's JSON: whole answers, and the pieces of streamed ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, ClassVar, Protocol

from ..outputs import CompletionOutput, Logprob, RequestOutput
from ..tokenizer import Tokenizer

_IMPOSSIBLE = -9999.0
"""Stands for a probability of 0, as with OpenAI."""


@dataclass(frozen=True)
class Position:
    """One token of an answer.

    text:     of the token alone; length: how many characters of the answer's text it stands for
    logprobs: None when none were asked for, for the first token of a prompt, which nothing predicts, and for those that a
              timeout left unscored
    """

    token_id: int
    text: str
    length: int
    logprobs: Mapping[int, Logprob] | None


@dataclass
class Sent:
    """How much of one choice the client has.

    offset: characters that its tokens stand for; started, finished: its first, its last chunk was sent
    """

    chars: int = 0
    tokens: int = 0
    offset: int = 0
    started: bool = False
    finished: bool = False


class Format(Protocol):
    """One of OpenAI's two shapes of an answer."""

    id_prefix: ClassVar[str]
    object_name: ClassVar[str]
    chunk_name: ClassVar[str]

    def choice(self, index: int, output: RequestOutput, completion: CompletionOutput) -> dict[str, Any]:
        """The whole of one completion."""

    def delta(
        self, index: int, output: RequestOutput, completion: CompletionOutput, sent: Sent
    ) -> dict[str, Any] | None:
        """What is new since `sent`, which is brought up to date; None when nothing is."""

    def more_fields(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """What a whole answer has beside its choices."""


@dataclass(frozen=True)
class CompletionFormat:
    """/v1/completions.

    prompt_texts:    of each prompt, for `echo` and for offsets
    num_top:         candidates shown per position, beside the token that is there
    prompt_logprobs: candidates shown per prompt token in the field of that name; None: no such field
    """

    tokenizer: Tokenizer | None
    prompt_texts: Sequence[str]
    num_choices: int
    echo: bool
    return_token_ids: bool
    num_top: int | None = None
    prompt_logprobs: int | None = None
    id_prefix: ClassVar[str] = "cmpl-"
    object_name: ClassVar[str] = "text_completion"
    chunk_name: ClassVar[str] = "text_completion"

    def choice(self, index: int, output: RequestOutput, completion: CompletionOutput) -> dict[str, Any]:
        piece = self.delta(index, output, completion, Sent())
        assert piece is not None, "a finished completion has at least its reason"
        if self.prompt_logprobs is not None:
            piece["prompt_logprobs"] = _prompt_logprobs(output, self.prompt_logprobs)
        return piece

    def more_fields(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        return {}

    def delta(
        self, index: int, output: RequestOutput, completion: CompletionOutput, sent: Sent
    ) -> dict[str, Any] | None:
        prompt_text = self.prompt_texts[index // self.num_choices]
        text = (prompt_text if self.echo else "") + completion.text
        new_text, new = text[sent.chars :], []
        if completion.logprobs is not None or self.return_token_ids:
            new = self._new_positions(output, completion, prompt_text, sent.tokens)
        if not new_text and not new and not completion.finished:
            return None
        piece: dict[str, Any] = {
            "index": index,
            "text": new_text,
            "logprobs": None,
            "finish_reason": completion.finish_reason,
        }
        if completion.logprobs is not None:
            start = 0 if self.echo else len(prompt_text)
            piece["logprobs"] = _completion_logprobs(new, start + sent.offset)
        if self.return_token_ids:
            piece["token_ids"] = [position.token_id for position in new]
        sent.chars, sent.started = len(text), True
        sent.tokens += len(new)
        sent.offset += sum(position.length for position in new)
        return piece

    def _new_positions(
        self, output: RequestOutput, completion: CompletionOutput, prompt_text: str, first: int
    ) -> list[Position]:
        """The tokens from number `first` on; with `echo` the prompt's, which come all at once, are counted."""
        if not self.echo:
            return _positions(completion.token_ids, completion.logprobs, first)
        prompt = self._prompt_positions(output, prompt_text) if first == 0 else []
        done = max(0, first - len(output.prompt_token_ids))
        return prompt + _positions(completion.token_ids, completion.logprobs, done)

    def _prompt_positions(self, output: RequestOutput, prompt_text: str) -> list[Position]:
        shown = output.prompt_logprobs
        if shown is not None:  # there may be more of them for the field prompt_logprobs
            shown = _limited(output.prompt_token_ids, shown, self.num_top)
        positions = _positions(output.prompt_token_ids, shown)
        if self.tokenizer is None or shown is None:
            return positions
        for index, position in enumerate(positions):
            if position.logprobs is None:  # of the first, and of those that a timeout left unscored
                text = self.tokenizer.decode([position.token_id], skip_special_tokens=False)
                # a token that the tokenizer puts before the text is no part of it
                length = len(text) if index or prompt_text.startswith(text) else 0
                positions[index] = replace(position, text=text, length=length)
        return positions


@dataclass(frozen=True)
class ChatFormat:
    """/v1/chat/completions. num_top: candidates shown per position; prompt_logprobs: as `CompletionFormat` has it."""

    tokenizer: Tokenizer | None
    num_top: int
    return_token_ids: bool
    prompt_logprobs: int | None = None
    id_prefix: ClassVar[str] = "chatcmpl-"
    object_name: ClassVar[str] = "chat.completion"
    chunk_name: ClassVar[str] = "chat.completion.chunk"

    def choice(self, index: int, output: RequestOutput, completion: CompletionOutput) -> dict[str, Any]:
        choice = {
            "index": index,
            "message": {"role": "assistant", "content": completion.text, "refusal": None},
            "logprobs": self._logprobs(completion, 0),
            "finish_reason": completion.finish_reason,
        }
        if self.return_token_ids:
            choice["token_ids"] = completion.token_ids
        return choice

    def more_fields(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        if self.prompt_logprobs is None:
            return {}
        (output,) = outputs
        return {"prompt_logprobs": _prompt_logprobs(output, self.prompt_logprobs)}

    def delta(
        self, index: int, output: RequestOutput, completion: CompletionOutput, sent: Sent
    ) -> dict[str, Any] | None:
        delta = {} if sent.started else {"role": "assistant", "content": ""}
        new_text = completion.text[sent.chars :]
        if new_text:
            delta["content"] = new_text
        new_tokens = completion.token_ids[sent.tokens :]
        reports_tokens = completion.logprobs is not None or self.return_token_ids
        if not delta and not completion.finished and not (reports_tokens and new_tokens):
            return None
        piece: dict[str, Any] = {
            "index": index,
            "delta": delta,
            "logprobs": self._logprobs(completion, sent.tokens),
            "finish_reason": completion.finish_reason,
        }
        if self.return_token_ids:
            piece["token_ids"] = new_tokens
        sent.chars, sent.tokens, sent.started = len(completion.text), len(completion.token_ids), True
        return piece

    def _logprobs(self, completion: CompletionOutput, first: int) -> dict[str, Any] | None:
        if completion.logprobs is None:
            return None
        content = []
        chosen = zip(completion.token_ids[first:], completion.logprobs[first:], strict=True)
        for token_id, logprobs in chosen:
            best = sorted(logprobs.items(), key=lambda item: item[1].rank)
            top = [self._token(*item) for item in best if item[1].rank <= self.num_top]
            content.append({**self._token(token_id, logprobs[token_id]), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, entry: Logprob) -> dict[str, Any]:
        """`bytes` is for characters that are split over tokens: joined, they can be decoded."""
        text = _text(token_id, entry)
        raw = text.encode() if self.tokenizer is None else self.tokenizer.token_bytes(token_id)
        return {"token": text, "logprob": _value(entry), "bytes": list(raw)}


def usage(outputs: Iterable[RequestOutput]) -> dict[str, int]:
    outputs = list(outputs)
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    completion = sum(len(choice.token_ids) for output in outputs for choice in output.outputs)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _positions(
    token_ids: Sequence[int], logprobs: Sequence[Mapping[int, Logprob] | None] | None, first: int = 0
) -> list[Position]:
    if logprobs is None:
        return [Position(token_id, "", 0, None) for token_id in token_ids[first:]]
    pairs = zip(token_ids[first:], logprobs[first:], strict=True)
    return [_position(token_id, entry) for token_id, entry in pairs]


def _position(token_id: int, logprobs: Mapping[int, Logprob] | None) -> Position:
    text = "" if logprobs is None else _text(token_id, logprobs[token_id])
    return Position(token_id, text, len(text), logprobs)


def _limited(
    token_ids: Sequence[int], logprobs: Sequence[Mapping[int, Logprob] | None], count: int | None
) -> list[dict[int, Logprob] | None]:
    """Of each position the token that is there and the `count` most probable ones."""

    def limited(token_id: int, entry: Mapping[int, Logprob]) -> dict[int, Logprob]:
        return {key: value for key, value in entry.items() if key == token_id or value.rank <= (count or 0)}

    pairs = zip(token_ids, logprobs, strict=True)
    return [None if entry is None else limited(token_id, entry) for token_id, entry in pairs]


def _prompt_logprobs(output: RequestOutput, count: int) -> list[dict[str, Any] | None]:
    """As vLLM shows them: a list over the prompt's tokens, null for the first."""

    def shown(token_id: int, entry: Logprob) -> dict[str, Any]:
        return {"logprob": _value(entry), "rank": entry.rank, "decoded_token": _text(token_id, entry)}

    assert output.prompt_logprobs is not None, "they were asked for"
    return [
        None if entry is None else {str(token_id): shown(token_id, each) for token_id, each in entry.items()}
        for entry in _limited(output.prompt_token_ids, output.prompt_logprobs, count)
    ]


def _text(token_id: int, entry: Logprob) -> str:
    return f"token_id:{token_id}" if entry.decoded_token is None else entry.decoded_token


def _value(entry: Logprob) -> float:
    """JSON has no infinity."""
    return max(entry.logprob, _IMPOSSIBLE)


def _completion_logprobs(positions: Sequence[Position], offset: int) -> dict[str, Any]:
    lengths = [position.length for position in positions]
    scored = [(position.token_id, position.logprobs) for position in positions]
    return {
        "tokens": [position.text for position in positions],
        "token_logprobs": [entry and _value(entry[token_id]) for token_id, entry in scored],
        "top_logprobs": [entry and _by_text(entry) for _, entry in scored],
        "text_offset": list(accumulate([offset, *lengths]))[:-1],
    }


def _by_text(logprobs: Mapping[int, Logprob]) -> dict[str, float]:
    """Tokens of equal text, such as parts of characters, are one entry: the most probable."""
    result: dict[str, float] = {}
    for token_id, entry in sorted(logprobs.items(), key=lambda item: item[1].rank):
        result.setdefault(_text(token_id, entry), _value(entry))
    return result
