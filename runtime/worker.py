"""A process that loads an engine and will run it. Imports nothing heavy: it may start before this process has torch."""

from __future__ import annotations

import os
import subprocess
import sys
from multiprocessing.connection import Pipe
from types import TracebackType
from typing import TYPE_CHECKING, Self, Unpack

if TYPE_CHECKING:
    from .load_core import EngineOptions

MODULE = "trtc.runtime.worker_main"
"""What the process runs."""


class Worker:
    """Starts the process and tells it what to load; an `EngineProcess` does the talking from then on.

    Leaving it as a context ends the process, which does nothing when that has ended well.
    """

    def __init__(self, engine_dir: str | os.PathLike[str], **options: Unpack[EngineOptions]) -> None:
        """options: those of `LLM`"""
        self.engine_dir = engine_dir
        self.connection, other = Pipe()
        command = [sys.executable, "-P", "-m", MODULE, str(other.fileno())]
        self.process = subprocess.Popen(command, pass_fds=[other.fileno()], stdin=subprocess.DEVNULL)
        other.close()  # so that the end of either process is the end of the connection
        self.connection.send((os.fspath(engine_dir), options))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
