"""A stand-in for cuda-python's driver bindings: the GPU's memory is the host's, and copies run as late as they may."""

from __future__ import annotations

import ctypes
import threading
from types import SimpleNamespace
from typing import Any

OK = SimpleNamespace(value=0, name="CUDA_SUCCESS")


class DriverStandIn:
    """Copies on a stream run when it is waited for, from what the host's memory holds then.

    device, pinned: what is allocated, by address; streams: copies that have not run. `refuse`: the name of a call that fails.
    """

    CU_MEMHOSTALLOC_PORTABLE = 1
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)

    def __init__(self) -> None:
        self.device: dict[int, Any] = {}
        self.pinned: dict[int, Any] = {}
        self.streams: dict[int, list[tuple[int, int, int]]] = {}
        self.refuse = ""
        self.most_pinned = 0
        self._contexts = threading.local()
        self._lock = threading.Lock()
        self._next_stream = 0

    def _answer(self, call: str, *values: Any) -> tuple[Any, ...]:
        if call == self.refuse:
            return (SimpleNamespace(value=2, name="CUDA_ERROR_OUT_OF_MEMORY"), *(0 for _ in values))
        return (OK, *values)

    def _needs_context(self) -> None:
        assert getattr(self._contexts, "pushed", 0), "no context is current in this thread"

    def cuGetErrorString(self, status: Any) -> tuple[Any, bytes]:
        return OK, b"out of memory"

    def cuCtxSetCurrent(self, context: Any) -> tuple[Any, ...]:
        self._contexts.pushed = 1
        return (OK,)

    def cuCtxPushCurrent(self, context: Any) -> tuple[Any, ...]:
        self._contexts.pushed = getattr(self._contexts, "pushed", 0) + 1
        return (OK,)

    def cuCtxPopCurrent(self) -> tuple[Any, ...]:
        self._needs_context()
        self._contexts.pushed -= 1
        return OK, None

    def cuMemAlloc(self, nbytes: int) -> tuple[Any, ...]:
        self._needs_context()
        assert nbytes > 0
        if self.refuse == "cuMemAlloc" and len(self.device) == 3:  # as a GPU that is full
            return self._answer("cuMemAlloc", 0)
        block = (ctypes.c_ubyte * nbytes)()
        ctypes.memset(block, 0xEE, nbytes)
        with self._lock:
            self.device[ctypes.addressof(block)] = block
        return OK, ctypes.addressof(block)

    def cuMemFree(self, address: int) -> tuple[Any, ...]:
        self._needs_context()
        with self._lock:
            del self.device[address]
        return (OK,)

    def cuMemHostAlloc(self, nbytes: int, flags: int) -> tuple[Any, ...]:
        self._needs_context()
        answer = self._answer("cuMemHostAlloc", 0)
        if answer[0] is OK:
            block = (ctypes.c_ubyte * nbytes)()
            with self._lock:
                self.pinned[ctypes.addressof(block)] = block
                self.most_pinned = max(self.most_pinned, sum(map(len, self.pinned.values())))
            answer = (OK, ctypes.addressof(block))
        return answer

    def cuMemFreeHost(self, address: int) -> tuple[Any, ...]:
        with self._lock:
            del self.pinned[address]
        return (OK,)

    def cuStreamCreate(self, flags: int) -> tuple[Any, ...]:
        with self._lock:
            self._next_stream += 1
            self.streams[self._next_stream] = []
            return OK, self._next_stream

    def cuStreamDestroy(self, stream: int) -> tuple[Any, ...]:
        assert not self.streams[stream], "copies are under way"
        with self._lock:
            del self.streams[stream]
        return (OK,)

    def cuMemcpyHtoDAsync(self, target: int, source: int, nbytes: int, stream: int) -> tuple[Any, ...]:
        self._needs_context()
        self.streams[stream].append((target, source, nbytes))
        return self._answer("cuMemcpyHtoDAsync")

    def cuStreamSynchronize(self, stream: int) -> tuple[Any, ...]:
        for target, source, nbytes in self.streams[stream]:
            ctypes.memmove(target, source, nbytes)
        self.streams[stream] = []
        return (OK,)
