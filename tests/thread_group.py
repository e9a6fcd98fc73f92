"""A tensor-parallel group inside one process: the communicator of the references, over threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch


class ThreadGroup:
    """A tensor-parallel group of threads that meet at every collective; exchanges really happen."""

    def __init__(self, size: int) -> None:
        self._slots: list[Any] = [None] * size
        self._barrier = threading.Barrier(size, timeout=120)

    def rank(self, rank: int) -> RankCommunicator:
        return RankCommunicator(self, rank)

    def exchange(self, rank: int, x: torch.Tensor) -> list[torch.Tensor]:
        """What all ranks brought, in rank order."""
        self._slots[rank] = x
        self._barrier.wait()
        parts = list(self._slots)
        self._barrier.wait()
        return parts

    def abort(self) -> None:
        self._barrier.abort()


class RankCommunicator:
    def __init__(self, group: ThreadGroup, rank: int) -> None:
        self._group, self._rank = group, rank

    def all_reduce(self, x: torch.Tensor, *, overwrite: bool = False) -> torch.Tensor:
        return torch.stack(self._group.exchange(self._rank, x)).sum(0)

    def all_gather(self, x: torch.Tensor, axis: int) -> torch.Tensor:
        return torch.cat(self._group.exchange(self._rank, x), axis)


def run_ranks(size: int, run: Callable[[int, RankCommunicator], torch.Tensor]) -> list[torch.Tensor]:
    """What `run` gives on every rank, each in a thread of its own. An error on one ends all."""
    group = ThreadGroup(size)

    def one(rank: int) -> torch.Tensor:
        try:
            return run(rank, group.rank(rank))
        except BaseException:
            group.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))
