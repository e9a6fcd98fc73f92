"""Freed memory stays with the process. Oracle: the system's count of page faults."""

from __future__ import annotations

import ctypes
import platform
import resource

import pytest
from trtc.runtime.cpu_memory import keep_freed_memory

BLOCK, COUNT = 24 << 20, 4


def faults_of_large_blocks() -> int:
    """Page faults of blocks that live at the same time, as those of a step do."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = (
        ctypes.c_void_p,
        [ctypes.c_size_t],
        [ctypes.c_void_p],
    )
    blocks = [libc.malloc(BLOCK) for _ in range(COUNT)]
    for block in blocks:
        ctypes.memset(block, 1, BLOCK)
    for block in blocks:
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_blocks_that_were_freed_are_used_again() -> None:
    assert keep_freed_memory({})
    faults_of_large_blocks()
    assert faults_of_large_blocks() < COUNT * BLOCK // resource.getpagesize() // 2


@pytest.mark.parametrize(
    "environ", [{"MALLOC_TRIM_THRESHOLD_": "1"}, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=1"}]
)
def test_who_chose_for_himself_is_left_alone(environ: dict[str, str]) -> None:
    assert not keep_freed_memory(environ)
