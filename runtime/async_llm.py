"""`AsyncLLM`: requests from event loops, batched together as they come, on one engine directory."""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections.abc import AsyncGenerator, Sequence
from itertools import count
from os import PathLike
from types import TracebackType
from typing import Self, Unpack

from ..core.errors import RequestError
from .engine_core import EngineCore
from .engine_process import EngineProcess
from .engine_thread import EngineStats, EngineThread, OnFinished, Submission
from .executor import Executor
from .load_core import CoreOptions, EngineOptions, check_keywords, load_core
from .output_stream import OutputStream
from .outputs import RequestOutput
from .prompt import Prompt, is_text, tokenized
from .request import check_line
from .sampling_params import SamplingParams
from .tokenizer import Tokenizer
from .worker import Worker

_request_ids = count()


def _release(engine: EngineThread | EngineProcess, executor: Executor) -> None:
    engine.stop()
    executor.close()


def _release_soon(engine: EngineThread | EngineProcess, executor: Executor, process: int) -> None:
    """In a thread: the garbage collector may run in an event loop, or in the engine's own thread. Not in a forked process,
    whose parent goes on with the engine."""
    if os.getpid() == process:
        threading.Thread(target=_release, args=(engine, executor), daemon=True).start()


class AsyncLLM:
    """Generation for asyncio: `async for output in llm.generate(prompt, params)`.

    Requests of all tasks share the batches of one engine, which runs in a thread or a process of its own.
    """

    executor: Executor
    tokenizer: Tokenizer | None
    _engine: EngineThread | EngineProcess

    def __init__(
        self,
        engine_dir: str | PathLike[str],
        *,
        on_finished: OnFinished | None = None,
        own_process: bool = False,
        **options: Unpack[EngineOptions],
    ) -> None:
        """Loads an engine directory.

        on_finished: called for every request that has ended, in a thread of the engine's; what it raises is logged
        own_process: the engine runs in a process of its own, where steps do not wait for what this one does with their tokens;
                     not for an engine of several ranks
        options:     those of `LLM`
        Raises EngineError when the directory is not an engine this version can run, TargetError when this
        machine cannot run it, TypeError for an option that there is not.
        """
        check_keywords("AsyncLLM", options, "on_finished", "own_process")
        if own_process:
            self._talk(Worker(engine_dir, **options), on_finished)
        else:
            self._start(load_core(engine_dir, **options), on_finished)

    @classmethod
    def from_worker(cls, worker: Worker, *, on_finished: OnFinished | None = None) -> Self:
        """Runs on the engine that `worker` loads, in its process."""
        llm = cls.__new__(cls)
        llm._talk(worker, on_finished)
        return llm

    @classmethod
    def from_executor(
        cls,
        executor: Executor,
        tokenizer: Tokenizer | None = None,
        *,
        on_finished: OnFinished | None = None,
        **options: Unpack[CoreOptions],
    ) -> Self:
        """Runs on an executor that is loaded already, or that is not made from an engine directory."""
        llm = cls.__new__(cls)
        llm._start(EngineCore(executor, tokenizer, **options), on_finished)
        return llm

    def _start(self, core: EngineCore, on_finished: OnFinished | None) -> None:
        self._core, self.executor, self.tokenizer = core, core.executor, core.tokenizer
        self._engine = EngineThread(core, on_finished)
        self._release_with_me()

    def _talk(self, worker: Worker, on_finished: OnFinished | None) -> None:
        try:
            self.tokenizer = Tokenizer.from_dir(worker.engine_dir)
            engine = EngineProcess(worker, self.tokenizer, on_finished)
        except BaseException:
            worker.kill()
            raise
        self._engine, self.executor = engine, engine.executor
        self._release_with_me()

    def _release_with_me(self) -> None:
        """Nobody can shut down an AsyncLLM that is gone, as the one before in a cell of a notebook that runs again."""
        self._unless_shut_down = weakref.finalize(
            self, _release_soon, self._engine, self.executor, os.getpid()
        )
        self._unless_shut_down.atexit = False

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        stream: bool = True,
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yields the output so far whenever it has grown; the last one is finished.

        A reader slower than the engine skips outputs, never tokens: each holds everything so far. Leaving the
        loop, cancelling the task or closing the generator cancels the request and frees its pages after the step
        under way.

        request_id: unique among unfinished requests; None: made up
        stream:     False: only the finished output is made and given
        priority:   lower goes first; a request of a higher number is overtaken, but not for ever (`PRIORITY_STEP`)
        timeout_s:  after so many seconds from now it ends with what it has, for the reason "timeout"
        Raises RequestError, before anything runs, for what the engine cannot do; EngineError when the engine
        fails or is shut down.
        """
        params = SamplingParams() if sampling_params is None else sampling_params
        if not isinstance(params, SamplingParams):
            raise RequestError(
                f"sampling_params is a {type(params).__name__}; accepted: SamplingParams, or None"
            )
        check_line(priority, timeout_s)
        if is_text(prompt):
            text, token_ids = await asyncio.to_thread(self.tokenize, prompt)
        else:
            text, token_ids = self.tokenize(prompt)
        self.check_request(token_ids, params)
        name = f"{next(_request_ids)}" if request_id is None else request_id
        reader = OutputStream(name, text, token_ids, params.n)
        submission = Submission(name, token_ids, params, text, stream, reader, priority, timeout_s)
        self._engine.submit(submission)
        try:
            while True:
                output = await reader.get()
                yield output
                if output.finished:
                    return
        finally:
            self._engine.cancel(submission)

    def tokenize(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """The text of a prompt, if it has one, and its token ids. Raises RequestError for what is no prompt."""
        text, token_ids = tokenized(prompt, self.tokenizer)
        return text, list(token_ids)

    def check_request(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        """Raises RequestError, naming value and limit, when this engine cannot serve the request."""
        self._engine.check_request(prompt_token_ids, params)

    def stats(self) -> EngineStats:
        """What the engine holds; a snapshot that may already have changed."""
        return self._engine.stats()

    @property
    def failure(self) -> str | None:
        """Why the engine cannot run any more: it failed, or was shut down. None while it runs."""
        return self._engine.desk.failure

    async def drain(self, timeout_s: float | None = None) -> bool:
        """Takes no new requests and waits for those it has. False when that took longer than `timeout_s`."""
        self._engine.desk.refuse("the engine is draining and takes no new requests")
        return await asyncio.to_thread(self._engine.desk.wait_idle, timeout_s)

    def shutdown(self) -> None:
        """Ends the engine after the step under way and releases it; unfinished requests get an EngineError.

        Calling it twice is harmless.
        """
        self._unless_shut_down.detach()
        _release(self._engine, self.executor)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.shutdown)
