"""Rank 0 schedules and samples, the other ranks follow: what they need of each step, and how they hear of it."""

from __future__ import annotations

import atexit
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
import torch

from .. import __version__
from ..core.engine import Engine
from ..core.engine_files import DESCRIPTION, sha256
from ..core.errors import TargetError
from .cache_size import CacheBudget
from .cpu_executor import CpuExecutor
from .distributed import RankGroup, join
from .engine_limits import EngineLimits
from .executor import DecodeLoop, GreedyChooser, PageCopier, StepStarter
from .gpus import choose_device
from .placement import Placement, require_runnable
from .stage_executor import StageExecutor
from .step_input import Int32Array, StepInput

HEADER = 4
FIRST = 1024
"""int32 of the message that every step has; a longer one goes on in a second message. Decode steps fit in one."""


def pack(step: StepInput) -> Int32Array:
    """T, B, P, R, then token_ids [T], tokens of each sequence [B], kv_length [B], page_table [B, P], logits_index [R].

    Positions are left out: they follow from the lengths. No step at all is a message of T = 0: see `STOP`, `pack_copies`,
    `pack_load`, `pack_enqueue`, `pack_rest`.
    """
    rows, pages = step.page_table.shape
    header = np.array([step.num_tokens, rows, pages, len(step.logits_index)], np.int32)
    return np.concatenate(
        (
            header,
            step.token_ids,
            np.diff(step.query_start),
            step.kv_length,
            step.page_table.ravel(),
            step.logits_index,
        )
    )


def pack_start(step: StepInput, source: Int32Array | None) -> Int32Array:
    """For `StepStarter.start_step`: as `pack`, but for -T; and with a source, [T] at the end, for -1 - R."""
    message = pack(step)
    message[0] = -message[0]
    if source is None:
        return message
    message[3] = -1 - message[3]
    return np.concatenate((message, source))


class Local(Protocol):
    """What runs the part of one rank. It may be a `PageCopier` too; one that is a `DecodeLoop` is a `GreedyChooser` and a
    `StepStarter` as well, and chooses the same tokens on every rank."""

    num_pages: int

    def execute(self, step: StepInput) -> torch.Tensor: ...
    def close(self) -> None: ...


STOP: Int32Array = np.zeros(HEADER, np.int32)


def pack_copies(source: Sequence[int], target: Sequence[int]) -> Int32Array:
    """Of pages: 0, how many, 0, 0, then the sources and the targets."""
    return np.array([0, len(source), 0, 0, *source, *target], np.int32)


def pack_load(token_ids: Int32Array, kv_length: Int32Array, page_table: Int32Array) -> Int32Array:
    """For `DecodeLoop.loop_load`: 0, B, P, 0, then token_ids [B], kv_length [B], page_table [B, P]."""
    header = np.array([0, *page_table.shape, 0], np.int32)
    return np.concatenate((header, token_ids, kv_length, page_table.ravel()))


def pack_enqueue(count: int) -> Int32Array:
    """For `DecodeLoop.loop_enqueue`: 0, 0, count, 0."""
    return np.array([0, 0, count, 0], np.int32)


def pack_rest(rows: Sequence[int]) -> Int32Array:
    """For `DecodeLoop.loop_rest`: 0, 0, 0, how many, then the rows."""
    return np.array([0, 0, 0, len(rows), *rows], np.int32)


def length(header: Int32Array) -> int:
    """Of a whole message, from its first `HEADER` entries."""
    tokens, rows, pages, wanted = header.tolist()
    tokens = abs(tokens)
    wanted, source = (wanted, 0) if wanted >= 0 else (-1 - wanted, tokens)
    return int(HEADER + tokens + rows * (2 + pages) + wanted + source)


def unpack(message: Int32Array) -> StepInput | None:
    """The step that was packed; None where none was."""
    tokens, rows, pages, wanted = message[:HEADER].tolist()
    tokens = abs(tokens)
    if tokens == 0:
        return None
    sizes = [tokens, rows, rows, rows * pages, wanted if wanted >= 0 else -1 - wanted]
    ids, counts, kv_length, table, index, _ = np.split(message[HEADER:], np.cumsum(sizes))
    query_start = np.zeros(rows + 1, np.int32)
    np.cumsum(counts, out=query_start[1:])
    first = np.repeat(kv_length - query_start[1:], counts)  # position of a sequence's row 0, were it so long
    positions = first + np.arange(tokens, dtype=np.int32)
    return StepInput(ids, positions, query_start, kv_length, table.reshape(rows, pages), index)


def unpack_source(message: Int32Array) -> Int32Array | None:
    """The source of `pack_start`."""
    return message[-abs(int(message[0])) :] if message[3] < 0 else None


def unpack_load(message: Int32Array) -> tuple[Int32Array, Int32Array, Int32Array]:
    """The arguments of `pack_load`."""
    rows, pages = message[1:3].tolist()
    token_ids, kv_length, table = np.split(message[HEADER:], [rows, 2 * rows])
    return token_ids, kv_length, table.reshape(rows, pages)


def send(group: RankGroup, message: Int32Array) -> None:
    """Rank 0: gives `message` to all."""
    first = np.zeros(FIRST, np.int32)
    first[: len(message)] = message[:FIRST]
    group.broadcast(torch.from_numpy(first))
    if len(message) > FIRST:
        group.broadcast(torch.from_numpy(message[FIRST:]))


def receive(group: RankGroup) -> Int32Array:
    """The others: what rank 0 sends next."""
    first = np.empty(FIRST, np.int32)
    group.broadcast(torch.from_numpy(first))
    total = length(first[:HEADER])
    if total <= FIRST:
        return first[:total]
    rest = np.empty(total - FIRST, np.int32)
    group.broadcast(torch.from_numpy(rest))
    return np.concatenate((first, rest))


class LeadingExecutor(EngineLimits):
    """The `Executor` of rank 0: every step runs on all ranks."""

    def __init__(self, engine: Engine, num_pages: int, local: Local, group: RankGroup) -> None:
        super().__init__(engine, num_pages)
        self._local = local
        self._group: RankGroup | None = group
        self._in_step = False
        atexit.register(self.close)

    def execute(self, step: StepInput) -> torch.Tensor:
        """See `Executor.execute`. Raises TargetError after a step that was cut short: the ranks are out of step then."""
        with self._in_step_with(pack(step)):
            return self._local.execute(step)

    @contextmanager
    def _in_step_with(self, message: Int32Array) -> Iterator[None]:
        """Tells the other ranks what this one does inside."""
        assert self._group is not None, "the executor is closed"
        if self._in_step:
            raise TargetError(
                "an earlier step was cut short and the ranks are out of step; load the engine again"
            )
        self._in_step = True
        send(self._group, message)
        yield
        self._in_step = False  # not when what is inside was cut short

    def close(self) -> None:
        """Ends the other ranks, in good order unless a step was cut short."""
        group, self._group = self._group, None
        if group is None:
            return
        atexit.unregister(self.close)
        if self._in_step:
            group.fail()
            self._local.close()
        else:
            send(group, STOP)
            self._local.close()  # first: what runs on a GPU holds on to the communicator
            group.close()


class LeadingCopier(LeadingExecutor):
    """A `LeadingExecutor` whose ranks are `PageCopier`s."""

    def copy_pages(self, source: Sequence[int], target: Sequence[int]) -> None:
        """See `PageCopier.copy_pages`."""
        with self._in_step_with(pack_copies(source, target)):
            assert isinstance(self._local, PageCopier)
            self._local.copy_pages(source, target)


class LeadingLoop(LeadingCopier):
    """A `LeadingCopier` whose ranks are `DecodeLoop`s, `StepStarter`s and `GreedyChooser`s: one message starts a burst of
    steps, or a step of prompts or guesses, and none of their results travels to the host of another rank."""

    @property
    def max_draft_tokens(self) -> int | None:
        """See `GreedyChooser.max_draft_tokens`."""
        return self._chooser.max_draft_tokens

    def choose(self, step: StepInput) -> Int32Array:
        """See `GreedyChooser.choose`."""
        return self.finish_step(self.start_step(step, None))

    def start_step(self, step: StepInput, source: Int32Array | None) -> Any:
        """See `StepStarter.start_step`."""
        with self._in_step_with(pack_start(step, source)):
            return self._starter.start_step(step, source)

    def finish_step(self, ticket: Any) -> Int32Array:
        """See `StepStarter.finish_step`; rank 0 has chosen the tokens itself."""
        return self._starter.finish_step(ticket)

    def loop_load(self, token_ids: Int32Array, kv_length: Int32Array, page_table: Int32Array) -> None:
        """See `DecodeLoop.loop_load`."""
        with self._in_step_with(pack_load(token_ids, kv_length, page_table)):
            self._loop.loop_load(token_ids, kv_length, page_table)

    def loop_enqueue(self, count: int) -> Any:
        """See `DecodeLoop.loop_enqueue`."""
        with self._in_step_with(pack_enqueue(count)):
            return self._loop.loop_enqueue(count)

    def loop_rest(self, rows: Sequence[int]) -> None:
        """See `DecodeLoop.loop_rest`."""
        if not rows:  # what would be said then is `STOP`
            return
        with self._in_step_with(pack_rest(rows)):
            self._loop.loop_rest(rows)

    def loop_collect(self, ticket: Any) -> Int32Array:
        """See `DecodeLoop.loop_collect`; rank 0 has chosen the tokens itself."""
        return self._loop.loop_collect(ticket)

    @property
    def _starter(self) -> StepStarter:
        assert isinstance(self._local, StepStarter)
        return self._local

    @property
    def _chooser(self) -> GreedyChooser:
        assert isinstance(self._local, GreedyChooser)
        return self._local

    @property
    def _loop(self) -> DecodeLoop:
        assert isinstance(self._local, DecodeLoop)
        return self._local


def follow(local: Local, group: RankGroup) -> NoReturn:
    """The other ranks: run what rank 0 runs until it closes; then SystemExit(0).

    Raises what a step raises; the job ends then on all ranks.
    """
    with group.failing_together():
        while (message := receive(group))[:HEADER].any():
            _obey(local, message)
    local.close()
    group.close()
    raise SystemExit(0)


def _obey(local: Local, message: Int32Array) -> None:
    """Does what a message other than `STOP` says."""
    step = unpack(message)
    if step is not None and message[0] < 0:
        assert isinstance(local, StepStarter)
        local.start_step(step, unpack_source(message))
        return
    if step is not None:
        local.execute(step)
        return
    _, rows, pages, resting = message[:HEADER].tolist()
    if resting:
        assert isinstance(local, DecodeLoop)
        local.loop_rest(message[HEADER:].tolist())
        return
    if not pages:
        assert isinstance(local, PageCopier)
        local.copy_pages(*message[HEADER:].reshape(2, -1).tolist())
        return
    assert isinstance(local, DecodeLoop)
    if rows:
        local.loop_load(*unpack_load(message))
    else:
        local.loop_enqueue(pages)


def load_ranks(place: Placement, engine_dir: Path, budget: CacheBudget, verify: bool) -> LeadingExecutor:
    """See `load.load_executor`: on rank 0 the executor of the whole job; the other ranks follow and do not return."""
    group = join(place)
    with group.failing_together():
        engine = Engine.open(engine_dir, verify=verify, rank=place.rank)
        if place.rank == 0:  # which speaks for all
            require_runnable(engine.path, len(engine.ranks), place.size)
        group.agree(
            {
                "trtc": __version__,
                "engine.json": sha256(engine.path / DESCRIPTION)[:16],
                "num_pages": str(budget.num_pages),
                "kv_cache_memory_bytes": str(budget.memory_bytes),
            }
        )
        local = _LOCAL[engine.build.target](engine, budget, group)
    if place.rank > 0:
        follow(local, group)
    leading = LeadingCopier if isinstance(local, PageCopier) else LeadingExecutor
    if isinstance(local, DecodeLoop):
        leading = LeadingLoop
    return leading(engine, local.num_pages, local, group)


def _cpu(engine: Engine, budget: CacheBudget, group: RankGroup) -> Local:
    group.divide(engine.build.tp_size)
    part = CpuExecutor(engine, budget, rank=group.rank, communicator=group)
    return StageExecutor(engine, part, group) if engine.build.pp_size > 1 else part


def _cuda(engine: Engine, budget: CacheBudget, group: RankGroup) -> Local:
    from .cuda_executor import CudaExecutor
    from .cuda_stage import CudaStageExecutor

    device = choose_device(group.rank, group.local_rank, torch.cuda.device_count())
    group.divide(engine.build.tp_size)
    executor = CudaStageExecutor if engine.build.pp_size > 1 else CudaExecutor
    return executor(engine, budget, device=device, group=group)


def _tensorrt(engine: Engine, budget: CacheBudget, group: RankGroup) -> Local:
    from .load import tensorrt_executor

    device = choose_device(group.rank, group.local_rank, torch.cuda.device_count())
    torch.cuda.set_device(device)
    group.connect_gpus(torch.device("cuda", device))
    return tensorrt_executor(engine, budget, group)


_LOCAL: dict[str, Callable[[Engine, CacheBudget, RankGroup], Local]] = {
    "cpu": _cpu,
    "cuda": _cuda,
    "tensorrt": _tensorrt,
}
