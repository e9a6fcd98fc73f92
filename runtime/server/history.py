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
from .metrics import Metrics


@dataclass(frozen=True)
class Sample:
    """One moment, and what happened since the one before it.

    time:                          seconds since the epoch
    running, waiting:              then; sequences
    pages, cached_pages:           then; used pages of the KV cache, and free ones that the prefix cache knows
    prefix_hits:                   of the prompt pages looked up in the prefix cache those that it had; None when none were
    prompt_tokens, output_tokens:  per second
    finished, failed:              engine requests per second that ended by themselves, and otherwise
    refused:                       HTTP answers per second with an error
    ttft_p50, ttft_p99, tpot_p50, tpot_p99: of those that finished, in seconds; None when none did
    """

    time: float
    running: int
    waiting: int
    pages: int
    cached_pages: int
    prefix_hits: float | None
    prompt_tokens: float
    output_tokens: float
    finished: float
    failed: float
    refused: float
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
        self._last_time, self._last = time.monotonic(), Counter[str]()

    def request_ended(self, stats: RequestStats) -> None:
        """As `AsyncLLM` reports it, from the engine's thread."""
        with self._lock:
            self.outcomes[stats.outcome] += 1
            self._ended.append(stats)
            self._recent.appendleft((time.time(), stats))

    async def run(self, stats: Callable[[], EngineStats], metrics: Metrics) -> None:
        """Takes samples until it is cancelled."""
        while True:
            await asyncio.sleep(self.interval_s)
            self.take(stats(), metrics.num_refused)

    def take(self, stats: EngineStats, num_refused: int) -> None:
        """Adds a sample. Rates are over the time since the last one."""
        with self._lock:
            ended, self._ended = self._ended, []
            now, before = time.monotonic(), self._last
            seconds = max(now - self._last_time, 1e-6)
            # A preempted request computes its prompt again: tokens are counted once.
            self._last_time, self._last = now, _counters(stats, num_refused) | before
            new = self._last - before
            finished = [each for each in ended if each.outcome in ("stop", "length")]
            ttft = [each.ttft_s for each in finished if each.ttft_s is not None]
            tpot = [each.tpot_s for each in finished if each.tpot_s is not None]
            self._samples.append(
                Sample(
                    time=round(time.time(), 3),  # as it is told: nobody gets a sample twice
                    running=stats.num_running,
                    waiting=stats.num_waiting,
                    pages=stats.num_used_pages,
                    cached_pages=stats.num_cached_pages,
                    prefix_hits=new["found"] / new["looked_up"] if new["looked_up"] else None,
                    prompt_tokens=new["prompt"] / seconds,
                    output_tokens=new["output"] / seconds,
                    finished=len(finished) / seconds,
                    failed=(len(ended) - len(finished)) / seconds,
                    refused=new["refused"] / seconds,
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


def _counters(stats: EngineStats, num_refused: int) -> Counter[str]:
    """What only grows. `|` of two such counters has the larger of each."""
    return Counter(
        prompt=stats.num_prompt_tokens,
        output=stats.num_output_tokens,
        looked_up=stats.num_looked_up_pages,
        found=stats.num_found_pages,
        refused=num_refused,
    )


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, 5)
