"""Runs engines of target `cpu`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch

from ..core.engine import Engine
from ..core.graph import GRAPH_INPUTS
from ..core.ops.attention import indexable
from ..core.ops.registry import Communicator
from ..core.plugin_registry import plugins
from ..core.targets.base import CacheShape
from ..core.targets.cpu import CpuProgram, allocate_cache
from ..core.targets.cpu_step import DecodeLimits
from .cache_size import ENOUGH, CacheBudget
from .cpu_memory import keep_freed_memory
from .cpu_threads import limit_threads
from .engine_limits import EngineLimits
from .step_input import StepInput

COMPILED_TOKENS = 64
"""A step of so many tokens may be compiled code, whatever the batch size: guessed tokens are verified in it."""


class CpuExecutor(EngineLimits):
    """An `Executor` over torch on the CPU, of one rank. An engine of several ranks needs a communicator."""

    def __init__(
        self,
        engine: Engine,
        budget: CacheBudget = ENOUGH,
        *,
        rank: int = 0,
        communicator: Communicator | None = None,
    ) -> None:
        assert len(engine.ranks) == 1 or communicator is not None, "ranks that cannot talk to each other"
        limit_threads()
        keep_freed_memory()
        part = engine.ranks[rank]
        shapes = [CacheShape.of(one.graph, engine.build.page_size) for one in engine.ranks]
        largest = max(shapes, key=lambda shape: shape.bytes_per_page)  # every rank has equally many pages
        super().__init__(engine, budget.pages(engine, largest))
        self._cache = allocate_cache(shapes[rank], self.num_pages)
        # No step has more sequences than pages, however many the engine was built for.
        self._compiled_tokens = max(min(engine.build.max_batch_size, self.num_pages), COMPILED_TOKENS)
        self._program: CpuProgram | None = CpuProgram(
            part.graph,
            engine.map_weights(rank),
            self._cache,
            kernels=plugins().kernels("cpu"),
            communicator=communicator,
            decode_limits=DecodeLimits(self._compiled_tokens, engine.build.max_seq_len),
        )

    def execute(self, step: StepInput, **received: torch.Tensor) -> torch.Tensor:
        """See `Executor.execute`. received: what the graph of a stage needs beyond a step; its result may be no logits."""
        assert self._program is not None, "the executor is closed"
        return self._program.run(step_tensors(step) | received)

    def copy_pages(self, source: Sequence[int], target: Sequence[int]) -> None:
        """See `PageCopier.copy_pages`."""
        for pages in chain.from_iterable(self._cache):
            held = indexable(pages)
            held[list(target)] = held[list(source)]

    def close(self) -> None:
        self._program = None
        self._cache = []


def step_tensors(step: StepInput) -> dict[str, torch.Tensor]:
    """The graph's inputs, over the same memory."""
    return {name: torch.from_numpy(getattr(step, name)) for name in GRAPH_INPUTS}
