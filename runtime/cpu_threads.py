"""How many threads the CPU target uses."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

_QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""`QUOTA PERIOD` in microseconds, or `max PERIOD`: what a container was given of the processors (cgroup 2)."""


def usable_threads(quota_file: Path = _QUOTA) -> int:
    """Processors that this process may run on, or fewer where its container has a quota of less than these."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = quota_file.read_text().split()
        whole = int(quota) // int(
            period
        )  # a fraction more would be a thread that is stopped most of the time
    except (OSError, ValueError):  # no cgroup 2, or no quota
        return allowed
    return max(1, min(allowed, whole))


def limit_threads(environ: Mapping[str, str] = os.environ, quota_file: Path = _QUOTA) -> None:
    """Keeps torch from starting more threads than a container's quota lets run; OMP_NUM_THREADS has the last word."""
    if "OMP_NUM_THREADS" not in environ:
        torch.set_num_threads(min(torch.get_num_threads(), usable_threads(quota_file)))
