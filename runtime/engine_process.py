"""The engine in a process of its own: the same calls as `EngineThread`, and an interpreter for the event loop alone.

Steps and HTTP both need the interpreter's lock; in one process each waits for the other, and so does the device. Requests go to
the process as they come; one message a step comes back, with what is new of all requests (`engine_worker.py`).
"""

from __future__ import annotations

import logging
import os
import pickle
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from ..core.errors import EngineError
from .desk import Desk
from .engine_core import EngineCore
from .engine_thread import EngineStats, OnFinished, RequestStats, Streams, Submission, report
from .executor import Executor, PageCopier
from .output_stream import Update
from .sampling_params import SamplingParams
from .step_input import StepInput
from .tokenizer import Tokenizer
from .worker import Worker

_logger = logging.getLogger(__name__)

_SENT = (
    "request_id",
    "prompt_token_ids",
    "params",
    "prompt",
    "report_steps",
    "priority",
    "timeout_s",
    "submitted",
)
"""Fields of a `Submission`. Times are comparable: both processes read the machine's monotonic clock."""


@dataclass(frozen=True)
class Limits:
    """An `Executor` that only says what its engine takes: the steps run elsewhere."""

    num_pages: int
    page_size: int
    max_batch_size: int
    max_num_tokens: int
    max_seq_len: int
    max_input_len: int
    max_beam_width: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]

    @classmethod
    def of(cls, executor: Executor) -> Limits:
        kind = CopyingLimits if isinstance(executor, PageCopier) else cls
        return kind(**{name: getattr(executor, name) for name in cls.__dataclass_fields__})

    def execute(self, step: StepInput) -> torch.Tensor:
        raise AssertionError("the engine runs in another process")

    def close(self) -> None:
        """Nothing is held here."""


class CopyingLimits(Limits):
    """Of an engine whose pages can be copied."""

    def copy_pages(self, source: Sequence[int], target: Sequence[int]) -> None:
        raise AssertionError("the engine runs in another process")


@dataclass(frozen=True)
class News:
    """A message from the process. Requests are named by their ids.

    ended:   before any of `updates`
    failure: why the engine does not run any more; its last message
    """

    ended: list[RequestStats]
    updates: list[tuple[str, Update]]
    stats: EngineStats | None = None
    failure: str | None = None


@dataclass(frozen=True)
class LogLine:
    """What the process has logged, for the log of this one."""

    name: str
    level: int
    text: str


class EngineProcess:
    """Talks to the process of a worker. The methods are those of `EngineThread`."""

    def __init__(self, worker: Worker, tokenizer: Tokenizer | None, on_finished: OnFinished | None) -> None:
        """Blocks until the engine is loaded; raises what loading it raises."""
        self._on_finished = on_finished
        self._streams = Streams()
        self.desk = Desk()
        self._sending = threading.Lock()
        self._connection, self._process = worker.connection, worker.process
        self.executor = self._loaded(worker)
        self._checks = EngineCore(self.executor, tokenizer)
        self._stats = EngineStats(0, 0, 0, self.executor.num_pages, 0, 0)
        self._reader = threading.Thread(target=self._read, name="trtc-engine-news", daemon=True)
        self._reader.start()

    def submit(self, submission: Submission) -> None:
        """See `EngineThread.submit`."""
        self.desk.register(submission)
        self._send({name: getattr(submission, name) for name in _SENT})

    def cancel(self, submission: Submission) -> None:
        """See `EngineThread.cancel`."""
        if self.desk.holds(submission):
            self._send(submission.request_id)

    def check_request(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        """Raises RequestError, naming value and limit, when the engine cannot serve the request. For any thread."""
        self._checks.check_request(prompt_token_ids, params)

    def stats(self) -> EngineStats:
        """What the process last said of itself: while it is busy a fraction of a second ago."""
        return self._stats

    def stop(self) -> None:
        """Ends the process after the step under way; requests that are left get an EngineError."""
        self._send(None)
        self._reader.join()
        self._process.wait()

    def _loaded(self, worker: Worker) -> Limits:
        while True:
            try:
                message = self._connection.recv()
            except (EOFError, OSError):
                code = self._process.wait()
                raise EngineError(
                    f"{os.fspath(worker.engine_dir)}: the engine's process ended while it was loading: exit code {code}"
                ) from None
            if isinstance(message, Limits):
                return message
            if isinstance(message, BaseException):
                raise message
            _log(message)

    def _send(self, message: object) -> None:
        # Where the process has ended, `_read` notices it too, and tells everybody.
        with self._sending, suppress(OSError):
            self._connection.send_bytes(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))

    def _read(self) -> None:
        try:
            while True:
                message = self._connection.recv()
                if isinstance(message, LogLine):
                    _log(message)
                else:
                    self._take(message)
        except (EOFError, OSError):
            reason = f"the engine's process has ended: exit code {self._process.wait()}"
            if self.desk.failure is None:
                _logger.error(reason)
            self._fail(reason)

    def _take(self, news: News) -> None:
        updates = [(self.desk.known(name), update) for name, update in news.updates]
        ended = [self.desk.known(stats.request_id) for stats in news.ended]
        if news.failure is not None:  # before anybody hears of it: from here on `submit` raises
            self.desk.fail(news.failure)
        for stats in news.ended:
            report(self._on_finished, stats)
        if news.stats is not None:
            self._stats = news.stats
        self.desk.remove(ended)
        for submission in self._streams.deliver(updates):
            self.cancel(submission)
        if news.failure is not None:
            self._streams.fail(ended, news.failure)
            self._fail(news.failure)

    def _fail(self, reason: str) -> None:
        """Ends what is left, of which the process has not told anything."""
        left = self.desk.fail(reason)
        for submission in left:
            report(self._on_finished, submission.stats("error"))
        self.desk.remove(left)
        self._streams.fail(left, reason)


def _log(line: LogLine) -> None:
    logging.getLogger(line.name).log(line.level, line.text)
