"""The last minutes of a server, for its status page."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..engine_thread import EngineStats, RequestStats


@dataclass(frozen=True)
class Sample:
    """One moment, and what happened since the one before it.

    time:                          seconds since the epoch
    running, waiting, pages:       then; sequences, and used pages of the KV cache
    prompt_tokens, output_tokens:  per second
    finished, failed:              engine requests per second that ended by themselves, and by cancelling or an error
    ttft_p50, ttft_p99, tpot_p50, tpot_p99: of those that finished, in seconds; None when none did
    """

    time: float
    running: int
    waiting: int
    pages: int
    prompt_tokens: float
    output_tokens: float
    finished: float
    failed: float
    ttft_p50: float | None
    ttft_p99: float | None
    tpot_p50: float | None
    tpot_p99: float | None


class History:
    """A ring of samples, one every `interval_s`, and the requests that ended last. Thread-safe."""

    def __init__(self, *, interval_s: float = 1.0, num_samples: int = 600, num_recent: int = 12) -> None:
        self.interval_s = interval_s
        self.outcomes: Counter[str] = Counter()
        """Engine requests that have ended since the start, by outcome."""
        self._samples: deque[Sample] = deque(maxlen=num_samples)
        self._recent: deque[tuple[float, RequestStats]] = deque(maxlen=num_recent)
        self._ended: list[RequestStats] = []
        self._lock = threading.Lock()
        self._last = (time.monotonic(), 0, 0)

    def request_ended(self, stats: RequestStats) -> None:
        """As `AsyncLLM` reports it, from the engine's thread."""
        with self._lock:
            self.outcomes[stats.outcome] += 1
            self._ended.append(stats)
            self._recent.appendleft((time.time(), stats))

    async def run(self, stats: Callable[[], EngineStats]) -> None:
        """Takes samples until it is cancelled."""
        self._last = (time.monotonic(), *_tokens(stats()))
        while True:
            await asyncio.sleep(self.interval_s)
            self.take(stats())

    def take(self, stats: EngineStats) -> None:
        """Adds a sample. Rates are over the time since the last one."""
        now, (prompt, output) = time.monotonic(), _tokens(stats)
        with self._lock:
            ended, self._ended = self._ended, []
            then, prompt_before, output_before = self._last
            seconds = max(now - then, 1e-6)
            # A preempted request computes its prompt again: tokens are counted once.
            self._last = (now, max(prompt, prompt_before), max(output, output_before))
            finished = [each for each in ended if each.outcome in ("stop", "length")]
            ttft = [each.ttft_s for each in finished if each.ttft_s is not None]
            tpot = [each.tpot_s for each in finished if each.tpot_s is not None]
            self._samples.append(
                Sample(
                    time=round(time.time(), 3),  # as it is told: nobody gets a sample twice
                    running=stats.num_running,
                    waiting=stats.num_waiting,
                    pages=stats.num_used_pages,
                    prompt_tokens=(self._last[1] - prompt_before) / seconds,
                    output_tokens=(self._last[2] - output_before) / seconds,
                    finished=len(finished) / seconds,
                    failed=(len(ended) - len(finished)) / seconds,
                    ttft_p50=percentile(ttft, 50),
                    ttft_p99=percentile(ttft, 99),
                    tpot_p50=percentile(tpot, 50),
                    tpot_p99=percentile(tpot, 99),
                )
            )

    def columns(self, since: float) -> dict[str, list[float | None]]:
        """Samples later than `since`, a list for each of their fields."""
        with self._lock:
            samples = [sample for sample in self._samples if sample.time > since]
        names = [field.name for field in fields(Sample)]
        return {name: [_short(getattr(sample, name)) for sample in samples] for name in names}

    def recent(self) -> list[dict[str, Any]]:
        """The requests that ended last, the newest first."""
        with self._lock:
            recent = list(self._recent)
        return [{"time": round(ended, 3), **asdict(stats)} for ended, stats in recent]


def percentile(values: Sequence[float], percent: float) -> float | None:
    """The smallest value that at least `percent` of all do not exceed; None of none."""
    if not values:
        return None
    rank = -(-len(values) * percent // 100)
    return sorted(values)[max(0, int(rank) - 1)]


def _tokens(stats: EngineStats) -> tuple[int, int]:
    return stats.num_prompt_tokens, stats.num_output_tokens


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, 5)
