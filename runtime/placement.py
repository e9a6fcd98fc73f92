"""Which rank of a job this process is, as its launcher told it through the environment. Imports nothing heavy."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from ..core.errors import ConfigError

RANK, SIZE = "TRTC_RANK", "TRTC_NUM_RANKS"
RENDEZVOUS = "TRTC_RENDEZVOUS"
"""A file that the ranks which `runtime.launcher` started meet through."""
LAUNCHER = "TRTC_LAUNCHER_PID"
_MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
)
"""Open MPI; MPICH and those made from it."""


@dataclass(frozen=True)
class Placement:
    """rank 0 .. size - 1. `rendezvous` is None for ranks that MPI started, `launcher_pid` for those that we did not.
    `local_rank` counts the ranks of a host; None where nobody said it: it follows from the hosts once all have met."""

    rank: int = 0
    size: int = 1
    rendezvous: str | None = None
    launcher_pid: int | None = None
    local_rank: int | None = None


def placement(environ: Mapping[str, str] = os.environ) -> Placement:
    """Where this process stands: our own launcher's word first, then MPI's, else a job of one process.

    Raises ConfigError for variables that are not a rank and a size.
    """
    if RANK in environ:
        rank, size = _pair(environ, RANK, SIZE)
        return Placement(rank, size, environ[RENDEZVOUS], _integer(environ, LAUNCHER))
    for rank_name, size_name, local_name in _MPI:
        if rank_name in environ and size_name in environ:
            local = _integer(environ, local_name) if local_name in environ else None
            return Placement(*_pair(environ, rank_name, size_name), local_rank=local)
    return Placement()


def environment(place: Placement) -> dict[str, str]:
    """The variables that say `place` to a process which our launcher starts."""
    values = {
        RANK: place.rank,
        SIZE: place.size,
        RENDEZVOUS: place.rendezvous,
        LAUNCHER: place.launcher_pid,
    }
    return {name: str(value) for name, value in values.items()}


def _pair(environ: Mapping[str, str], rank_name: str, size_name: str) -> tuple[int, int]:
    rank, size = _integer(environ, rank_name), _integer(environ, size_name)
    if not 0 <= rank < size:
        raise ConfigError(f"environment: {rank_name}={rank} does not fit {size_name}={size}")
    return rank, size


def _integer(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except (KeyError, ValueError):
        raise ConfigError(f"environment: {name} is {environ.get(name)!r}; accepted: an integer") from None
