"""`trtc` with executors that take the time of OPT-6.7B on an H100 and compute nothing: what the host costs beside a GPU.

    python -m trtc.bench.paced serve --engine-dir engine
    python -m trtc.bench.server_load --paced --requests 512 --rates 8 24 inf

Times are those that bench/results/gpu-vs-vllm.json has of that model. Like the GPU's host, the executor launches prefill kernel
by kernel, giving up the interpreter's lock at each, and waits without holding it. Tokens are made up.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection

import numpy as np
import torch

from ..cli.main import main
from ..core.engine import Engine
from ..runtime import load, worker, worker_main
from ..runtime.cache_size import ENOUGH, CacheBudget
from ..runtime.engine_limits import EngineLimits
from ..runtime.step_input import Int32Array, StepInput

STEP_S = 4.8e-3
"""A decode step reads the weights,"""
KEY_VALUE_S = 0.2e-6
"""and the keys and values of every token in the cache."""
PREFILL_S = 20.7e-6
"""Of a prompt token."""
NUM_PAGES = 3700
"""Of 32 tokens: what 59 GB hold."""
LAUNCHES = 320
LAUNCH_S = 12e-6


class PacedExecutor(EngineLimits):
    """An `Executor`, `GreedyChooser`, `StepStarter` and `DecodeLoop` whose device is a clock."""

    max_draft_tokens = None

    def __init__(self, engine: Engine, budget: CacheBudget = ENOUGH) -> None:
        super().__init__(engine, budget.num_pages or NUM_PAGES)
        self._free_at = 0.0
        self._token_ids, self._kv_length, self._runs, self._chosen = np.zeros((4, 1), np.int32)

    def execute(self, step: StepInput) -> torch.Tensor:
        logits = torch.zeros(len(step.logits_index), self.vocab_size)
        logits[torch.arange(len(logits)), torch.from_numpy(self.choose(step)).long()] = 1
        return logits

    def choose(self, step: StepInput) -> Int32Array:
        return self.finish_step(self.start_step(step, None))

    def start_step(self, step: StepInput, source: Int32Array | None) -> tuple[float, Int32Array]:
        token_ids = step.token_ids
        if source is not None:
            token_ids = np.where(source >= 0, self._chosen[source], token_ids)
        prompts = step.num_tokens > step.num_sequences
        done = self._start(
            STEP_S + PREFILL_S * (step.num_tokens if prompts else 0) + KEY_VALUE_S * int(step.kv_length.sum())
        )
        for _ in range(LAUNCHES if prompts else 1):
            _hold(LAUNCH_S)
            time.sleep(0)
        self._chosen = self._next(token_ids[step.logits_index])
        return done, self._chosen

    def finish_step(self, ticket: tuple[float, Int32Array]) -> Int32Array:
        done, chosen = ticket
        _wait(done)
        return chosen

    def loop_load(self, token_ids: Int32Array, kv_length: Int32Array, page_table: Int32Array) -> None:
        self._token_ids, self._kv_length = token_ids, kv_length.copy()
        self._runs = np.ones(len(token_ids), np.int32)

    def loop_rest(self, rows: Sequence[int]) -> None:
        self._runs[rows] = 0

    def loop_enqueue(self, count: int) -> tuple[float, int]:
        for _ in range(count):
            _hold(LAUNCH_S)
            done = self._start(STEP_S + KEY_VALUE_S * int(self._kv_length @ self._runs))
            self._kv_length += 1
        return done, count

    def loop_collect(self, ticket: tuple[float, int]) -> Int32Array:
        done, count = ticket
        _wait(done)
        rows = []
        for _ in range(count):
            self._token_ids = self._next(self._token_ids)
            rows.append(self._token_ids)
        return np.stack(rows)

    def close(self) -> None:
        """Nothing is held."""

    def _start(self, seconds: float) -> float:
        """When work that is enqueued now is done."""
        self._free_at = max(self._free_at, time.perf_counter()) + seconds
        return self._free_at

    def _next(self, token_ids: Int32Array) -> Int32Array:
        chosen: Int32Array = ((token_ids.astype(np.int64) * 31 + 17) % (self.vocab_size - 4) + 4).astype(
            np.int32
        )
        return chosen


def _hold(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def _wait(until: float) -> None:
    time.sleep(max(0.0, until - time.perf_counter()))


if __name__ == "__main__":
    load._EXECUTORS["cpu"] = PacedExecutor
    worker.MODULE = "trtc.bench.paced"
    if sys.argv[1].isdecimal():  # started by a `Worker`
        worker_main.main(Connection(int(sys.argv[1])))
    else:
        sys.exit(main())
