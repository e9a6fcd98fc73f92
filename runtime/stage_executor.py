"""One rank of a pipeline: takes what the stage before has computed, gives on what its own layers make of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..core.dtypes import to_torch
from ..core.engine import Engine
from ..core.passes.stage import STAGE_INPUT
from .cpu_executor import CpuExecutor
from .distributed import RankGroup
from .micro_steps import split
from .step_input import StepInput

MICRO_STEP_TOKENS = 128
"""A step of fewer tokens is not worth splitting: each part reads all weights again."""
MICRO_STEPS_PER_STAGE = 4


class StageExecutor:
    """Runs steps on the layers of one rank. Every rank of the job runs every step.

    Member i of a stage gives to member i of the next: each has all of a tensor between layers. The last stage's first
    member gives the logits to rank 0, which samples. Steps of many tokens are split, so that a stage computes one part
    while the next computes the one before; all ranks split alike.
    """

    def __init__(self, engine: Engine, local: CpuExecutor, group: RankGroup) -> None:
        build = engine.build
        self._local, self._group = local, group
        self.num_pages = local.num_pages
        self._tp_size, self._vocab_size = build.tp_size, engine.model.vocab_size
        self._stage = group.rank // build.tp_size
        self._last = build.pp_size - 1
        self._speaker = self._last * build.tp_size
        self._most_parts = MICRO_STEPS_PER_STAGE * build.pp_size
        self._received = engine.ranks[group.rank].graph.specs.get(STAGE_INPUT)

    def execute(self, step: StepInput) -> torch.Tensor:
        """The logits of a step on rank 0, as `Executor.execute` gives them; nothing of use elsewhere."""
        parts = split(step, max(1, min(self._most_parts, step.num_tokens // MICRO_STEP_TOKENS)))
        for part in parts:
            self._run(part)
        logits = torch.empty(len(step.logits_index), self._vocab_size)
        if self._group.rank == 0:
            end = 0
            for part in parts:
                start, end = end, end + len(part.logits_index)
                if end > start:
                    self._group.receive(logits[start:end], self._speaker)
        self._group.finish_sends()
        return logits

    def copy_pages(self, source: Sequence[int], target: Sequence[int]) -> None:
        """See `PageCopier.copy_pages`; of its own layers."""
        self._local.copy_pages(source, target)

    def close(self) -> None:
        self._local.close()

    def _run(self, step: StepInput) -> None:
        received = {}
        if self._received is not None:
            features = [d for d in self._received.shape[1:] if isinstance(d, int)]
            x = torch.empty(step.num_tokens, *features, dtype=to_torch(self._received.dtype))
            self._group.receive(x, self._group.rank - self._tp_size)
            received = {STAGE_INPUT: x}
        result = self._local.execute(step, **received)
        if self._stage < self._last:
            self._group.start_send(result, self._group.rank + self._tp_size)
        elif self._group.rank == self._speaker and len(result):
            self._group.start_send(result, 0)
