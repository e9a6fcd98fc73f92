"""From a parsed request to its answer: runs the prompts on the engine, and forms one answer or a stream of events."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from ...core.errors import EngineError
from ..async_llm import AsyncLLM
from ..outputs import RequestOutput
from .errors import ApiError
from .protocol import GenerationRequest
from .responses import Format, Sent, usage

_json = json.JSONEncoder(ensure_ascii=False).encode


@dataclass(eq=False)
class Generation:
    """One request on its way through the engine.

    prompt_ids: one list per prompt, checked already
    log_fields: what the log line of the request will say about it
    """

    llm: AsyncLLM
    request: GenerationRequest
    prompt_ids: Sequence[list[int]]
    form: Format
    model_name: str
    log_fields: dict[str, Any]
    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.log_fields["id"] = self.form.id_prefix + self.name

    async def answer(self) -> dict[str, Any]:
        """The whole answer. Raises ApiError 503 when the engine fails."""
        try:
            outputs: dict[int, RequestOutput] = {}
            async with aclosing(self._outputs(stream=False)) as pairs:
                async for index, output in pairs:
                    outputs[index] = output
        except EngineError as error:
            raise ApiError(503, str(error), code="engine_failed") from error
        ordered = [outputs[index] for index in range(len(self.prompt_ids))]
        choices = [
            self.form.choice(self._choice_index(index, completion.index), output, completion)
            for index, output in enumerate(ordered)
            for completion in output.outputs
        ]
        counts = self._count(ordered)
        more = self.form.more_fields(ordered)
        return {**self._head(self.form.object_name), "choices": choices, "usage": counts, **more}

    async def events(self) -> AsyncGenerator[str, None]:
        """Server-sent events: chunks with what is new, then usage where asked for, then [DONE].

        An engine that fails is an event with `error`, as OpenAI's clients expect it.
        """
        sent: dict[int, Sent] = {}
        last: dict[int, RequestOutput] = {}
        begin, end = self._envelope()
        try:
            async with aclosing(self._outputs(stream=True)) as pairs:
                async for index, output in pairs:
                    last[index] = output
                    pieces = self._pieces(index, output, sent)
                    if pieces:  # those of one step in one write
                        yield "".join([begin + _json(piece) + end for piece in pieces])
            counts = self._count(list(last.values()))
            if self.request.include_usage:
                yield _data(self._head(self.form.chunk_name) | {"choices": [], "usage": counts})
            yield "data: [DONE]\n\n"
        except EngineError as error:
            yield _data(ApiError(503, str(error), code="engine_failed").body())

    def _pieces(self, index: int, output: RequestOutput, sent: dict[int, Sent]) -> list[dict[str, Any]]:
        pieces = []
        for completion in output.outputs:
            choice = self._choice_index(index, completion.index)
            state = sent.setdefault(choice, Sent())
            if state.finished:
                continue
            piece = self.form.delta(choice, output, completion, state)
            if piece is not None:
                pieces.append(piece)
            state.finished = completion.finished
        return pieces

    def _choice_index(self, prompt_index: int, completion_index: int) -> int:
        return prompt_index * self.request.params.n + completion_index

    def _count(self, outputs: list[RequestOutput]) -> dict[str, int]:
        counts = usage(outputs)
        self.log_fields.update(counts)
        return counts

    def _outputs(self, *, stream: bool) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        """Outputs of all prompts as they come, each with the index of its prompt."""
        pairs = merged(
            self.llm.generate(
                {"prompt_token_ids": ids},
                self.request.params,
                request_id=f"{self.form.id_prefix}{self.name}-{index}",
                stream=stream,
                priority=self.request.line.priority,
                timeout_s=self.request.line.timeout_s,
            )
            for index, ids in enumerate(self.prompt_ids)
        )
        return _without_output(pairs) if self.request.prompt_only else pairs

    def _envelope(self) -> tuple[str, str]:
        """What stands before and behind the one choice of every chunk."""
        begin = _data(self._head(self.form.chunk_name)).removesuffix("}\n\n")
        end = '], "usage": null}\n\n' if self.request.include_usage else "]}\n\n"
        return begin + ', "choices": [', end

    def _head(self, object_name: str) -> dict[str, Any]:
        return {
            "id": self.form.id_prefix + self.name,
            "object": object_name,
            "created": self.created,
            "model": self.model_name,
        }


async def merged(
    requests: Iterable[AsyncGenerator[RequestOutput, None]],
) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    """Outputs of several requests as they come, each with the index of its request.

    Closing it, or an error in one of them, closes all.
    """
    generators = list(requests)
    if len(generators) == 1:  # the usual case, without a task per output
        async with aclosing(generators[0]) as outputs:
            async for output in outputs:
                yield 0, output
        return
    pending: dict[asyncio.Task[RequestOutput], int] = {}

    def wait_for_next(index: int) -> None:
        pending[asyncio.ensure_future(_next(generators[index]))] = index

    try:
        for index in range(len(generators)):
            wait_for_next(index)
        while pending:
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                index, output = pending.pop(task), task.result()
                if not output.finished:
                    wait_for_next(index)
                yield index, output
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        for generator in generators:
            await generator.aclose()


async def _without_output(
    pairs: AsyncGenerator[tuple[int, RequestOutput], None],
) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    """The outputs as if no token had been asked for."""
    async with aclosing(pairs):
        async for index, output in pairs:
            nothing = [
                replace(
                    each,
                    text="",
                    token_ids=[],
                    logprobs=None if each.logprobs is None else [],
                    finish_reason="length" if each.finish_reason == "stop" else each.finish_reason,
                )
                for each in output.outputs
            ]
            yield index, replace(output, outputs=nothing)


async def _next(generator: AsyncGenerator[RequestOutput, None]) -> RequestOutput:
    return await anext(generator)


def _data(value: dict[str, Any]) -> str:
    return f"data: {_json(value)}\n\n"
