"""Finds out that a rank of a job has died or hangs, and ends this process then.

Every rank writes a counter into the job's store twice a second and reads those of the others. A counter that stands still
for `SILENCE_S` seconds belongs to a rank that is lost. The exchanges of tensors cannot find that out themselves: they would
wait for a rank that is stopped, and cannot tell it from one that computes.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import NoReturn

from torch.distributed import Store  # type: ignore[attr-defined]

INTERVAL_S = 0.5
SILENCE_S = 5.0
COURTESY_S = 1.5
"""How long a rank with nothing to say waits before it ends: launchers end the job with the first rank that does, and the
one that knows the cause must have said it by then."""
_ROUND, _WAITING = 1 << 40, 1 << 39
FIRST = "0 0"
"""What a rank says: how often it has spoken, and how many exchanges it has begun."""
FAILED = "-1 -1"


class Heartbeat:
    """names: how messages call each rank, as `rank 1 on host a`. launcher_pid: end when this parent is gone."""

    def __init__(
        self, store: Store, rank: int, names: Sequence[str], launcher_pid: int | None = None
    ) -> None:
        self._store, self._rank, self._names, self._launcher_pid = store, rank, names, launcher_pid
        self._keys = [f"beat/{other}" for other in range(len(names))]
        self._values = [FIRST] * len(names)
        self._read_at = time.monotonic()
        self._changed_at = [self._read_at] * len(names)
        self._stopped = threading.Event()
        self.progress = 0
        """How far this rank has come: exchanges it has begun in this round, which the owner counts, and rounds."""
        self._deadline: float | None = None
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._beat, self._watch)]

    def start(self) -> None:
        """Returns when every rank has begun to beat."""
        self._store.set(self._keys[self._rank], FIRST)
        self._store.wait(self._keys)
        self._read_at = time.monotonic()
        self._changed_at = [self._read_at] * len(self._names)
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """After an orderly end: what becomes of the other ranks no longer matters."""
        self._stopped.set()
        for thread in self._threads:
            thread.join(INTERVAL_S)

    def fail(self) -> None:
        """Tells the other ranks to end, because this one fails; it says why itself."""
        self.stop()
        if self._read_at > time.monotonic() - SILENCE_S:  # else nobody hears it
            self._store.set(self._keys[self._rank], FAILED)

    def let_others_speak(self) -> None:
        """Called when this rank fails, before `fail`: returns unless another one does, too, which then says why. That spares
        the user what all ranks find wrong from each of them."""
        self._stopped.wait(2 * INTERVAL_S)
        if FAILED in self._values:
            self._stopped.wait()  # `_watch` ends this process

    def next_round(self) -> None:
        """Called by all ranks at the same point. Within a round, ranks may have different exchanges."""
        self.progress = (self.progress // _ROUND + 1) * _ROUND

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, this rank waits for ranks that compute something else, and is not behind any of them."""
        self.progress += _WAITING
        try:
            yield
        finally:
            self.progress -= _WAITING

    @contextmanager
    def limit(self, seconds: float) -> Iterator[None]:
        """Inside, the main thread may wait for work of a device in which ranks wait for each other, and which cannot be
        interrupted. When that takes longer, this process ends."""
        self._deadline = time.monotonic() + seconds
        try:
            yield
        finally:
            self._deadline = None

    def wait_for_verdict(self) -> str:
        """Called when an exchange has failed. If a rank turns out to be lost, this process ends; else returns the name
        of the rank that is furthest behind."""
        self._stopped.wait(SILENCE_S + COURTESY_S + 4 * INTERVAL_S)
        return self._furthest_behind()

    def _furthest_behind(self) -> str:
        begun = [int(value.split()[1]) for value in self._values]
        return self._names[begun.index(min(begun))]

    def _beat(self) -> None:
        for number in count(1):
            if self._stopped.wait(INTERVAL_S):
                return
            try:
                self._store.set(self._keys[self._rank], f"{number} {self.progress}")
                values = [value.decode() for value in self._store.multi_get(self._keys)]
            except RuntimeError:  # rank 0, which keeps the store, is gone: `_watch` sees that nothing is read
                continue
            now = time.monotonic()
            for other, value in enumerate(values):
                if value != self._values[other]:
                    self._values[other], self._changed_at[other] = value, now
            self._read_at = now

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._stopped.wait(INTERVAL_S):
            now = time.monotonic()
            if (
                now - before > 4 * INTERVAL_S
            ):  # this process itself stood still: it cannot blame others for that
                self._read_at, self._changed_at = now, [now] * len(self._names)
            before = now
            self._judge(now)

    def _judge(self, now: float) -> None:
        if self._launcher_pid is not None and os.getppid() != self._launcher_pid:
            self._end(f"the launcher (process {self._launcher_pid}) is gone")
        if FAILED in self._values:
            self._end(None)
        if now - self._read_at > SILENCE_S:
            self._lost(0, now - self._read_at)
        deadline = self._deadline
        if deadline is not None and now > deadline:
            behind = self._furthest_behind()
            self._end(
                f"{self._names[self._rank]}: a step does not end; furthest behind is {behind}; the job ends"
            )
        oldest = min(range(len(self._names)), key=lambda other: self._changed_at[other])
        # the age at the last reading: while nothing is read, nobody's counter can change
        if self._read_at - self._changed_at[oldest] > SILENCE_S:
            self._lost(oldest, self._read_at - self._changed_at[oldest])

    def _lost(self, other: int, seconds: float) -> NoReturn:
        speaker = 0 if other != 0 else 1
        message = f"{self._names[other]} died or hangs: no sign of life for {seconds:.0f} s; the job ends"
        self._end(message if self._rank == speaker else None)

    def _end(self, message: str | None) -> NoReturn:
        """Ends the process at once: its main thread may be waiting for the lost rank and cannot be reached."""
        try:
            if message is None:
                time.sleep(COURTESY_S)
            else:
                print(f"trtc: error: {message}", file=sys.stderr, flush=True)
        finally:  # whoever has read what we say may be gone
            os._exit(1)
