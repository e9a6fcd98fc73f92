"""Which rank of a job this process is, as its launcher told it through the environment. Imports nothing heavy."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import ConfigError, TargetError

RANK, SIZE = "TRTC_RANK", "TRTC_NUM_RANKS"
RENDEZVOUS = "TRTC_RENDEZVOUS"
"""A file that the ranks which `runtime.launcher` started meet through."""
LAUNCHER = "TRTC_LAUNCHER_PID"
INTERFACE = "GLOO_SOCKET_IFNAME"
"""The network between ranks, where a host has several: a variable that gloo reads."""
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
        if RENDEZVOUS not in environ:
            raise ConfigError(
                f"environment: {RANK} is set without {RENDEZVOUS}: they are of `--nproc`, leave them out"
            )
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


def require_runnable(engine_dir: Path, ranks: int, processes: int) -> None:
    """Raises TargetError, saying what to do, when an engine of so many ranks is not one for so many processes."""
    if ranks != processes:
        raise TargetError(
            f"{engine_dir}: built for {ranks} rank{'s' * (ranks > 1)} and {processes} processes run it: start it with "
            f"`mpirun -n {ranks}` or `--nproc {ranks}`, or build it for {processes}: --tp-size times --pp-size"
        )


def require_interface() -> None:
    """Raises TargetError when the environment names a network that this host does not have."""
    wanted = os.environ.get(INTERFACE, "")
    known = [name for _, name in socket.if_nameindex()]
    if not set(filter(None, wanted.split(","))) <= set(known):
        raise TargetError(
            f"environment: {INTERFACE} is {wanted!r}; accepted: networks of {socket.gethostname()}: {', '.join(known)}"
        )


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
