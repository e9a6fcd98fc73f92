"""Runs engines of target `tensorrt`: pads the packed steps, and gives the rows of the KV memory to sequences.

What TensorRT itself does is behind `PlanSession`; `tensorrt_session.py` is the one over a GPU.
"""

from __future__ import annotations

from typing import Protocol

import torch

from ..core.engine import Engine, RankPart
from ..core.errors import ConfigError
from ..core.targets.base import CacheShape
from .engine_limits import EngineLimits
from .step_input import StepInput
from .tensorrt_steps import Limits, PaddedBatch, StepPadder


class PlanSession(Protocol):
    """A plan that is ready to run, with its KV memory of `num_slots` rows, zero at first."""

    def run(self, batch: PaddedBatch) -> torch.Tensor:
        """Executes the plan on rows first_row ... of the KV memory. Returns logits [R, V] float32; the next call may
        reuse their memory. Raises TargetError with TensorRT's own reason when it fails."""

    def close(self) -> None:
        """Releases the device memory. Calling it twice is harmless."""


class TensorRTExecutor(EngineLimits):
    """An `Executor` over a plan with native attention.

    A page of its cache is one row of the KV memory, which holds a whole sequence: `page_size` is max_seq_len, and there
    is no more than one page for each of max_batch_size sequences.
    """

    def __init__(self, engine: Engine, session: PlanSession, num_slots: int) -> None:
        super().__init__(engine, num_slots)
        self.page_size = engine.build.max_seq_len
        self._session: PlanSession | None = session
        self._padder = StepPadder(limits(engine), num_slots)

    def execute(self, step: StepInput) -> torch.Tensor:
        """See `Executor.execute`."""
        assert self._session is not None, "the executor is closed"
        parts, order = [], []
        for batch in self._padder.batches(step):
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


def cache_slots(engine: Engine, num_pages: int | None, kv_cache_memory_bytes: int | None) -> int:
    """Rows of the KV memory. Raises ConfigError when not even one fits.

    num_pages: sequences, as a page holds one here; more than max_batch_size are of no use.
    """
    most, size = engine.build.max_batch_size, slot_bytes(engine.ranks[0], engine.build.max_seq_len)
    if num_pages is None:
        num_pages = most if kv_cache_memory_bytes is None else kv_cache_memory_bytes // size
    if num_pages < 1:
        raise ConfigError(
            f"a KV cache of {kv_cache_memory_bytes or 0} bytes cannot hold one sequence of max_seq_len "
            f"{engine.build.max_seq_len}: target tensorrt needs {size} bytes for each"
        )
    return min(num_pages, most)
