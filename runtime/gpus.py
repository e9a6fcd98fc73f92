"""Which GPU a rank takes, and what NCCL is told before ranks talk through it."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, MutableMapping

from ..core.errors import TargetError

DEFAULTS: Mapping[str, str] = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING": "0",
}
"""NVLink multicast stays off: where programs share the GPUs of a host, one that uses it can put all of them out of service.
What stages of a pipeline send each other is meant to be in order. Whoever sets these variables decides."""


def set_defaults(environ: MutableMapping[str, str] = os.environ) -> None:
    """What NCCL and torch read from the environment, where nobody has set it."""
    for name, value in DEFAULTS.items():
        environ.setdefault(name, value)


def choose_device(rank: int, local_rank: int, count: int, environ: Mapping[str, str] = os.environ) -> int:
    """The CUDA ordinal for a rank, that of its host's ranks it is: every rank has a GPU of its own.

    count: GPUs that this process sees. Raises TargetError, naming rank, host and GPUs, when they are too few.
    """
    if local_rank < count:
        return local_rank
    seen = environ.get("CUDA_VISIBLE_DEVICES")
    narrowed = "" if seen is None else f", with CUDA_VISIBLE_DEVICES={seen}"
    advice = "start fewer ranks on this host" if count else "build with --target cpu instead"
    raise TargetError(
        f"rank {rank} on host {socket.gethostname()} has no GPU: it is number {local_rank + 1} of the ranks there and "
        f"torch sees {count} GPU{'s' * (count != 1)}{narrowed}; {advice}"
    )
