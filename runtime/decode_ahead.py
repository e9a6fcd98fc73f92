"""Decode steps that the device runs while the host is still reading the tokens of earlier ones.

While every running sequence decodes greedily, nobody can be admitted and prompt lookup has no guess that pays (`Drafting`),
the host needs to decide nothing: it enqueues steps and reads their tokens one burst later. A sequence that ends is noticed
late; the tokens it got since are dropped, and from the next burst on its row rests. Pages are given to others only when no step
is under way that could still write to them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .batch import Batch
from .executor import DecodeLoop, LoopBehindSteps
from .request import Request, RequestStatus
from .scheduler import Scheduler
from .step_input import StepInput
from .step_queue import StepQueue

HORIZONS = (128, 32, 8)
"""Tokens for which pages are reserved at a start; the first for which there are enough."""
CROWD = 32
"""Sequences of which one ends every few steps. While others wait for their places, each end would drain the device."""
MAX_BURST = 8
BURST_SECONDS = 0.0015
"""Steps are enqueued in bursts of about this long, so that the host's work for a burst hides behind the next one."""


@dataclass(frozen=True)
class _Flight:
    ticket: Any
    count: int


class DecodeAhead:
    """Keeps the device busy with decode steps of the scheduler's running requests."""

    def __init__(
        self,
        loop: DecodeLoop,
        scheduler: Scheduler,
        clock: Callable[[], float] = time.perf_counter,
        *,
        step_by_step: bool = False,
    ) -> None:
        """clock: seconds, by which steps are timed. step_by_step: whether a `StepQueue` can do instead, in a crowd."""
        self._step_by_step = step_by_step
        self._loop, self._scheduler, self._clock = loop, scheduler, clock
        self._behind = loop if isinstance(loop, LoopBehindSteps) else None
        self._requests: list[Request] = []
        self._rows: list[int] = []
        """Of `_requests`: those that still run, as far as was noticed; `_running` are their requests."""
        self._running: list[Request] = []
        self._num_stopped = 0
        self._flights: deque[_Flight] = deque()
        self._left = 0
        """Steps that may still be enqueued before pages end or the first sequence reaches its length."""
        self._step_seconds = BURST_SECONDS
        self._last_collected = 0.0

    @property
    def is_idle(self) -> bool:
        """Whether no step is under way."""
        return not self._flights

    def ready(self) -> bool:
        """Whether `steps` has something to give: steps are under way, or could be started now."""
        return bool(self._flights) or (self.suits() and self._start())

    def start_behind(self, queue: StepQueue) -> None:
        """Where that `suits`: starts steps behind the one that `queue` has under way, if its tokens need not be known for it.

        The caller then collects that step, and calls `followed`, or `drop` where it has failed.
        """
        assert not self._flights, "steps are under way"
        if self._behind is not None:
            self._start(queue)

    def followed(self) -> None:
        """The step before those under way has ended just now: theirs is the time from here on."""
        self._last_collected = self._clock()

    def drop(self) -> None:
        """Lets the steps under way run to their end and forgets them: nothing has been computed."""
        flights, self._flights = self._flights, deque()
        self._requests, self._rows, self._running, self._left = [], [], [], 0
        for flight in flights:
            self._loop.loop_collect(flight.ticket)

    def steps(self) -> Iterator[tuple[list[Request], list[int]]]:
        """The steps of the oldest burst: for each the requests that still run and their new tokens.

        The caller enters each step into the scheduler before it takes the next one.
        """
        self._rest()
        if self._left and self._may_go_on():
            self._enqueue()
        flight = self._flights.popleft()
        try:
            tokens = self._loop.loop_collect(flight.ticket)
        except BaseException:  # what is behind them would be taken for them
            self.drop()
            raise
        self._measure(flight.count)
        for row in tokens.tolist():
            self._rest()
            if self._rows:
                yield self._running, [row[index] for index in self._rows]

    def suits(self) -> bool:
        """Whether the sequences that run should decode in bursts, apart from guesses and pages."""
        scheduler = self._scheduler
        if self._step_by_step and scheduler.waiting and len(scheduler.running) >= CROWD:
            return False
        return scheduler.only_decodes() and all(request.params.plain_greedy for request in scheduler.running)

    def _start(self, queue: StepQueue | None = None) -> bool:
        """Starts steps, where that `suits`; False: a guess pays, or there are no pages.

        queue: behind its last step, after which nothing is computed for those that get their last token from it.
        """
        scheduler = self._scheduler
        requests = [request for request in scheduler.running if scheduler.tokens_left(request)]
        looking = [(r.lookup, r.token_ids) for r in requests if r.lookup is not None]
        if looking and scheduler.drafting.pays(looking, len(requests)):
            return False
        hold = scheduler.drafting.hold if looking else HORIZONS[0]
        horizons = (hold, *(count for count in HORIZONS if count < hold))
        counts = self._within(horizons, requests)
        horizon = next((count for count in counts if scheduler.reserve(count)), 0)
        if not horizon:
            return False
        self._requests = requests
        self._rows, self._running = list(range(len(self._requests))), self._requests
        self._num_stopped = scheduler.num_stopped
        batch = scheduler.decode_batch(self._requests)
        self._load(batch, queue)
        self._left = horizon
        self._last_collected = self._clock()
        self._enqueue()
        return True

    def _load(self, batch: Batch, queue: StepQueue | None) -> None:
        step = StepInput.from_batch(batch)
        source = None if queue is None else queue.source(batch, step)
        if source is None:
            self._loop.loop_load(step.token_ids, step.kv_length, step.page_table)
        else:
            assert self._behind is not None
            self._behind.loop_load_behind(step.token_ids, source, step.kv_length, step.page_table)

    def _rest(self) -> None:
        """Lets the rows rest whose requests have ended since the last look."""
        if self._scheduler.num_stopped == self._num_stopped:
            return
        self._num_stopped = self._scheduler.num_stopped
        running = {row for row in self._rows if self._requests[row].status is RequestStatus.RUNNING}
        if len(running) == len(self._rows):  # who has ended was none of these
            return
        self._loop.loop_rest([row for row in self._rows if row not in running])
        self._rows = [row for row in self._rows if row in running]
        self._running = [self._requests[row] for row in self._rows]

    def _within(self, horizons: Sequence[int], requests: Sequence[Request]) -> Iterator[int]:
        """Numbers of steps to try: no more than until the last sequence ends, as far as lengths tell; the first one, where
        somebody waits for its place and for the pages that the others would get for nothing."""
        lengths = [self._scheduler.tokens_left(request) for request in requests]
        limit = (min if self._scheduler.waiting else max)(lengths, default=0)
        for count in horizons:
            yield min(count, limit)

    def _enqueue(self) -> None:
        burst = round(BURST_SECONDS / self._step_seconds)
        count = min(max(1, burst), MAX_BURST, self._left)
        self._flights.append(_Flight(self._loop.loop_enqueue(count), count))
        self._left -= count

    def _may_go_on(self) -> bool:
        """Whether the rows that are left may run on: nobody waits who has a place now, or whose place somebody left."""
        if self._scheduler.waiting and (
            len(self._rows) < len(self._requests) or not self._scheduler.only_decodes()
        ):
            return False
        return bool(self._rows)

    def _measure(self, count: int) -> None:
        now = self._clock()
        self._step_seconds = float(np.clip((now - self._last_collected) / count, 1e-5, 1.0))
        self._last_collected = now
        if self._rows:
            self._scheduler.drafting.costs.measured(len(self._rows), None, self._step_seconds)
