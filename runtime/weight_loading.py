"""Weights from an engine's files to a GPU, at the speed of the slower of the two.

Threads take turns at the chunks of the files, in the order in which they lie there. Each fills a page-locked buffer of its
own and starts the copies to the GPU; while they run it fills the next. So reads are large and in order, reading and copying
overlap, and host memory is that of the buffers, however large the model.

Torch is not needed for that: `EarlyWeights` does it while torch is being imported.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from ..core.dtypes import to_torch
from ..core.errors import CheckpointError, EngineError, TrtcError
from ..core.safetensors_io import SafetensorsFile, TensorEntry
from ..kernels.errors import KernelError
from ..kernels.launch import primary_context
from ..kernels.memory import DeviceMemory, PinnedBuffer

if TYPE_CHECKING:
    import torch

THREADS, CHUNK_BYTES = 16, 4 << 20
"""One thread copies 5 to 10 GB/s out of the page cache; the link to a GPU takes 25 to 55."""
EARLY_THREADS, EARLY_CHUNK_BYTES = 4, 16 << 20
"""While torch is being imported: slower, but it leaves processors to that, and takes the interpreter less often from it."""
_BUFFERS = 2
"""Of each thread: one is filled while the other is copied."""


class Staging(Protocol):
    """A buffer in host memory from which bytes are copied to where weights live: a `PinnedBuffer`. One thread uses it."""

    memory: memoryview

    def copy(self, start: int, nbytes: int, address: int) -> None:
        """Starts to copy `memory[start : start + nbytes]` to `address`."""

    def wait(self) -> None:
        """Returns when all copies are done: `memory` may be filled anew."""

    def close(self) -> None:
        """Waits, and gives the memory back."""


class Part(NamedTuple):
    """Bytes of a chunk, from `start` in it, and where they go."""

    start: int
    nbytes: int
    address: int


class Chunk(NamedTuple):
    """Bytes of a file that are read at once, all of which go somewhere."""

    file: SafetensorsFile
    offset: int
    nbytes: int
    parts: tuple[Part, ...]


def weights_on_gpu(
    files: Sequence[SafetensorsFile], device: torch.device, early: EarlyWeights | None
) -> AbstractContextManager[dict[str, torch.Tensor]]:
    """See `loading_to_gpu`, of what has not been loaded early."""
    loaded = None if early is None else early.tensors(device)
    return loading_to_gpu(files, device) if loaded is None else nullcontext(loaded)


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
    import torch

    weights = allocate(files, device)
    torch.cuda.current_stream(device).synchronize()  # nothing queued there uses this memory any more
    addresses = {name: tensor.data_ptr() for name, tensor in weights.items()}
    number = device.index or 0
    with Filling(
        files, addresses, lambda: PinnedBuffer(chunk_bytes, number), threads=threads, chunk_bytes=chunk_bytes
    ):
        yield weights


def allocate(files: Sequence[SafetensorsFile], device: torch.device) -> dict[str, torch.Tensor]:
    """Memory for all tensors of `files`: each a tensor of its own, so that one that is replaced can be freed."""
    import torch

    return {
        name: torch.empty(entry.shape, dtype=to_torch(entry.dtype), device=device)
        for file in files
        for name, entry in file.tensors.items()
    }


class Filling:
    """Files being read, in threads, to the addresses of their tensors. As a context: all is done when the block is left, or
    everything has ended because of an error in the block or in a thread."""

    def __init__(
        self,
        files: Sequence[SafetensorsFile],
        addresses: Mapping[str, int],
        staging: Callable[[], Staging],
        *,
        threads: int = THREADS,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        """staging: gives a thread a buffer of `chunk_bytes`; it is called `_BUFFERS` times a thread at most"""
        self._waiting = deque(chunk for file in files for chunk in chunks(file, addresses, chunk_bytes))
        self._ends: list[Future[None]] = []
        self._threads: list[threading.Thread] = []
        for _ in range(min(threads, len(self._waiting))):
            end: Future[None] = Future()
            work = (self._waiting, staging, end)
            self._ends.append(end)
            self._threads.append(threading.Thread(target=_work, args=work, name="weights", daemon=True))
        for thread in self._threads:
            thread.start()

    def wait(self) -> None:
        """Returns when all threads have ended. Raises EngineError when a file cannot be read, and what `staging` raises."""
        for thread in self._threads:
            thread.join()
        try:
            for end in self._ends:
                end.result()
        except CheckpointError as error:
            raise EngineError(str(error)) from None

    def stop(self) -> None:
        """Threads end after the chunk that they have."""
        self._waiting.clear()

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.wait()
            return
        self.stop()
        for thread in self._threads:
            thread.join()


def chunks(file: SafetensorsFile, addresses: Mapping[str, int], chunk_bytes: int) -> Iterator[Chunk]:
    """`file` from its first tensor to its end, in pieces of `chunk_bytes`. Its tensors leave no holes."""
    parts: list[Part] = []
    begin, size = 0, 0
    for name, entry in file.tensors.items():
        done = 0
        while done < entry.nbytes:
            if not parts:
                begin, size = entry.offset + done, 0
            count = min(entry.nbytes - done, chunk_bytes - size)
            parts.append(Part(size, count, addresses[name] + done))
            done, size = done + count, size + count
            if size == chunk_bytes:
                yield Chunk(file, begin, size, tuple(parts))
                parts = []
    if parts:
        yield Chunk(file, begin, size, tuple(parts))


def _work(waiting: deque[Chunk], staging: Callable[[], Staging], end: Future[None]) -> None:
    """One thread: chunks as long as there are any. An error leaves none for the others."""
    try:
        _copy_chunks(waiting, staging)
    except BaseException as error:
        waiting.clear()
        end.set_exception(error)
    else:
        end.set_result(None)


def _copy_chunks(waiting: deque[Chunk], staging: Callable[[], Staging]) -> None:
    with ExitStack() as stack:
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
            with buffer.memory[: chunk.nbytes] as view:
                chunk.file.read_into(chunk.offset, view)
            for part in chunk.parts:
                buffer.copy(*part)


class EarlyWeights:
    """The weights of an engine on their way to the first GPU, in threads, without torch.

    Threads end, at the next chunk, with the object or the program.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._work = _EarlyWork(paths)
        thread = threading.Thread(target=self._work.run, name="early-weights", daemon=True)
        thread.start()
        weakref.finalize(self, _end, self._work, thread)

    def tensors(self, device: torch.device) -> dict[str, torch.Tensor] | None:
        """All tensors, by name, on `device`, as soon as they are complete. Can be had once.

        None when they could not be loaded, or are on another GPU: whoever loads them again is told what is wrong.
        """
        import torch

        memory = self._work.memory.result()
        if device != torch.device("cuda", 0):
            memory.clear()
        weights = {
            name: torch.as_tensor(held, device=device)[: entry.nbytes]
            .view(to_torch(entry.dtype))
            .reshape(entry.shape)
            for name, (held, entry) in memory.items()
        }
        memory.clear()  # it is the tensors that keep it now
        return weights or None


class _EarlyWork:
    """What the threads of `EarlyWeights` know: not the object itself, which could not end then."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.memory: Future[dict[str, tuple[DeviceMemory, TensorEntry]]] = Future()
        """Empty where loading did not work."""
        self._paths = paths
        self._stopped = False
        self._filling: Filling | None = None

    def run(self) -> None:
        memory: dict[str, tuple[DeviceMemory, TensorEntry]] = {}
        loaded = False
        try:
            with suppress(KernelError, TrtcError, OSError, MemoryError):  # loading again says what is wrong
                self._load(memory)
                loaded = True
        finally:
            if not loaded:
                memory.clear()  # room for those that are loaded again
            self.memory.set_result(memory)

    def _load(self, memory: dict[str, tuple[DeviceMemory, TensorEntry]]) -> None:
        primary_context()  # which takes the driver a while, and is of use even if nothing else works
        with ExitStack() as stack:
            files = [stack.enter_context(SafetensorsFile(path)) for path in self._paths]
            for name, entry in (item for file in files for item in file.tensors.items()):
                memory[name] = DeviceMemory(max(1, entry.nbytes)), entry
            addresses = {name: held.address for name, (held, _) in memory.items()}
            self._filling = Filling(
                files,
                addresses,
                lambda: PinnedBuffer(EARLY_CHUNK_BYTES),
                threads=EARLY_THREADS,
                chunk_bytes=EARLY_CHUNK_BYTES,
            )
            if self._stopped:
                self._filling.stop()
            self._filling.wait()

    def stop(self) -> None:
        self._stopped = True
        if self._filling is not None:
            self._filling.stop()


def _end(work: _EarlyWork, thread: threading.Thread) -> None:
    work.stop()
    thread.join()
