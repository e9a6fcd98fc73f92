"""Runs engines of target `cuda`: decode steps as CUDA graphs that the device repeats (`graph_loop.py`), small steps with
prompts as CUDA graphs too (`prompt_graphs.py`), others launch by launch."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch

from .. import __version__
from ..core.dtypes import to_torch
from ..core.engine import Engine
from ..core.errors import EngineError, TargetError
from ..core.ops.attention import indexable
from ..core.plugin_registry import plugins
from ..core.targets.base import CacheShape
from ..core.targets.cuda.code import CACHE_LAYOUT, MULTIPROCESSORS, read_code
from ..core.targets.cuda.program import CudaProgram, Pages
from ..core.targets.cuda.target import ACCUMULATIONS
from ..kernels.errors import DeviceError
from ..kernels.launch import architecture
from ..kernels.library import KernelLibrary
from ..kernels.sampling import Sampling
from .cache_size import ENOUGH, CacheBudget
from .distributed import RankGroup
from .engine_limits import EngineLimits
from .gpu_communicator import GpuCommunicator
from .graph_loop import GraphLoop, TakenOver, Ticket
from .graph_pool import GraphPool
from .kv_cache import pages_for
from .prompt_graphs import PromptGraphs, StepTimes, prompt_buckets
from .prompt_rows import PromptRows, launch_prompts, send
from .step_input import Int32Array, StepInput
from .weight_loading import EarlyWeights, weights_on_gpu

_log = logging.getLogger(__name__)

CACHE_FRACTION = 0.9
"""Share of the GPU memory left after the weights that the KV cache takes when nothing else is said, at most."""


@dataclass(frozen=True)
class Choice:
    """A step that was started: `tokens`, [R] int32 in pinned memory, are its when `event` tells that it is done."""

    event: torch.cuda.Event
    tokens: torch.Tensor


class EngineKernels(KernelLibrary):
    """Machine code of a stage of an engine, for the GPU that it is on."""

    def __init__(self, engine: Engine, device: int, stage: int = 0) -> None:
        try:
            arch = architecture(device)
        except DeviceError as error:
            raise TargetError(
                f"{engine.path}: built for target cuda: {error}; build with --target cpu instead"
            ) from None
        first = engine.ranks[stage * engine.build.tp_size]  # what all ranks of the stage run
        code: Mapping[str, Any] = first.artifacts["code"]
        if arch not in code:
            other = "--target tensorrt, if that has this GPU, or --target cpu"
            advice = f"--cuda-arch {arch}" if arch in MULTIPROCESSORS else other
            raise TargetError(
                f"{engine.path}: built for {', '.join(code)}, this GPU is {arch}; build with {advice}"
            )
        super().__init__(device, precompiled=read_code(code[arch], arch, engine.path, stage))
        # Launch plans are those the engine was built with, whatever size of GPU this is.
        planned, found = MULTIPROCESSORS[arch], self.multiprocessors
        self.multiprocessors = max((n for n in planned if n <= found), default=planned[0])


class CudaExecutor(EngineLimits):
    """An `Executor` on one GPU that can also choose tokens (`GreedyChooser`) and run ahead of its host (`DecodeLoop`).

    group: the ranks of the job, for an engine of several; all load their parts and run the same steps in the same order.
    early: the weights, on their way to this GPU already.
    Of a pipeline this is what its stages have in common: see `cuda_stage`.
    """

    _gives_logits = True
    _prompts: PromptGraphs | None = None

    def __init__(
        self,
        engine: Engine,
        budget: CacheBudget = ENOUGH,
        *,
        device: int = 0,
        group: RankGroup | None = None,
        early: EarlyWeights | None = None,
    ) -> None:
        assert len(engine.ranks) == 1 or group is not None, "ranks that cannot talk to each other"
        if engine.trtc_version != __version__:
            raise EngineError(
                f"{engine.path}: its kernels were compiled by trtc {engine.trtc_version}, this is {__version__}; "
                f"build the engine again"
            )
        if engine.ranks[0].artifacts.get("cache_layout") != CACHE_LAYOUT:
            raise EngineError(
                f"{engine.path}: its kernels take a KV cache of another layout than [{CACHE_LAYOUT}]; "
                f"build the engine again"
            )
        stage = 0 if group is None else group.rank // engine.build.tp_size
        library = EngineKernels(engine, device, stage)
        if not torch.cuda.is_available():
            raise TargetError(
                f"{engine.path}: torch {torch.__version__} has no CUDA; install a CUDA build of torch"
            )
        self._device = torch.device("cuda", device)
        self._group = group
        if group is not None:
            torch.cuda.set_device(self._device)  # whose current stream the kernels are launched on
        try:
            self._load(engine, library, budget, early)
        except torch.OutOfMemoryError:
            total = torch.cuda.mem_get_info(device)[1]
            raise TargetError(
                f"{engine.path}: weights and KV cache do not fit the {total >> 20} MiB of {torch.cuda.get_device_name()}; "
                f"give less --kv-cache-memory-bytes, or build with a smaller --max-batch-size or --max-seq-len"
            ) from None

    def _load(
        self,
        engine: Engine,
        library: EngineKernels,
        budget: CacheBudget,
        early: EarlyWeights | None,
    ) -> None:
        group = self._group
        rank = 0 if group is None else group.rank
        communicator = None if group is None else GpuCommunicator(group, self._device, library)
        part = engine.ranks[rank]
        shape = CacheShape.of(part.graph, engine.build.page_size)
        with engine.weight_files(rank) as files, weights_on_gpu(files, self._device, early) as weights:
            if budget == ENOUGH:
                free = int(torch.cuda.mem_get_info(self._device)[0] * CACHE_FRACTION)
                whole = pages_for(engine.build.max_seq_len, engine.build.page_size)
                whole *= engine.build.max_batch_size * shape.bytes_per_page
                budget = CacheBudget(memory_bytes=min(free, whole))
            pages = budget.pages(engine, shape)
            EngineLimits.__init__(self, engine, pages if group is None else group.least(pages))
            self._cache = self._allocate(shape)
            # cuBLAS takes a while to make it.
            torch.cuda.current_blas_handle()  # type: ignore[no-untyped-call]
        self._program = CudaProgram(
            part.graph,
            weights,
            self._cache,
            library,
            accumulation=ACCUMULATIONS[part.artifacts["context_fmha"]],
            max_kv_length=engine.build.max_seq_len,
            kernels=plugins().kernels("cuda"),
            communicator=communicator,
            rank=0 if group is None else group.member,
            gives_logits=self._gives_logits,
        )
        most = pages_for(engine.build.max_seq_len, engine.build.page_size)
        self._pool = GraphPool(self._device)
        self._loop = self._make_loop(Sampling(library), engine.build.max_batch_size, most)
        if self._program.captures_prefill:
            buckets = prompt_buckets(engine.build.max_num_tokens, engine.build.max_batch_size)
            times = StepTimes.of(part.graph, shape, self._program.prefill_instructions)
            self._prompts = PromptGraphs(self._program, self._pool, buckets, times, most)

    def _make_loop(self, sampling: Sampling, max_batch_size: int, pages: int) -> GraphLoop:
        return GraphLoop(self._program, sampling, self._pool, max_batch_size, pages)

    def _allocate(self, shape: CacheShape) -> list[Pages]:
        size = (self.num_pages, shape.num_kv_heads, shape.page_size, shape.head_dim)
        dtype = to_torch(shape.dtype)

        def zeros() -> torch.Tensor:
            size_bytes = (*size[:-1], size[-1] * dtype.itemsize)
            return torch.zeros(size_bytes, dtype=torch.uint8, device=self._device).view(dtype)

        return [(zeros(), zeros()) for _ in range(shape.layers)]

    def execute(self, step: StepInput) -> torch.Tensor:
        """See `Executor.execute`; the logits are on the GPU."""
        with self._watched():
            logits = self._run(step)
            if self._group is not None:
                torch.cuda.current_stream().synchronize()  # here, where somebody watches that all ranks come
        return logits

    def _watched(self) -> AbstractContextManager[None]:
        return nullcontext() if self._group is None else self._group.device_work()

    def _run(self, step: StepInput) -> torch.Tensor:
        if self._load_step(step):
            return self._loop.run_once().float()
        return self._prefill(step)

    def _load_step(self, step: StepInput) -> bool:
        """Loads a step that can be replayed: one of few tokens whose logits are all wanted."""
        rows = len(step.logits_index)
        if not step.num_tokens == rows <= self._loop.max_rows(verify=step.num_sequences < rows):
            return False
        if step.num_sequences == rows:
            self._loop.load(step.token_ids, step.kv_length, step.page_table)
        else:
            owner = np.repeat(np.arange(step.num_sequences), np.diff(step.query_start))
            self._loop.load(step.token_ids, step.positions + 1, step.page_table[owner], verify=True)
        return True

    def _prefill(
        self,
        step: StepInput,
        before: TakenOver | None = None,
        received: Mapping[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """before: tokens that only the device knows. received: what a stage of a pipeline takes beyond a step."""
        rows = PromptRows.of(step)
        if self._prompts is not None and received is None:
            logits = self._prompts.run(rows, before)
            if logits is not None:
                return logits
        return launch_prompts(self._program, send(rows, self._device), before, received)

    def copy_pages(self, source: Sequence[int], target: Sequence[int]) -> None:
        """See `PageCopier.copy_pages`; in the order of the device's work."""
        index = torch.tensor([list(source), list(target)], device=self._device)
        for pages in chain.from_iterable(self._cache):
            held = indexable(pages)
            held[index[1]] = held[index[0]]

    # ---- GreedyChooser

    @property
    def max_draft_tokens(self) -> int | None:
        """See `GreedyChooser.max_draft_tokens`: more run launch by launch."""
        return self._loop.max_rows(verify=True)

    def choose(self, step: StepInput) -> Int32Array:
        """See `GreedyChooser.choose`. The host waits for the device once."""
        return self.finish_step(self.start_step(step, None))

    # ---- StepStarter

    def start_step(self, step: StepInput, source: Int32Array | None) -> Choice:
        """See `StepStarter.start_step`."""
        self._chosen = self._start(step, source)
        tokens = torch.empty(self._chosen.shape, dtype=torch.int32, pin_memory=True)
        tokens.copy_(self._chosen, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return Choice(event, tokens)

    def _start(self, step: StepInput, source: Int32Array | None) -> torch.Tensor:
        """The tokens that a step chooses, [R] int32 on the device, valid until the next step."""
        before = None if source is None else self._take_over(source)
        if not self._load_step(step):
            return greedy_tokens(self._prefill(step, before))
        if before is not None:
            self._loop.set_tokens(before)
        return self._loop.run_once_choosing()

    def finish_step(self, ticket: Choice) -> Int32Array:
        """See `StepStarter.finish_step`."""
        with self._watched():
            ticket.event.synchronize()
        found: Int32Array = ticket.tokens.numpy()
        return found

    def _take_over(self, source: Int32Array) -> TakenOver:
        """Tokens of the step started last, before the next one overwrites them."""
        places = np.flatnonzero(source >= 0).astype(np.int64)
        index = torch.from_numpy(np.stack((places, source[places]))).pin_memory()
        at, rows = index.to(self._device, non_blocking=True)
        # That a token is none, because logits were not finite, is found when it is collected.
        return at, self._chosen[rows].clamp_(min=0)

    # ---- Preparer

    def prepare(self) -> bool:
        """See `Preparer.prepare`: captures one more CUDA graph, those of decode steps first."""
        try:
            return self._loop.prepare() or (self._prompts is not None and self._prompts.prepare())
        except torch.OutOfMemoryError:
            _log.warning("too little GPU memory is left to capture CUDA graphs ahead of their first use")
            return False

    # ---- DecodeLoop

    def loop_load(self, token_ids: Int32Array, kv_length: Int32Array, page_table: Int32Array) -> None:
        """See `DecodeLoop.loop_load`."""
        self._loop.load(token_ids, kv_length, page_table)

    # ---- LoopBehindSteps

    def loop_load_behind(
        self, token_ids: Int32Array, source: Int32Array, kv_length: Int32Array, page_table: Int32Array
    ) -> None:
        """See `LoopBehindSteps.loop_load_behind`."""
        before = self._take_over(source)
        self._loop.load(token_ids, kv_length, page_table)
        self._loop.set_tokens(before)

    def loop_enqueue(self, count: int) -> Ticket:
        """See `DecodeLoop.loop_enqueue`."""
        with self._watched():
            return self._loop.enqueue(count)

    def loop_rest(self, rows: Sequence[int]) -> None:
        """See `DecodeLoop.loop_rest`."""
        self._loop.rest(rows)

    def loop_collect(self, ticket: Ticket) -> Int32Array:
        """See `DecodeLoop.loop_collect`."""
        with self._watched():
            return self._loop.collect(ticket)

    def close(self) -> None:
        """Releases the GPU memory, and what holds on to the ranks' communicator."""
        if "_pool" in self.__dict__:
            self._pool.close()
        if "_program" in self.__dict__:
            self._program.close()
        for name in ("_program", "_pool", "_loop", "_prompts", "_cache"):
            self.__dict__.pop(name, None)
        torch.cuda.empty_cache()


def greedy_tokens(logits: torch.Tensor) -> torch.Tensor:
    """[R] int32: of each row the token with the largest logit, -1 where that is not finite."""
    best, chosen = logits.max(-1)
    return chosen.where(best.isfinite(), -1).int()
