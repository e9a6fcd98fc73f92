"""Starts the ranks of a job on this machine and ends them together. Imports nothing heavy: it only waits."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from ..core.errors import TargetError
from .placement import Placement, environment
from .signals import handled

POLL_S = 0.02
GRACE_S = 1.0
"""From SIGTERM to SIGKILL."""


def launch_ranks(command: Sequence[str], count: int, *, drain_s: float | None = None) -> int:
    """Runs `command` as `count` ranks and returns their exit code: 0, or that of the first rank to fail.

    A rank that fails takes the others with it, and so does a SIGINT, SIGTERM or SIGHUP to this process, unless it was started
    to ignore that signal.
    drain_s: after such a signal, which the ranks get as SIGTERM, they have so long to end by themselves, and their exit code
    is returned as if there had been none.
    Raises TargetError, naming rank, host and signal, when a rank was killed.
    """
    with tempfile.TemporaryDirectory(prefix="trtc-") as folder, _terminable():
        rendezvous = str(Path(folder) / "rendezvous")
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(count):
                place = Placement(rank, count, rendezvous, os.getpid())
                # groups of their own: a Ctrl-C in the terminal reaches us alone, and we end the ranks once
                processes.append(
                    subprocess.Popen(
                        command,
                        env={**os.environ, **environment(place)},
                        stdin=subprocess.DEVNULL,
                        process_group=0,
                    )
                )
            return _wait(processes)
        except (SystemExit, KeyboardInterrupt):
            if drain_s is None:
                raise
            _end(processes, drain_s)
            return max((abs(int(process.returncode)) for process in processes), default=0)
        finally:
            _end(processes)


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    while True:
        codes = [process.poll() for process in processes]
        for rank, code in enumerate(codes):
            if code is not None and code < 0:
                raise TargetError(
                    f"rank {rank} on host {socket.gethostname()} (process {processes[rank].pid}) was killed by "
                    f"{signal.Signals(-code).name}; the job ends"
                )
        failed = next((code for code in codes if code), None)
        if failed is not None:
            return failed
        if None not in codes:
            return 0
        time.sleep(POLL_S)


def _end(processes: Sequence[subprocess.Popen[bytes]], grace_s: float = GRACE_S) -> None:
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + grace_s
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM and SIGHUP raise SystemExit inside, as SIGINT raises KeyboardInterrupt, so that the ranks are ended."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread can have handlers
        return
    with handled(stop, signal.SIGTERM, signal.SIGHUP):
        yield
