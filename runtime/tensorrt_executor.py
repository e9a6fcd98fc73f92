"""Runs engines of target `tensorrt`: over padded batches and rows of KV memory where TensorRT's own layers attend, over
packed steps and pages where a plugin does.

What TensorRT itself does is behind `PlanSession`; `tensorrt_session.py` is the one over a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch

from ..core.engine import Engine, RankPart
from ..core.errors import ConfigError
from ..core.targets.base import CacheShape
from .cache_size import ENOUGH, CacheBudget
from .engine_limits import EngineLimits
from .kv_cache import pages_for
from .step_input import StepInput
from .tensorrt_steps import Limits, PackedBatch, PaddedBatch, StepPadder, packed_batches


class PlanSession(Protocol):
    """A plan that is ready to run, with its KV memory: rows or pages, zero at first."""

    def run(self, batch: PaddedBatch | PackedBatch) -> torch.Tensor:
        """Executes the plan on `cache_rows` of the KV memory. Returns logits [R, V] float32; the next call may
        reuse their memory. Raises TargetError with TensorRT's own reason when it fails."""

    def close(self) -> None:
        """Releases the device memory. Calling it twice is harmless."""


class _Executor(EngineLimits):
    """What both have in common: `_batches` says what to execute for a step."""

    def __init__(self, engine: Engine, session: PlanSession, num_pages: int) -> None:
        super().__init__(engine, num_pages)
        self._session: PlanSession | None = session

    def _batches(self, step: StepInput) -> Iterator[PaddedBatch] | Iterator[PackedBatch]:
        raise NotImplementedError

    def execute(self, step: StepInput) -> torch.Tensor:
        """See `Executor.execute`."""
        assert self._session is not None, "the executor is closed"
        parts, order = [], []
        for batch in self._batches(step):
            logits = self._session.run(batch)
            if len(batch.results):
                parts.append(logits[: len(batch.results), : self.vocab_size].clone())
                order += batch.results.tolist()
        if not parts:
            return torch.empty(0, self.vocab_size)
        found = torch.cat(parts)
        if order == sorted(order):
            return found
        result = torch.empty_like(found)
        result[torch.tensor(order, device=found.device)] = found
        return result

    def close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.close()


class TensorRTExecutor(_Executor):
    """An `Executor` over a plan with native attention.

    A page of its cache is one row of the KV memory, which holds a whole sequence: `page_size` is max_seq_len, and there
    is no more than one page for each of max_batch_size sequences.
    """

    def __init__(self, engine: Engine, session: PlanSession, num_slots: int) -> None:
        super().__init__(engine, session, num_slots)
        self.page_size = engine.build.max_seq_len
        self._padder = StepPadder(limits(engine), num_slots)

    def _batches(self, step: StepInput) -> Iterator[PaddedBatch]:
        return self._padder.batches(step)


class PackedTensorRTExecutor(_Executor):
    """An `Executor` over a plan whose attention is a plugin over pages."""

    def _batches(self, step: StepInput) -> Iterator[PackedBatch]:
        return packed_batches(step, self.max_batch_size, pages_for(self.max_seq_len, self.page_size))


def is_packed(engine: Engine) -> bool:
    """Whether the plan works on packed tokens and pages."""
    return "attention" in engine.ranks[0].artifacts.get("plugins", ())


def packed_pages(engine: Engine, budget: CacheBudget = ENOUGH) -> int:
    """Pages of the KV memory, at most those that the plan was built for."""
    build = engine.build
    shape = CacheShape.of(engine.ranks[0].graph, build.page_size)
    most = pages_for(build.max_seq_len, build.page_size) * build.max_batch_size
    return min(budget.pages(engine, shape), most)


def limits(engine: Engine) -> Limits:
    """Read off the profiles that the plan was built with."""
    profiles = {profile["name"]: profile for profile in engine.ranks[0].artifacts["profiles"]}
    return Limits(
        decode_rows=profiles["decode"]["batch"][-1],
        prefill_rows=profiles["prefill"]["batch"][-1],
        prefill_tokens=profiles["prefill"]["length"][-1],
        capacity=engine.build.max_seq_len,
    )


def slot_bytes(part: RankPart, capacity: int) -> int:
    """KV memory of one sequence."""
    return CacheShape.of(part.graph, capacity).bytes_per_page


def cache_slots(engine: Engine, budget: CacheBudget = ENOUGH) -> int:
    """Rows of the KV memory. Raises ConfigError when not even one fits.

    budget: a page holds a sequence here; more than max_batch_size are of no use
    """
    most, size = engine.build.max_batch_size, slot_bytes(engine.ranks[0], engine.build.max_seq_len)
    slots = budget.num_pages
    if slots is None:
        slots = most if budget.memory_bytes is None else budget.memory_bytes // size
    if slots < 1:
        raise ConfigError(
            f"a KV cache of {budget.memory_bytes or 0} bytes cannot hold one sequence of max_seq_len "
            f"{engine.build.max_seq_len}: target tensorrt needs {size} bytes for each"
        )
    return min(slots, most)
