"""A server for benchmarks: `trtc serve` in a process of its own, started as a user starts it, and what can be seen of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import httpx

from ..core.engine import Engine
from ..runtime.benchmark import setup
from .provenance import commit_of_tree, processor

ROOT = Path(__file__).parents[1]
TINY_OPT = ROOT / "examples" / "tiny-opt"
STUCK_S = 180
"""What takes longer than this counts as stuck."""
_VERSIONS = ("fastapi", "uvicorn", "starlette", "httpx", "numpy", "transformers")

T = TypeVar("T")


class Server:
    """`trtc serve` on a free loopback port. module: whose command line has that command; variables: of the environment."""

    def __init__(
        self,
        engine_dir: Path,
        *options: str,
        module: str = "trtc.cli",
        variables: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        command = [sys.executable, "-m", module, "serve", "--engine-dir", str(engine_dir), "--port", "0"]
        self.process = subprocess.Popen(
            [*command, *options], stderr=subprocess.PIPE, text=True, env=os.environ | variables
        )
        self.log: list[dict[str, Any]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            started = wait_until(lambda: self.events("listening") or self.process.poll() is not None)
            if not self.events("listening"):
                raise SystemExit(f"the server did not start: exit code {self.process.returncode}, {started}")
        except BaseException:
            self.process.kill()
            raise
        self.url: str = self.events("listening")[0]["url"]
        self.model: str = self.events("listening")[0]["model"]

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            try:
                self.log.append(json.loads(line))
            except ValueError:
                self.log.append({"level": "stray", "event": line})

    def events(self, name: str) -> list[dict[str, Any]]:
        return [entry for entry in self.log if entry["event"] == name]

    @property
    def complaints(self) -> list[dict[str, Any]]:
        """Lines of the log that are not of level info."""
        return [entry for entry in self.log if entry["level"] != "info"]

    def metrics(self, **headers: str) -> dict[str, float]:
        """Sample name with labels -> value."""
        text = httpx.get(f"{self.url}/metrics", timeout=STUCK_S, headers=headers).raise_for_status().text
        lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in lines}

    def held(self, **headers: str) -> float:
        """Sequences in the engine."""
        metrics = self.metrics(**headers)
        return metrics["trtc_sequences_running"] + metrics["trtc_sequences_waiting"]

    def leaked(self) -> tuple[float, float]:
        """Sequences and pages that are still held when nothing should be, after STUCK_S at most."""
        end = time.monotonic() + STUCK_S
        while True:
            left = self.held(), self.metrics()["trtc_kv_cache_pages_used"]
            if left == (0, 0) or time.monotonic() > end:
                return left
            time.sleep(0.05)

    def resident_mib(self) -> float:
        """Memory in RAM of the server's process and of its engine's (Linux)."""
        statuses = {int(path.parent.name): _status(path) for path in Path("/proc").glob("[0-9]*/status")}
        ours = [
            status
            for pid, status in statuses.items()
            if self.process.pid in (pid, int(status.get("PPid", "0")))
        ]
        assert ours, "the server is gone"
        return sum(int(status["VmRSS"].split()[0]) for status in ours) / 1024

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        """The exit code. A server that does not end is killed."""
        try:
            return self.process.wait(STUCK_S)
        finally:
            self.process.kill()
            self._reader.join(STUCK_S)


def wait_until(condition: Callable[[], T]) -> T:
    """What `condition` gives once it is true. Raises TimeoutError."""
    end = time.monotonic() + STUCK_S
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise TimeoutError(f"waited {STUCK_S} s")


def build_tiny_opt(folder: Path) -> Path:
    """An engine of the tiny OPT for target cpu, built by `trtc build`."""
    engine_dir = folder / "tiny-opt"
    command = [sys.executable, "-m", "trtc.cli", "build", "--model-dir", str(TINY_OPT)]
    command += ["--output-dir", str(engine_dir), "--dtype", "float32", "--max-batch-size", "8"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return engine_dir


def environment(engine_dir: Path, commit: str | None = None) -> dict[str, Any]:
    """What the numbers depend on: commit, engine, device, versions. commit: where git cannot tell"""
    found = setup(Engine.open(engine_dir, verify=False))
    if found["target"] == "cpu":
        found["device"] = f"{processor()}, {len(os.sched_getaffinity(0))} cores"
    return {
        **commit_of_tree(commit),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        **found,
        "versions": dict(_versions()),
    }


def _status(path: Path) -> dict[str, str]:
    """Of a process; empty when it has ended meanwhile."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _versions() -> Iterator[tuple[str, str]]:
    for name in _VERSIONS:
        with suppress(PackageNotFoundError):
            yield name, version(name)


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` of all do not exceed."""
    return sorted(values)[max(0, int(-(-len(values) * percent // 100)) - 1)]


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    cells = [list(map(str, row)) for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
