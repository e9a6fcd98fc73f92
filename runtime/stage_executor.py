"""One rank of a pipeline: takes what the stage before has computed, gives on what its own layers make of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..core.dtypes import to_torch
from ..core.engine import Engine
from ..core.passes.stage import STAGE_INPUT
from .cpu_executor import CpuExecutor
from .distributed import RankGroup
from .step_input import StepInput


class StageExecutor:
    """Runs steps on the layers of one rank. Every rank of the job runs every step.

    Member i of a stage gives to member i of the next: each has all of a tensor between layers. The last stage's first
    member gives the logits to rank 0, which samples.
    """

    def __init__(self, engine: Engine, local: CpuExecutor, group: RankGroup) -> None:
        build = engine.build
        self._local, self._group = local, group
        self._tp_size, self._vocab_size = build.tp_size, engine.model.vocab_size
        self._stage = group.rank // build.tp_size
        self._last = build.pp_size - 1
        self._speaker = self._last * build.tp_size
        self._received = engine.ranks[group.rank].graph.specs.get(STAGE_INPUT)

    def execute(self, step: StepInput) -> torch.Tensor:
        """The logits of a step on rank 0, as `Executor.execute` gives them; elsewhere what the stage computed."""
        result = self._local.execute(step, **self._receive(step))
        if self._stage < self._last:
            self._group.send(result, self._group.rank + self._tp_size)
        rows = len(step.logits_index)
        if rows == 0:  # nobody waits for them
            return torch.empty(0, self._vocab_size)
        if self._group.rank == self._speaker:
            self._group.send(result, 0)
        if self._group.rank == 0:
            result = torch.empty(rows, self._vocab_size)
            self._group.receive(result, self._speaker)
        return result

    def copy_pages(self, source: Sequence[int], target: Sequence[int]) -> None:
        """See `PageCopier.copy_pages`; of its own layers."""
        self._local.copy_pages(source, target)

    def close(self) -> None:
        self._local.close()

    def _receive(self, step: StepInput) -> dict[str, torch.Tensor]:
        if self._received is None:
            return {}
        features = [d for d in self._received.shape[1:] if isinstance(d, int)]
        x = torch.empty(step.num_tokens, *features, dtype=to_torch(self._received.dtype))
        self._group.receive(x, self._group.rank - self._tp_size)
        return {STAGE_INPUT: x}
