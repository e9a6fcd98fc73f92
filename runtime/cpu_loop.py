"""Greedy steps on the CPU that give tokens instead of logits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..core.engine import Engine
from ..core.targets.cpu_step import Unsupported
from .cache_size import ENOUGH, CacheBudget
from .cpu_executor import CpuExecutor, step_tensors
from .executor import token_list
from .step_input import Int32Array, StepInput


class CpuLoopExecutor(CpuExecutor):
    """A `CpuExecutor` that is a `DecodeLoop` and a `GreedyChooser` too: of greedy steps it gives tokens, for which it need not
    compute all logits.

    Nothing runs ahead: a burst of steps runs when it is collected. Raises Unsupported for graphs and machines without
    compiled decode steps.
    """

    def __init__(self, engine: Engine, budget: CacheBudget = ENOUGH) -> None:
        super().__init__(engine, budget)
        assert self._program is not None
        if not self._program.decodes_greedily:
            raise Unsupported("no compiled decode steps")
        self._loop: dict[str, torch.Tensor] = {}
        self._loop_rows = np.arange(0)
        """Of `_loop`: their numbers among those that were loaded, `_num_loaded`."""
        self._num_loaded = 0

    @property
    def max_draft_tokens(self) -> int | None:
        """See `GreedyChooser.max_draft_tokens`: more are not run by compiled code."""
        return self._compiled_tokens

    def choose(self, step: StepInput) -> Int32Array:
        """See `GreedyChooser.choose`."""
        assert self._program is not None, "the executor is closed"
        chosen: Int32Array = self._program.next_tokens(step_tensors(step)).numpy()
        return chosen

    def loop_load(self, token_ids: Int32Array, kv_length: Int32Array, page_table: Int32Array) -> None:
        self._loop_rows, self._num_loaded = np.arange(len(token_ids)), len(token_ids)
        self._loop = {
            "token_ids": torch.from_numpy(token_ids.copy()),
            "positions": torch.from_numpy(kv_length - 1),
            "kv_length": torch.from_numpy(kv_length.copy()),
            "page_table": torch.from_numpy(np.ascontiguousarray(page_table)),
            "logits_index": torch.arange(len(token_ids), dtype=torch.int32),
        }

    def loop_enqueue(self, count: int) -> int:
        return count

    def loop_rest(self, rows: Sequence[int]) -> None:
        kept = np.flatnonzero(~np.isin(self._loop_rows, rows))
        self._loop_rows = self._loop_rows[kept]
        self._loop = {name: tensor[torch.from_numpy(kept)] for name, tensor in self._loop.items()}
        self._loop["logits_index"] = torch.arange(len(kept), dtype=torch.int32)

    def loop_collect(self, ticket: int) -> Int32Array:
        """Raises EngineError when logits are not finite."""
        assert self._program is not None, "the executor is closed"
        tokens = np.zeros((ticket, self._num_loaded), np.int32)
        for row in tokens if len(self._loop_rows) else ():
            found = self._program.next_tokens(self._loop)
            row[self._loop_rows] = token_list(found.numpy())
            self._loop["token_ids"].copy_(found)
            self._loop["positions"] += 1
            self._loop["kv_length"] += 1
        return tokens


def cpu_executor(engine: Engine, budget: CacheBudget = ENOUGH) -> CpuExecutor:
    """The executor of an engine of one rank: with a decode loop where graph and machine have compiled decode steps."""
    try:
        return CpuLoopExecutor(engine, budget)
    except Unsupported:
        return CpuExecutor(engine, budget)
