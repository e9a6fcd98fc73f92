"""One rank of a pipeline on GPUs: takes what the stage before has computed, gives on what its own layers make of it.

What stages exchange goes from GPU to GPU as work on streams, through one NCCL communicator over all ranks, whose exchanges a
rank runs in the order in which it asks for them. That is why logits and tokens go round at the end of a step, when all that
is computed for it is under way: a last stage that gave away the logits of one part before it took the next would wait for a
first stage that waits for it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..core.dtypes import to_torch
from ..core.engine import Engine
from ..core.passes.stage import STAGE_INPUT
from ..kernels.sampling import LoopState, Sampling
from .cache_size import ENOUGH, CacheBudget
from .cuda_executor import CudaExecutor, greedy_tokens
from .distributed import RankGroup
from .graph_loop import GraphLoop, TakenOver, Ticket
from .micro_steps import split
from .step_input import Int32Array, StepInput

MICRO_STEP_TOKENS = 1024
"""A step of fewer tokens is not worth splitting: products of so many rows keep a GPU busy."""
MICRO_STEPS_PER_STAGE = 4


class Stage:
    """The place of a rank in the pipeline, and its way to the others. Every rank of the job makes the same calls in the same
    order. Member i of a stage gives to member i of the next: each has all of a tensor between layers."""

    def __init__(self, engine: Engine, group: RankGroup, device: torch.device) -> None:
        build = engine.build
        self._width, self._group, self._device = build.tp_size, group, device
        stage = group.rank // build.tp_size
        self.first, self.last = stage == 0, stage == build.pp_size - 1
        self._speaker = (build.pp_size - 1) * build.tp_size
        """Of the last stage: what all its members know, this one says."""
        spec = engine.ranks[group.rank].graph.specs.get(STAGE_INPUT)
        self._features = [] if spec is None else [size for size in spec.shape[1:] if isinstance(size, int)]
        self._dtype = torch.float32 if spec is None else to_torch(spec.dtype)
        self._vocab_size = engine.model.vocab_size

    def empty(self, rows: int) -> dict[str, torch.Tensor]:
        """What the graph takes from the stage before, not yet filled, by name; nothing in the first stage."""
        if self.first:
            return {}
        return {STAGE_INPUT: torch.empty(rows, *self._features, dtype=self._dtype, device=self._device)}

    def take(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Fills what `empty` made."""
        for tensor in tensors.values():
            self._group.receive(tensor, self._group.rank - self._width)
        return tensors

    def give(self, x: torch.Tensor) -> None:
        """To the next stage; `x` must not change before `finish`. The last stage gives nothing."""
        if not self.last:
            self._group.start_send(x, self._group.rank + self._width)

    def finish(self) -> None:
        """What comes next on the current stream waits until all that was given has arrived."""
        self._group.finish_sends()

    def collect(self, parts: list[torch.Tensor], rows: int) -> torch.Tensor:
        """[rows, vocab] float32: on rank 0 the logits that the last stage has in `parts`; nothing of use elsewhere."""
        logits = torch.cat([part.float() for part in parts]) if self.last else None
        if rows and self._group.rank == self._speaker and logits is not None:
            self._group.start_send(logits, 0)
        if logits is None:
            logits = torch.empty(rows, self._vocab_size, device=self._device)
            if rows and self._group.rank == 0:
                self._group.receive(logits, self._speaker)
        self.finish()
        return logits

    def spread(self, tokens: torch.Tensor) -> torch.Tensor:
        """Fills `tokens` on all ranks with what it holds in the last stage."""
        self.finish()
        if tokens.numel():
            self._group.spread(tokens, self._speaker)
        return tokens


class StageLoop(GraphLoop):
    """Decode steps of one stage: a graph for its layers; between graphs, what stages exchange. The last stage chooses the
    tokens, of which every rank hears before its next step, without any host."""

    def __init__(self, stage: Stage, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._stage = stage
        self._received = stage.empty(self.max_rows(verify=True))

    def run_once(self) -> torch.Tensor:
        """What this stage makes of one step: logits in the last one. Valid until the next step; the state is not advanced."""
        result = self._replay()[: self._rows]
        self._stage.finish()
        return result

    def enqueue(self, count: int) -> Ticket:
        """See `GraphLoop.enqueue`."""
        assert count <= self.HISTORY // 2
        bucket = self._bucket(self._rows)
        for _ in range(count):
            self._replay()
            self._stage.spread(self._next_token[:bucket])
            self._sampling.advance(self._state(bucket), dependent=False)
        return self._ticket(count)

    def _replay(self) -> torch.Tensor:
        graph, result = self._graph()  # captured before anything is under way
        self._stage.take(self._take(self._bucket(self._rows)))
        graph.replay()
        self._stage.give(result)
        return result

    def _inputs(self, bucket: int) -> dict[str, torch.Tensor]:
        return super()._inputs(bucket) | self._take(bucket)

    def _take(self, bucket: int) -> dict[str, torch.Tensor]:
        return {name: tensor[:bucket] for name, tensor in self._received.items()}

    def _choose(self, logits: torch.Tensor, state: LoopState) -> None:
        """The last stage chooses; nobody advances before all know."""
        if self._stage.last:
            self._sampling.greedy(logits, LoopState(next_token=state.next_token))


class CudaStageExecutor(CudaExecutor):
    """A `CudaExecutor` that runs the layers of one stage. Every rank of the job runs every step; rank 0 gets the logits.

    Steps of many tokens are split, so that a stage computes one part while the next computes the one before; all ranks split
    alike.
    """

    def __init__(
        self,
        engine: Engine,
        budget: CacheBudget = ENOUGH,
        *,
        device: int,
        group: RankGroup,
    ) -> None:
        self._stage = Stage(engine, group, torch.device("cuda", device))
        self._gives_logits = self._stage.last
        self._most_parts = MICRO_STEPS_PER_STAGE * engine.build.pp_size
        super().__init__(engine, budget, device=device, group=group)

    def _make_loop(self, sampling: Sampling, max_batch_size: int, pages: int) -> GraphLoop:
        return StageLoop(self._stage, self._program, sampling, self._pool, max_batch_size, pages)

    def execute(self, step: StepInput) -> torch.Tensor:
        """The logits of a step on rank 0, as `Executor.execute` gives them; nothing of use elsewhere."""
        with self._watched():
            logits = self._stage.collect(self._run_parts(step), len(step.logits_index))
            self._wait()
        return logits

    def _start(self, step: StepInput, source: Int32Array | None) -> torch.Tensor:
        """The tokens that the last stage chooses, on every rank; see `CudaExecutor._start`."""
        parts = self._run_parts(step, source)
        if self._stage.last:
            return self._stage.spread(greedy_tokens(torch.cat(parts)))
        return self._stage.spread(torch.empty(len(step.logits_index), dtype=torch.int32, device=self._device))

    def _run_parts(self, step: StepInput, source: Int32Array | None = None) -> list[torch.Tensor]:
        """What this stage makes of each part of a step. source: see `StepStarter.start_step`."""
        parts = split(step, max(1, min(self._most_parts, step.num_tokens // MICRO_STEP_TOKENS)))
        if source is None:
            return [self._run_part(part, None) for part in parts]
        ends = np.cumsum([part.num_tokens for part in parts])[:-1]
        before = [self._take_over(sources) for sources in np.split(source, ends)]
        return [self._run_part(*each) for each in zip(parts, before, strict=True)]

    def _run_part(self, part: StepInput, before: TakenOver | None) -> torch.Tensor:
        if self._load_step(part):
            if before is not None:
                self._loop.set_tokens(before)
            return self._loop.run_once().clone()
        result = self._prefill(part, before, self._stage.take(self._stage.empty(part.num_tokens)))
        self._stage.give(result)
        return result

    def _wait(self) -> None:
        torch.cuda.current_stream().synchronize()  # here, where somebody watches that all ranks come
