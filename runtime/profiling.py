"""Where the time of engine steps goes, kernel by kernel: the numbers behind `trtc profile`."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from ..core.errors import RequestError
from .benchmark import FIRST_TOKEN_ID
from .llm import LLM
from .sampling_params import SamplingParams

Phase = Literal["prefill", "decode"]
_WARM_UP = 2
"""Times that everything runs before it is watched: kernels are chosen and graphs captured the first time."""


@dataclass(frozen=True)
class KernelTime:
    """One kernel of a GPU, or one operator of torch on the CPU. Times are in microseconds.

    calls, time_us: a step's share, mean over the steps that were watched
    """

    name: str
    calls: float
    time_us: float


@dataclass(frozen=True)
class StepProfile:
    """What one phase did.

    device:  "cuda": kernels, as the GPU ran them; "cpu": operators, each without those that it calls
    steps:   that were watched
    wall_us: time of one of them, watched or not: measured in a run of its own, since watching costs time
    kernels: the longest first
    """

    phase: Phase
    device: Literal["cpu", "cuda"]
    batch: int
    steps: int
    wall_us: float
    kernels: tuple[KernelTime, ...]

    @property
    def kernels_us(self) -> float:
        """Sum over all kernels. It can exceed `wall_us`: kernels overlap, and watching slows operators down."""
        return sum(kernel.time_us for kernel in self.kernels)


def profile_engine(llm: LLM, *, batch: int, input_len: int, steps: int) -> Iterator[StepProfile]:
    """Watches the prefill of `batch` random prompts of `input_len` tokens, then `steps` decode steps of them, greedy.

    Raises RequestError when the engine is too small for that.
    """
    executor = llm.core.executor
    for name, value, limit_name, limit in (
        ("batch", batch, "max_batch_size", executor.max_batch_size),
        ("input_len", input_len, "max_input_len", executor.max_input_len),
    ):
        if not 1 <= value <= limit:
            raise RequestError(f"{name} is {value}; accepted: 1 to the engine's {limit_name}, {limit}")
    if steps < 1:
        raise RequestError(f"steps is {steps}; accepted: at least 1")
    run = _Run(llm, batch, input_len, steps)
    for _ in range(_WARM_UP):
        run.prefill()
        run.decode()
    yield _watch(run, "prefill")
    yield _watch(run, "decode")


class _Run:
    """Requests of the same lengths again and again, phase by phase.

    Each time with other tokens: of prompts that it knows, the prefix cache leaves a step a page at most.
    """

    def __init__(self, llm: LLM, batch: int, input_len: int, steps: int) -> None:
        self.core, self.batch, self.steps = llm.core, batch, steps
        self._input_len = input_len
        self._rng = np.random.default_rng(0)
        self._params = SamplingParams(max_tokens=steps + 1, temperature=0.0, ignore_eos=True)
        self.core.check_request(self._prompts()[0], self._params)

    def _prompts(self) -> list[list[int]]:
        vocab_size = self.core.executor.vocab_size
        first = min(FIRST_TOKEN_ID, vocab_size - 1)
        prompts: list[list[int]] = self._rng.integers(
            first, vocab_size, (self.batch, self._input_len)
        ).tolist()
        return prompts

    def prefill(self) -> int:
        """Brings every request to its first token; returns the number of engine steps."""
        for index, prompt in enumerate(self._prompts()):
            self.core.add_request(f"profile-{index}", prompt, self._params)
        started: set[str] = set()
        before = self.core.num_steps
        while len(started) < self.batch:
            started |= {output.request_id for output in self.core.step()}
        return self.core.num_steps - before

    def decode(self) -> int:
        """Ends what `prefill` began; returns the number of decode steps."""
        while self.core.has_unfinished:
            self.core.step()
        _synchronize()
        return self.steps


def _watch(run: _Run, phase: Phase) -> StepProfile:
    wall, _, _ = _phase(run, phase, None)
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    else:  # quiet, where nothing of a GPU can go wrong: the only level without "USDT: ... profiler_start" has no errors either
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    watcher = profile(activities=activities)
    _, steps, device = _phase(run, phase, watcher)
    kernels = sorted(_kernel_times(watcher, device, steps), key=lambda kernel: -kernel.time_us)
    return StepProfile(phase, device, run.batch, steps, wall / steps, tuple(kernels))


def _phase(run: _Run, phase: Phase, watcher: Any) -> tuple[float, int, Literal["cpu", "cuda"]]:
    """Runs both phases, watching one. Returns its microseconds, its steps, and where its kernels ran."""
    if phase == "prefill":
        elapsed, steps = _timed(run.prefill, watcher)
        run.decode()
    else:
        run.prefill()
        elapsed, steps = _timed(run.decode, watcher)
    on_gpu = watcher is not None and any(_on_gpu(event) for event in watcher.key_averages())
    return elapsed, steps, "cuda" if on_gpu else "cpu"


def _timed(work: Any, watcher: Any) -> tuple[float, int]:
    if watcher is not None:
        watcher.start()
    _synchronize()
    start = time.perf_counter()
    steps = work()
    _synchronize()
    elapsed = (time.perf_counter() - start) * 1e6
    if watcher is not None:
        watcher.stop()
    return elapsed, steps


def _kernel_times(watcher: Any, device: str, steps: int) -> Iterator[KernelTime]:
    for event in watcher.key_averages():
        if device == "cuda" and _on_gpu(event):
            yield KernelTime(event.key, event.count / steps, event.self_device_time_total / steps)
        elif device == "cpu" and not _on_gpu(event) and event.self_cpu_time_total > 0:
            yield KernelTime(event.key, event.count / steps, event.self_cpu_time_total / steps)


def _on_gpu(event: Any) -> bool:
    return bool(event.device_type.name == "CUDA")


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
