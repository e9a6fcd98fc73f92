"""Small steps with prompts of target `cuda` as CUDA graphs: to launch their kernels one by one takes the host longer than the
GPU needs for them.

A graph is for a bucket of tokens and of sequences that decode beside the prompts; lengths and page tables are read on the
device. It is captured when nobody asks for anything, or when a step of its bucket comes for the second time. A step without a
graph is launched kernel by kernel, and so is one for which the GPU needs longer than the host: there padding would cost time.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from ..core.graph import Graph
from ..core.targets.base import CacheShape
from ..core.targets.cuda.program import CudaProgram
from .graph_loop import TakenOver
from .graph_pool import GraphPool
from .prompt_rows import Bucket, PromptRows, flat_starts, launch_prompts, send

_log = logging.getLogger(__name__)

ROWS = (64, 128, 256, 384, 512, 640, 768, 896, 1024)
"""Tokens of a bucket: from 128 on whole tiles of the products, which a step of fewer computes as well."""
DECODES = (0, 8, 32, 128)
"""Sequences that decode beside prompts."""

INSTRUCTION_S, FLOPS_PER_S, BYTES_PER_S = 19e-6, 600e12, 4e12
"""What an instruction of `CudaProgram.prefill` takes the host, as seen beside an H200, and what that gets done in a second in
products of some hundred rows and in attention of sequences that decode."""
GPU_SHARE = 0.85
"""Of the host's time, that the GPU is expected to need at most where a step is replayed. Beyond it padding may cost more than
a graph saves: with 6.7e9 weights 513 tokens took 14.1 ms in a bucket of 640, launched 12.2 (bench/notes/prompt_graphs.md)."""


@dataclass(frozen=True)
class StepTimes:
    """What is expected of steps with prompts, in seconds.

    host: to launch one. row: what a token keeps the GPU in the products; cached_token: what one of a sequence that decodes does
    in attention.
    """

    host: float
    row: float
    cached_token: float

    @classmethod
    def of(cls, graph: Graph, cache: CacheShape, instructions: int) -> StepTimes:
        """graph: of the engine, whose `prefill` has so many instructions."""
        token = graph.cost({"T": 1, "B": 1, "B+1": 2, "R": 0, "P": 0, "C": 0})
        cached = cache.bytes_per_page / cache.page_size
        return cls(instructions * INSTRUCTION_S, token.flops / FLOPS_PER_S, cached / BYTES_PER_S)

    def wait_for_host(self, rows: int, cached_tokens: int) -> bool:
        """Whether the host is the limit of a step of so many rows, beside sequences that decode with so many tokens in all."""
        return rows * self.row + cached_tokens * self.cached_token <= GPU_SHARE * self.host


def prompt_buckets(max_num_tokens: int, max_batch_size: int) -> tuple[Bucket, ...]:
    """The buckets that steps of an engine with these limits may need; those with less to compute first."""
    return tuple(
        Bucket(rows, decodes)
        for rows in _up_to(ROWS, max_num_tokens)
        for decodes in _up_to(DECODES, max_batch_size - 1)
        if decodes < rows
    )


def _up_to(sizes: tuple[int, ...], most: int) -> tuple[int, ...]:
    """The sizes up to the first that holds `most`."""
    return tuple(size for size, before in zip(sizes, (-1, *sizes), strict=False) if before < most)


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    room: torch.Tensor
    """Where the graph reads its `PromptRows`."""


class PromptGraphs:
    """The graphs of one engine, on one GPU.

    program: one that `captures_prefill`; pool: closed by its owner; buckets: of which those are used in which the host can be
    the limit, by `times`; pages: of the longest sequence.
    """

    def __init__(
        self,
        program: CudaProgram,
        pool: GraphPool,
        buckets: tuple[Bucket, ...],
        times: StepTimes,
        pages: int,
    ) -> None:
        self._program, self._pool, self._device = program, pool, pool.device
        self._buckets = tuple(bucket for bucket in buckets if times.wait_for_host(bucket.rows, 0))
        self._times, self._pages = times, pages
        self._met: set[Bucket] = set()
        self._graphs: dict[Bucket, _Captured] = {}
        self._logits: torch.Tensor | None = None
        """[most of a bucket, vocab] float32, of whichever graph ran last."""

    def prepare(self) -> bool:
        """Captures one more graph. False: all have been."""
        bucket = next((bucket for bucket in self._buckets if bucket not in self._graphs), None)
        if bucket is None:
            return False
        self._graphs[bucket] = self._capture(bucket)
        return True

    def run(self, rows: PromptRows, before: TakenOver | None = None) -> torch.Tensor | None:
        """The logits of a step, [R, vocab] float32, valid until the next one. None: it has to be launched. before: tokens of
        sequences that decode."""
        bucket = next((bucket for bucket in self._buckets if bucket.holds(rows)), None)
        if bucket is None or not self._times.wait_for_host(bucket.rows, int(rows.decode_length.sum())):
            return None
        if not self._is_ready(bucket):
            return None
        captured = self._graphs[bucket]
        token_ids, *_ = send(rows.padded(bucket, self._pages), self._device, captured.room)
        if before is not None:
            token_ids[before[0]] = before[1]
        captured.graph.replay()
        assert self._logits is not None
        return self._logits[: len(rows.logits_index)]

    def _is_ready(self, bucket: Bucket) -> bool:
        if bucket in self._graphs:
            return True
        if bucket not in self._met:
            self._met.add(bucket)  # it may not come again, and capturing takes longer than launching
            return False
        try:
            self._graphs[bucket] = self._capture(bucket)
        except torch.OutOfMemoryError:
            _log.warning("too little GPU memory is left to capture CUDA graphs of steps with prompts")
            self._buckets = tuple(bucket for bucket in self._buckets if bucket in self._graphs)
            return False
        return True

    def _capture(self, bucket: Bucket) -> _Captured:
        nothing = PromptRows.none().padded(bucket, self._pages)
        room = torch.empty(flat_starts(nothing)[-1], dtype=torch.int32, device=self._device)
        sent = send(nothing, self._device, room)
        logits = launch_prompts(self._program, sent)  # what `GraphPool.capture` wants to have run
        if self._logits is None:
            most = max(bucket.logits for bucket in self._buckets)
            self._logits = torch.empty(most, logits.shape[1], dtype=logits.dtype, device=self._device)
        result = self._logits[: bucket.logits]
        graph, _ = self._pool.capture(lambda: result.copy_(launch_prompts(self._program, sent)))
        return _Captured(graph, room)
