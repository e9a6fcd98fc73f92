"""How the process that runs an engine on the CPU keeps memory."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping

_KEPT_BYTES = 256 << 20
_LARGEST = 32 << 20
"""Larger blocks than glibc lets its heap hold are mapped, and given back, one by one."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def keep_freed_memory(environ: Mapping[str, str] = os.environ) -> bool:
    """Lets glibc keep freed memory for the next layer and step, instead of giving it back and having it cleared again.

    A step of a thousand tokens otherwise spends up to a tenth of its time on page faults. The peak is the same; what a step
    needed at most, up to 256 MiB, stays with the process. Returns whether it took effect: other C libraries, and processes
    whose environment sets glibc's thresholds, are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    chosen = any(name in environ for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"))
    if mallopt is None or chosen or "glibc.malloc" in environ.get("GLIBC_TUNABLES", ""):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST)) and bool(mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES))
