"""Memory of a GPU and copies to it, with the CUDA driver API: for what begins before torch is imported."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .launch import check, driver, primary_context


class DeviceMemory:
    """Bytes on a GPU. `torch.as_tensor(memory, device=...)` is a uint8 tensor over them, which keeps them.

    Freed with the last reference. Raises DeviceError when there are not so many, or there is no GPU.
    """

    def __init__(self, nbytes: int, device: int = 0) -> None:
        with _context_of(device) as cuda:
            self.address = int(check(cuda.cuMemAlloc(nbytes), f"{nbytes} bytes on CUDA device {device}"))
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (self.address, False),
            "version": 3,
        }
        # The end of the process frees what is left by itself.
        weakref.finalize(self, _free, self.address, device).atexit = False


class PinnedBuffer:
    """Page-locked host memory, and a stream for copies from it to a GPU. For a thread that does nothing else: the context of
    the GPU becomes that thread's, once, since a call of the driver is also a wait for the interpreter.

    memory: what to copy from, `nbytes` long
    Raises DeviceError when the driver refuses.
    """

    def __init__(self, nbytes: int, device: int = 0) -> None:
        self._driver, self._device = driver(), device
        cuda = self._driver
        check(cuda.cuCtxSetCurrent(primary_context(device)), f"context of CUDA device {device}")
        what = f"{nbytes} bytes of page-locked memory"
        self._address = int(check(cuda.cuMemHostAlloc(nbytes, cuda.CU_MEMHOSTALLOC_PORTABLE), what))
        self._stream = check(cuda.cuStreamCreate(int(cuda.CUstream_flags.CU_STREAM_NON_BLOCKING)), "a stream")
        self.memory = memoryview((ctypes.c_ubyte * nbytes).from_address(self._address)).cast("B")

    def copy(self, start: int, nbytes: int, address: int) -> None:
        """Starts to copy `memory[start : start + nbytes]` to `address` on the GPU."""
        copied = self._driver.cuMemcpyHtoDAsync(address, self._address + start, nbytes, self._stream)
        check(copied, f"copy of {nbytes} bytes to CUDA device {self._device}")

    def wait(self) -> None:
        """Returns when all copies are done: `memory` may be filled anew."""
        check(self._driver.cuStreamSynchronize(self._stream), f"copies to CUDA device {self._device}")

    def close(self) -> None:
        """Waits, and gives the memory back: `memory` is gone."""
        self.memory.release()
        self.wait()
        check(self._driver.cuStreamDestroy(self._stream), "end of a stream")
        check(self._driver.cuMemFreeHost(self._address), "end of page-locked memory")


@contextmanager
def _context_of(device: int) -> Iterator[Any]:
    """The driver, with the context of `device` as that of this thread for the time of the block."""
    cuda = driver()
    check(cuda.cuCtxPushCurrent(primary_context(device)), f"context of CUDA device {device}")
    try:
        yield cuda
    finally:
        check(cuda.cuCtxPopCurrent(), f"context of CUDA device {device}")


def _free(address: int, device: int) -> None:
    with _context_of(device) as cuda:
        check(cuda.cuMemFree(address), f"freeing memory on CUDA device {device}")
