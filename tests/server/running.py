"""A server started as a user starts it, and what its clients need."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import httpx
from trtc.bench.serving import STUCK_S as LIMIT_S
from trtc.bench.serving import Server, wait_until

__all__ = ["LIMIT_S", "RunningServer", "wait_until"]


class RunningServer(Server):
    """`trtc serve` in a process of its own, on a free port of this machine, which has nothing to complain about."""

    def __init__(self, engine_dir: Path, *options: str) -> None:
        super().__init__(engine_dir, *options, variables={"OMP_NUM_THREADS": "1"})

    def wait_for_log(self, event: str, **fields: Any) -> dict[str, Any]:
        wanted = {"event": event, **fields}
        return wait_until(lambda: next((e for e in self.log if wanted.items() <= e.items()), None))

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        """One request on a connection of its own, with all the time it may need."""
        return httpx.request(method, self.url + path, timeout=LIMIT_S, **options)

    def wait_until_idle(self) -> None:
        """Every sequence has left the engine, and every page is free."""
        assert self.leaked() == (0, 0)

    def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def wait(self) -> int:
        code = super().wait()
        assert not self.complaints, f"the server complains, or logs what is not JSON: {self.complaints}"
        return code
