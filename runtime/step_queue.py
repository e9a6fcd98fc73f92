"""Steps that the device begins before the host knows the tokens of the one before.

While prompts come in, the host has work between steps: to enter tokens, to admit, to plan. Here it does that work for one step
while the device computes another: a step is planned with stand-ins for the tokens that are being chosen, which the device
replaces. A sequence that ends is noticed a step late; what was computed for it meanwhile is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .batch import Batch
from .executor import StepStarter, token_list
from .request import Request
from .scheduler import Scheduler
from .step_input import Int32Array, StepInput


@dataclass(frozen=True)
class Flight:
    """A step that was started."""

    batch: Batch
    ticket: Any


class StepQueue:
    """Starts steps of plain greedy requests and enters what they chose, in order; at most two are under way."""

    def __init__(self, executor: StepStarter, scheduler: Scheduler) -> None:
        self._executor, self._scheduler = executor, scheduler
        self._flights: list[Flight] = []

    @property
    def is_empty(self) -> bool:
        return not self._flights

    @staticmethod
    def takes(batch: Batch) -> bool:
        """Whether the device alone can find the tokens of `batch`, and nobody guesses what they will be."""
        return bool(batch.scheduled) and all(
            part.wants_token_alone and part.request.lookup is None for part in batch.scheduled
        )

    def start(self, batch: Batch) -> None:
        """Starts a step that `takes` accepts."""
        step = StepInput.from_batch(batch)
        source = self.source(batch, step)
        self._flights.append(Flight(batch, self._executor.start_step(step, source)))
        self._scheduler.expect(batch)

    def source(self, batch: Batch, step: StepInput) -> Int32Array | None:
        """Of each token of `step`, which is made of `batch` and goes behind the step started last: the row of that step that
        chooses it, -1 where it is known. None: all are known."""
        unknown = np.flatnonzero(step.token_ids < 0)
        if not len(unknown):
            return None
        rows = self._rows_to_come()
        source = np.full(len(step.token_ids), -1, np.int32)
        source[unknown] = [rows[part.request] for part in batch.scheduled if part.request.num_pending]
        return source

    def finish(self) -> list[tuple[Request, int]]:
        """Waits for the oldest step and enters its tokens into the scheduler; returns who got which.

        When it raises, neither that step nor a later one has been: all of them can be planned again.
        """
        flight = self._flights[0]
        try:
            chosen = token_list(self._executor.finish_step(flight.ticket))
        except BaseException:
            for one in reversed(self._flights):
                self._scheduler.forget(one.batch)
            self._flights.clear()
            raise
        del self._flights[0]
        return self._scheduler.settle(flight.batch, chosen)

    def _rows_to_come(self) -> dict[Request, int]:
        """Where the step before has the token of each request."""
        if self.is_empty:
            return {}
        return {request: row for row, request in enumerate(self._flights[-1].batch.sampling)}
