"""Engine directory -> Executor."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.engine import Engine
from ..core.errors import TargetError
from .cache_size import ENOUGH, CacheBudget
from .early_start import BegunEngine
from .executor import Executor
from .placement import placement

if TYPE_CHECKING:
    from .distributed import RankGroup
    from .tensorrt_executor import PackedTensorRTExecutor, TensorRTExecutor
    from .weight_loading import EarlyWeights


def load_executor(
    engine_dir: str | PathLike[str],
    *,
    num_pages: int | None = None,
    kv_cache_memory_bytes: int | None = None,
    verify: bool = True,
) -> Executor:
    """The executor of an engine directory, ready to run.

    engine_dir: or what `begin_loading` made of it, which then stands for `verify` too.
    num_pages: pages of the KV cache; None: as many as kv_cache_memory_bytes holds.
    kv_cache_memory_bytes: None: enough for the engine's max_batch_size sequences of max_seq_len tokens.
    verify: compare the sha256 of every file first; one rank of several compares its own files.
    In a job of several ranks (`mpirun`, `trtc run --nproc`) rank 0 gets the executor of the whole job; the other ranks do
    its steps in here until it is closed there, and leave with SystemExit(0).
    Raises EngineError for a directory that is not a sound engine, TargetError when its target cannot run here.
    """
    budget = CacheBudget(num_pages=num_pages, memory_bytes=kv_cache_memory_bytes)
    place = placement()
    if place.size > 1:
        from .follower import load_ranks

        return load_ranks(place, Path(engine_dir), budget, verify)
    engine = Engine.open(engine_dir, verify=verify)
    early = engine_dir.weights if isinstance(engine_dir, BegunEngine) else None
    if early is not None and len(engine.ranks) == 1:
        return _cuda(engine, budget, early)
    return executor_of(engine, budget)


def executor_of(engine: Engine, budget: CacheBudget = ENOUGH) -> Executor:
    """The executor of an engine of one rank that is open already; see `load_executor`."""
    count = len(engine.ranks)
    if count > 1:
        raise TargetError(
            f"{engine.path}: built for {count} ranks and one process runs it: start it with "
            f"`trtc run --nproc {count} ...` or `mpirun -n {count} trtc run ...`"
        )
    return _EXECUTORS[engine.build.target](engine, budget)


def _cpu(engine: Engine, budget: CacheBudget) -> Executor:
    from .cpu_loop import cpu_executor

    return cpu_executor(engine, budget)


def _cuda(engine: Engine, budget: CacheBudget, early: EarlyWeights | None = None) -> Executor:
    from .cuda_executor import CudaExecutor

    return CudaExecutor(engine, budget, early=early)


def tensorrt_executor(
    engine: Engine, budget: CacheBudget, group: RankGroup | None = None
) -> TensorRTExecutor | PackedTensorRTExecutor:
    """What runs a plan; of an engine of several ranks, the plan of this one's rank in `group`."""
    from .tensorrt_executor import (
        PackedTensorRTExecutor,
        TensorRTExecutor,
        cache_slots,
        is_packed,
        packed_pages,
    )
    from .tensorrt_session import TensorRTSession

    if is_packed(engine):
        pages = packed_pages(engine, budget)
        return PackedTensorRTExecutor(engine, TensorRTSession(engine, pages, group), pages)
    slots = cache_slots(engine, budget)
    return TensorRTExecutor(engine, TensorRTSession(engine, slots, group), slots)


_EXECUTORS: dict[str, Callable[[Engine, CacheBudget], Executor]] = {
    "cpu": _cpu,
    "cuda": _cuda,
    "tensorrt": tensorrt_executor,
}
