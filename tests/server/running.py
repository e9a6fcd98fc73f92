"""A server started as a user starts it, and what its clients need."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

LIMIT_S = 180
"""For what takes a second on an idle machine: only a server that is stuck takes so long."""


class RunningServer:
    """`trtc serve` in a process of its own, on a free port of this machine. `log`: its lines so far, parsed."""

    def __init__(self, engine_dir: Path, *options: str) -> None:
        command = [sys.executable, "-m", "trtc.cli", "serve", "--engine-dir", str(engine_dir), "--port", "0"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [*command, *options], stderr=subprocess.PIPE, text=True, env=environment
        )
        self.log: list[dict[str, Any]] = []
        self.stray_lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            self.url: str = self.wait_for_log("listening")["url"]
        except BaseException:
            self.process.kill()
            raise

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            try:
                self.log.append(json.loads(line))
            except ValueError:
                self.stray_lines.append(line)

    def wait_for_log(self, event: str, **fields: Any) -> dict[str, Any]:
        wanted = {"event": event, **fields}

        def found() -> dict[str, Any] | None:
            return next((e for e in self.log if wanted.items() <= e.items()), None)

        return wait_until(lambda: found() or (self.process.poll() is not None and found()))

    def metrics(self, **headers: str) -> dict[str, float]:
        """Sample name with labels -> value."""
        text = self.request("GET", "/metrics", headers=headers).raise_for_status().text
        lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in lines}

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        """One request on a connection of its own, with all the time it may need."""
        return httpx.request(method, self.url + path, timeout=LIMIT_S, **options)

    def held(self, **headers: str) -> float:
        """Sequences in the engine."""
        metrics = self.metrics(**headers)
        return metrics["trtc_sequences_running"] + metrics["trtc_sequences_waiting"]

    def wait_until_idle(self) -> None:
        """Every sequence has left the engine, and every page is free."""
        names = ("trtc_sequences_running", "trtc_sequences_waiting", "trtc_kv_cache_pages_used")

        def idle() -> bool:
            metrics = self.metrics()
            return all(metrics[name] == 0 for name in names)

        wait_until(idle)

    def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def wait(self) -> int:
        try:
            code = self.process.wait(LIMIT_S)
        finally:
            self.process.kill()
        self._reader.join(LIMIT_S)
        complaints = [entry for entry in self.log if entry["level"] != "info"]
        assert not complaints, f"the server complains: {complaints}"
        assert not self.stray_lines, "the log has lines that are not JSON:\n" + "".join(self.stray_lines)
        return code


def wait_until(condition: Callable[[], Any]) -> Any:
    """What `condition` gives once it is true."""
    end = time.monotonic() + LIMIT_S
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError("waited too long")
