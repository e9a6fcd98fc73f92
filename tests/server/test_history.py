"""Samples of the status page. Oracle: by hand; for percentiles, the definition of the nearest rank."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trtc.runtime.engine_thread import EngineStats, RequestStats
from trtc.runtime.server.history import History, percentile
from trtc.runtime.server.metrics import Metrics

STATS = EngineStats(
    num_running=3,
    num_waiting=1,
    num_used_pages=10,
    num_pages=64,
    num_prompt_tokens=0,
    num_output_tokens=0,
    num_cached_pages=7,
)
ENDED = RequestStats("r", "length", 5, 7, ttft_s=0.25, tpot_s=0.01, e2e_s=1.0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`clock(seconds)` lets time pass."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "time", lambda: 1000 + now[0])

    def passes(seconds: float) -> None:
        now[0] += seconds

    return passes


def test_a_sample_says_what_is_and_what_happened_since_the_last(clock: Any) -> None:
    history = History()
    for outcome in ("length", "stop", "abort", "error"):
        history.request_ended(replace(ENDED, outcome=outcome, ttft_s=0.5 if outcome == "stop" else 0.25))
    clock(2)
    found = replace(STATS, num_looked_up_pages=4, num_found_pages=3)
    history.take(replace(found, num_prompt_tokens=20, num_output_tokens=50), 8)
    clock(4)
    # a preempted request computes its prompt again: nothing is counted twice, and no rate is negative
    history.take(replace(found, num_running=0, num_prompt_tokens=12, num_output_tokens=90), 8)
    assert history.columns(0) == {
        "time": [1102.0, 1106.0],
        "running": [3, 0],
        "waiting": [1, 1],
        "pages": [10, 10],
        "cached_pages": [7, 7],
        "prefix_hits": [0.75, None],
        "prompt_tokens": [10.0, 0.0],
        "output_tokens": [25.0, 10.0],
        "finished": [1.0, 0.0],
        "failed": [1.0, 0.0],
        "refused": [4.0, 0.0],
        "ttft_p50": [0.25, None],
        "ttft_p99": [0.5, None],
        "tpot_p50": [0.01, None],
        "tpot_p99": [0.01, None],
    }
    assert history.columns(1102.0)["time"] == [1106.0]
    assert history.outcomes == {"length": 1, "stop": 1, "abort": 1, "error": 1}


def test_only_the_last_samples_and_requests_are_kept(clock: Any) -> None:
    history = History(num_samples=5, num_recent=3)
    for index in range(20):
        clock(1)
        history.request_ended(replace(ENDED, request_id=str(index)))
        history.take(STATS, 0)
    assert history.columns(0)["time"] == [1116.0, 1117.0, 1118.0, 1119.0, 1120.0]
    assert [each["request_id"] for each in history.recent()] == ["19", "18", "17"]
    assert history.recent()[0]["ttft_s"] == 0.25


def test_samples_are_taken_until_it_is_cancelled() -> None:
    history = History(interval_s=0.001)

    async def main() -> None:
        task = asyncio.create_task(history.run(lambda: STATS, Metrics()))
        while len(history.columns(0)["time"]) < 3:
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.wait([task])

    asyncio.run(main())


@settings(deadline=None)
@given(values=st.lists(st.floats(0, 10), min_size=1, max_size=30), percent=st.integers(1, 100))
def test_percentiles_are_those_of_the_nearest_rank(values: list[float], percent: int) -> None:
    found = percentile(values, percent)
    assert found in values

    def share(limit: float) -> float:
        return sum(value <= limit for value in values) / len(values) * 100

    assert share(found) >= percent - 1e-9
    assert all(share(value) < percent for value in values if value < found)


def test_no_values_have_no_percentile() -> None:
    assert percentile([], 50) is None
