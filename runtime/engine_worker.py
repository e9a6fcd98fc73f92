"""The engine's side of an `EngineProcess`: the engine's thread, and commands and news over the connection."""

from __future__ import annotations

import logging
import os
import pickle
import sys
import threading
import time
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from ..core.errors import EngineError, TrtcError
from .engine_process import Limits, LogLine, News
from .engine_thread import EngineThread, RequestStats, Submission
from .heap import keep_heap
from .load_core import EngineOptions, load_core
from .output_stream import Update

SWITCH_S = 0.0005
"""A thread may keep the interpreter so long from another: the engine's gives it up at every launch of a kernel, and with
Python's 5 ms the device would wait each time while commands come."""
STATS_S = 0.1
"""While steps run, news have fresh stats so often."""


class Sender:
    """One end of the connection, for several threads. The other process may be gone: then there is nobody to tell."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._lock = connection, threading.Lock()

    def send(self, message: object) -> None:
        with self._lock:
            try:
                self._connection.send_bytes(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))
            except OSError:
                os._exit(1)


class LogSender(logging.Handler):
    """Hands log lines to the other process, which knows how its log looks."""

    def __init__(self, sender: Sender) -> None:
        super().__init__()
        self._sender = sender

    def emit(self, record: logging.LogRecord) -> None:
        self._sender.send(LogLine(record.name, record.levelno, self.format(record)))


class NewsOutlet:
    """An `Outlet` to the other process. ended: what the engine's thread says of those that have ended, until it is sent"""

    def __init__(self, sender: Sender, ended: list[RequestStats], engine: EngineThread) -> None:
        self._sender, self._ended, self._engine = sender, ended, engine
        self._stats_at = 0.0

    def deliver(self, updates: list[tuple[Submission, Update]]) -> list[Submission]:
        # With the last answer goes what the engine is like afterwards: who has it may ask for that.
        due = self._engine.desk.is_idle or time.monotonic() - self._stats_at > STATS_S
        if updates or self._ended or due:
            self._send([(submission.request_id, update) for submission, update in updates], due)
        return []

    def idle(self) -> None:
        self._send([], True)

    def fail(self, submissions: list[Submission], reason: str) -> None:
        """All of these are among the ended."""
        self._send([], True, reason)

    def _send(self, updates: list[tuple[str, Update]], stats: bool, failure: str | None = None) -> None:
        now = None
        if stats:
            self._stats_at, now = time.monotonic(), self._engine.stats()
        self._sender.send(News(self._ended, updates, now, failure))
        self._ended.clear()


def run(connection: Connection, engine_dir: str | os.PathLike[str], options: EngineOptions) -> None:
    """Loads an engine, says what it takes, and serves until it is told to stop or the other process is gone."""
    sender = Sender(connection)
    logging.getLogger().handlers = [LogSender(sender)]
    logging.captureWarnings(True)
    try:
        core = load_core(engine_dir, **options)
    except TrtcError as error:
        sender.send(error)
        return
    except Exception as error:
        logging.getLogger(__name__).exception("the engine cannot be loaded")
        sender.send(EngineError(f"{os.fspath(engine_dir)}: {type(error).__name__}: {error}"))
        return
    ended: list[RequestStats] = []
    sys.setswitchinterval(SWITCH_S)
    keep_heap()
    sender.send(Limits.of(core.executor))
    take_commands(connection, EngineThread(core, ended.append, partial(NewsOutlet, sender, ended)))
    core.executor.close()


def take_commands(connection: Connection, engine: EngineThread) -> None:
    """Until the last one. Commands: the fields of a `Submission`, the id of one to cancel, None to stop."""
    while True:
        try:
            command: Any = connection.recv()
        except (EOFError, OSError):
            os._exit(1)  # nobody is left who could want anything
        if command is None:
            engine.stop()
            return
        if isinstance(command, dict):
            with suppress(EngineError):  # it has failed, which was said
                engine.submit(Submission(**command, stream=None))
        elif (submission := engine.desk.find(command)) is not None:
            engine.cancel(submission)
