"""Weights from an engine's files to a GPU, at the speed of the slower of the two.

Threads take turns at the chunks of the files, in the order in which they lie there. Each fills a page-locked buffer of its
own and starts the copies to the GPU; while they run it fills the next. So reads are large and in order, reading and copying
overlap, and host memory is that of the buffers, however large the model.
"""

from __future__ import annotations

import mmap
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import NamedTuple, Protocol

import torch

from ..core.dtypes import to_torch
from ..core.errors import CheckpointError, EngineError
from ..core.safetensors_io import SafetensorsFile

THREADS = 8
"""One copies 5 to 10 GB/s out of the page cache; the link to a GPU takes 25 to 55."""
CHUNK_BYTES = 8 << 20
_BUFFERS = 2
"""Of each thread: one is filled while the other is copied."""


class Staging(Protocol):
    """A buffer in host memory from which bytes are copied to where weights live. One thread uses it."""

    memory: memoryview
    """What is copied from: CHUNK_BYTES, or as many as were asked for."""

    def copy(self, start: int, target: torch.Tensor) -> None:
        """Starts to copy `memory[start : start + len(target)]` to `target`, uint8."""

    def wait(self) -> None:
        """Returns when all copies are done: `memory` may be filled anew."""

    def close(self) -> None:
        """Waits, and gives the memory back."""


class Chunk(NamedTuple):
    """Bytes of a file that are read at once, and where they go."""

    file: SafetensorsFile
    offset: int
    nbytes: int
    parts: tuple[tuple[int, torch.Tensor], ...]
    """(position in the chunk, uint8 tensor that takes the bytes from there on)."""


@contextmanager
def loading_to_gpu(
    files: Sequence[SafetensorsFile],
    device: torch.device,
    *,
    threads: int = THREADS,
    chunk_bytes: int = CHUNK_BYTES,
) -> Iterator[dict[str, torch.Tensor]]:
    """All tensors of `files`, by name, on the GPU `device`; what is in them comes while the block runs, and is complete when
    it is left.

    Raises EngineError when a file cannot be read, torch.OutOfMemoryError when the GPU has too little memory.
    """
    weights = allocate(files, device)
    torch.cuda.current_stream(device).synchronize()  # nothing queued there uses this memory any more
    with filling(
        files, weights, lambda: PinnedStaging(device, chunk_bytes), threads=threads, chunk_bytes=chunk_bytes
    ):
        yield weights


def allocate(files: Sequence[SafetensorsFile], device: torch.device) -> dict[str, torch.Tensor]:
    """Memory for all tensors of `files`: each a tensor of its own, so that one that is replaced can be freed."""
    return {
        name: torch.empty(entry.shape, dtype=to_torch(entry.dtype), device=device)
        for file in files
        for name, entry in file.tensors.items()
    }


@contextmanager
def filling(
    files: Sequence[SafetensorsFile],
    weights: dict[str, torch.Tensor],
    staging: Callable[[], Staging],
    *,
    threads: int = THREADS,
    chunk_bytes: int = CHUNK_BYTES,
) -> Iterator[None]:
    """Reads `files` into `weights` while the block runs, through buffers of `chunk_bytes` that every thread gets from
    `staging`; all is read, or an error has been raised, and all threads have ended, when the block is left.

    Raises EngineError when a file cannot be read, and what `staging` raises.
    """
    waiting = deque(chunk for file in files for chunk in chunks(file, weights, chunk_bytes))
    with ThreadPoolExecutor(threads, "weights") as pool:
        workers = [pool.submit(_work, waiting, staging) for _ in range(min(threads, len(waiting)))]
        try:
            yield
            for worker in workers:
                worker.result()
        except CheckpointError as error:
            raise EngineError(str(error)) from None
        finally:
            waiting.clear()  # the others end after the chunk that they have


def chunks(file: SafetensorsFile, weights: dict[str, torch.Tensor], chunk_bytes: int) -> Iterator[Chunk]:
    """`file` from its first tensor to its end, in pieces of `chunk_bytes`. Its tensors leave no holes."""
    parts: list[tuple[int, torch.Tensor]] = []
    begin, size = 0, 0
    for name, entry in file.tensors.items():
        target = weights[name].reshape(-1).view(torch.uint8)
        done = 0
        while done < entry.nbytes:
            if not parts:
                begin, size = entry.offset + done, 0
            count = min(entry.nbytes - done, chunk_bytes - size)
            parts.append((size, target[done : done + count]))
            done, size = done + count, size + count
            if size == chunk_bytes:
                yield Chunk(file, begin, size, tuple(parts))
                parts = []
    if parts:
        yield Chunk(file, begin, size, tuple(parts))


def _work(waiting: deque[Chunk], staging: Callable[[], Staging]) -> None:
    """One thread: chunks as long as there are any. An error leaves none for the others."""
    with ExitStack() as stack:
        stack.push(lambda kind, *_: waiting.clear() if kind else None)
        buffers: list[Staging] = []
        for turn in range(len(waiting)):
            try:
                chunk = waiting.popleft()
            except IndexError:  # the other threads had the rest
                return
            if len(buffers) < _BUFFERS:
                buffers.append(staging())
                stack.callback(buffers[-1].close)
            buffer = buffers[turn % _BUFFERS]
            buffer.wait()
            chunk.file.read_into(chunk.offset, buffer.memory[: chunk.nbytes])
            for start, target in chunk.parts:
                buffer.copy(start, target)


class PinnedStaging:
    """See `Staging`: page-locked memory, and a stream for its copies to a GPU."""

    def __init__(self, device: torch.device, nbytes: int) -> None:
        # Whole pages of its own, not torch's pinned memory, which torch would keep for the life of the process.
        pages = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.memory = memoryview(pages)
        self._host = torch.frombuffer(pages, dtype=torch.uint8)
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._device = device
        self._runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        with torch.cuda.device(device):
            torch.cuda.check_error(self._runtime.cudaHostRegister(self._host.data_ptr(), nbytes, 0))

    def copy(self, start: int, target: torch.Tensor) -> None:
        with torch.cuda.stream(self._stream):
            target.copy_(self._host[start : start + len(target)], non_blocking=True)

    def wait(self) -> None:
        self._stream.synchronize()

    def close(self) -> None:
        self.wait()
        with torch.cuda.device(self._device):
            torch.cuda.check_error(self._runtime.cudaHostUnregister(self._host.data_ptr()))
