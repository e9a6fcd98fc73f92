"""How many threads the CPU target uses."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch

_QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""`QUOTA PERIOD` in microseconds, or `max PERIOD`: what a container was given of the processors (cgroup 2)."""


def usable_threads(ranks: Sequence[Collection[int]] = (), quota_file: Path = _QUOTA) -> int:
    """Processors that this process may run on, or fewer where its container has a quota of less than these.

    ranks: the processors of every rank on this machine, this one included: ranks with the same ones share them, and all
           share the quota
    """
    mine = os.sched_getaffinity(0)
    sharers = sum(mine == set(processors) for processors in ranks)
    allowed = len(mine) // max(1, sharers)
    try:
        quota, period = quota_file.read_text().split()
        # a fraction more would be a thread that is stopped most of the time
        allowed = min(allowed, int(quota) // int(period) // max(1, len(ranks)))
    except (OSError, ValueError):  # no cgroup 2, or no quota
        pass
    return max(1, allowed)


def limit_threads(
    ranks: Sequence[Collection[int]] = (), environ: Mapping[str, str] = os.environ, quota_file: Path = _QUOTA
) -> None:
    """Keeps torch from starting more threads than `usable_threads`; OMP_NUM_THREADS has the last word."""
    if "OMP_NUM_THREADS" not in environ:
        torch.set_num_threads(min(torch.get_num_threads(), usable_threads(ranks, quota_file)))
