"""Runs engines of target `cpu`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch

from ..core.engine import Engine
from ..core.errors import EngineError
from ..core.graph import GRAPH_INPUTS
from ..core.ops.registry import Communicator
from ..core.plugin_registry import plugins
from ..core.targets.base import CacheShape
from ..core.targets.cpu import CpuProgram, allocate_cache
from ..core.targets.cpu_step import DecodeLimits, Unsupported
from .cache_size import cache_pages
from .cpu_threads import limit_threads
from .engine_limits import EngineLimits
from .step_input import Int32Array, StepInput


class CpuExecutor(EngineLimits):
    """An `Executor` over torch on the CPU, of one rank. An engine of several ranks needs a communicator."""

    def __init__(
        self,
        engine: Engine,
        *,
        num_pages: int | None = None,
        kv_cache_memory_bytes: int | None = None,
        rank: int = 0,
        communicator: Communicator | None = None,
    ) -> None:
        assert len(engine.ranks) == 1 or communicator is not None, "ranks that cannot talk to each other"
        limit_threads()
        part = engine.ranks[rank]
        shapes = [CacheShape.of(one.graph, engine.build.page_size) for one in engine.ranks]
        largest = max(shapes, key=lambda shape: shape.bytes_per_page)  # every rank has equally many pages
        super().__init__(engine, cache_pages(engine, largest, num_pages, kv_cache_memory_bytes))
        self._cache = allocate_cache(shapes[rank], self.num_pages)
        self._program: CpuProgram | None = CpuProgram(
            part.graph,
            engine.map_weights(rank),
            self._cache,
            kernels=plugins().kernels("cpu"),
            communicator=communicator,
            # Ranks exchange tensors in the middle of a step, or between steps that others then overwrite.
            decode_limits=DecodeLimits(engine.build.max_batch_size, engine.build.max_seq_len)
            if communicator is None
            else None,
        )

    def execute(self, step: StepInput, **received: torch.Tensor) -> torch.Tensor:
        """See `Executor.execute`. received: what the graph of a stage needs beyond a step; its result may be no logits."""
        assert self._program is not None, "the executor is closed"
        inputs = {name: torch.from_numpy(getattr(step, name)) for name in GRAPH_INPUTS}
        return self._program.run(inputs | received)

    def copy_pages(self, source: Sequence[int], target: Sequence[int]) -> None:
        """See `PageCopier.copy_pages`."""
        for pages in chain.from_iterable(self._cache):
            pages[list(target)] = pages[list(source)]

    def close(self) -> None:
        self._program = None
        self._cache = []


class CpuLoopExecutor(CpuExecutor):
    """A `CpuExecutor` that is a `DecodeLoop` too: of greedy steps it gives tokens, for which it need not compute all logits.

    Nothing runs ahead: a burst of steps runs when it is collected. Raises Unsupported for graphs and machines without
    compiled decode steps.
    """

    def __init__(
        self, engine: Engine, *, num_pages: int | None = None, kv_cache_memory_bytes: int | None = None
    ) -> None:
        super().__init__(engine, num_pages=num_pages, kv_cache_memory_bytes=kv_cache_memory_bytes)
        assert self._program is not None
        if not self._program.decodes_greedily:
            raise Unsupported("no compiled decode steps")
        self._loop: dict[str, torch.Tensor] = {}

    def loop_load(self, token_ids: Int32Array, kv_length: Int32Array, page_table: Int32Array) -> None:
        self._loop = {
            "token_ids": torch.from_numpy(token_ids.copy()),
            "positions": torch.from_numpy(kv_length - 1),
            "kv_length": torch.from_numpy(kv_length.copy()),
            "page_table": torch.from_numpy(np.ascontiguousarray(page_table)),
            "logits_index": torch.arange(len(token_ids), dtype=torch.int32),
        }

    def loop_enqueue(self, count: int) -> int:
        return count

    def loop_collect(self, ticket: int) -> Int32Array:
        """Raises EngineError when logits are not finite."""
        assert self._program is not None, "the executor is closed"
        tokens = np.empty((ticket, len(self._loop["token_ids"])), np.int32)
        for row in tokens:
            found = self._program.next_tokens(self._loop)
            row[:] = found.numpy()
            if row.min() < 0:
                raise EngineError("the engine's logits are not finite: its weights or dtype overflow")
            self._loop["token_ids"].copy_(found)
            self._loop["positions"] += 1
            self._loop["kv_length"] += 1
        return tokens


def cpu_executor(
    engine: Engine, num_pages: int | None = None, kv_cache_memory_bytes: int | None = None
) -> CpuExecutor:
    """The executor of an engine of one rank: with a decode loop where graph and machine have compiled decode steps."""
    try:
        return CpuLoopExecutor(engine, num_pages=num_pages, kv_cache_memory_bytes=kv_cache_memory_bytes)
    except Unsupported:
        return CpuExecutor(engine, num_pages=num_pages, kv_cache_memory_bytes=kv_cache_memory_bytes)
