"""Weights on their way to a GPU. Oracle: the tensors as the file's own reader gives them.

The stand-in for a GPU copies as late as it may: when it is waited for, from what the buffer holds then. A buffer that is
filled again too early, or not waited for at the end, gives wrong weights.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from trtc.core.dtypes import to_torch
from trtc.core.errors import EngineError
from trtc.core.safetensors_io import SafetensorsFile, write_file
from trtc.runtime.weight_loading import allocate, chunks, filling

CPU = torch.device("cpu")


class LateStaging:
    """See the module."""

    def __init__(self, nbytes: int, opened: list[LateStaging]) -> None:
        self.memory = memoryview(bytearray(nbytes))
        self.thread = threading.get_ident()
        self.started: list[tuple[int, torch.Tensor]] = []
        self.closed = False
        opened.append(self)

    def copy(self, start: int, target: torch.Tensor) -> None:
        assert threading.get_ident() == self.thread
        self.started.append((start, target))

    def wait(self) -> None:
        for start, target in self.started:
            target.numpy().data[:] = self.memory[start : start + len(target)]
        self.started = []

    def close(self) -> None:
        self.wait()
        self.closed = True


@pytest.fixture
def files(tmp_path: Path) -> Iterator[list[SafetensorsFile]]:
    """Two files, with tensors of odd sizes, of no elements and of no dimensions."""
    torch.manual_seed(0)
    contents = [
        {
            "matrix": torch.randn(37, 11),
            "half": torch.randn(501).half(),
            "bytes": torch.randint(0, 255, (13, 7), dtype=torch.uint8),
            "empty": torch.empty(0, 5),
            "scalar": torch.tensor(3.5),
        },
        {"bias": torch.randn(3).bfloat16(), "float8": torch.randn(8, 3).to(torch.float8_e4m3fn)},
    ]
    opened = []
    for number, tensors in enumerate(contents):
        write_file(tmp_path / f"{number}.safetensors", tensors)
        opened.append(SafetensorsFile(tmp_path / f"{number}.safetensors"))
    yield opened
    for file in opened:
        file.close()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("chunk_bytes", [7, 64, 1000, 1 << 20])
def test_every_byte_arrives(files: list[SafetensorsFile], threads: int, chunk_bytes: int) -> None:
    opened: list[LateStaging] = []
    weights = allocate(files, CPU)
    with filling(
        files,
        weights,
        lambda: LateStaging(chunk_bytes, opened),
        threads=threads,
        chunk_bytes=chunk_bytes,
    ):
        pass
    expected = {name: file.read(name) for file in files for name in file.tensors}
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        found = weights[name]
        assert (found.shape, found.dtype) == (tensor.shape, tensor.dtype)
        raw = [x.reshape(-1).view(torch.uint8) for x in (found, tensor)]
        assert torch.equal(*raw), name
    assert all(staging.closed for staging in opened)
    assert 0 < len(opened) <= 2 * threads, "host memory is that of two buffers a thread"


def test_a_file_is_read_from_its_start_to_its_end_in_large_pieces(files: list[SafetensorsFile]) -> None:
    file = files[0]
    pieces = list(chunks(file, allocate(files, CPU), 100))
    entries = list(file.tensors.values())
    assert [piece.nbytes for piece in pieces[:-1]] == [100] * (len(pieces) - 1)
    place = entries[0].offset
    for piece in pieces:
        assert piece.offset == place
        assert sum(len(target) for _, target in piece.parts) == piece.nbytes
        place += piece.nbytes
    assert place == entries[-1].offset + entries[-1].nbytes


@pytest.mark.parametrize("threads", [1, 3])
def test_a_read_error_in_a_thread_is_the_callers(files: list[SafetensorsFile], threads: int) -> None:
    """The second file has become shorter since it was opened."""
    opened: list[LateStaging] = []
    weights = allocate(files, CPU)
    with files[1].path.open("r+b") as file:
        file.truncate(files[1].path.stat().st_size - 5)
    reading = filling(files, weights, lambda: LateStaging(50, opened), threads=threads, chunk_bytes=50)
    with pytest.raises(EngineError, match=rf"{files[1].path.name}: truncated: ends at byte \d+"), reading:
        pass
    assert opened
    assert all(staging.closed for staging in opened)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("weights")]


def test_an_error_leaves_the_rest_unread(files: list[SafetensorsFile]) -> None:
    """What a buffer raises is raised, and no thread reads on."""
    opened: list[LateStaging] = []

    def broken() -> LateStaging:
        raise MemoryError("no page-locked memory")

    class Unread(SafetensorsFile):
        def read_into(self, offset: int, view: memoryview) -> None:
            raise AssertionError("read although there is no buffer")

    with (
        Unread(files[0].path) as file,
        pytest.raises(MemoryError, match="page-locked"),
        filling([file], allocate(files, CPU), broken, threads=1, chunk_bytes=8),
    ):
        pass
    assert not opened


def test_an_error_of_the_block_ends_the_reading(files: list[SafetensorsFile]) -> None:
    """As when the KV cache does not fit: nobody reads on for weights that nobody will use."""
    opened: list[LateStaging] = []
    held = threading.Event()

    class Held(SafetensorsFile):
        chunks_read = 0

        def read_into(self, offset: int, view: memoryview) -> None:
            Held.chunks_read += 1
            assert held.wait(20)

    def failing() -> None:
        threading.Timer(0.05, held.set).start()
        raise torch.OutOfMemoryError("no room for the KV cache")

    with (
        Held(files[0].path) as file,
        pytest.raises(torch.OutOfMemoryError, match="KV cache"),
        filling([file], allocate(files, CPU), lambda: LateStaging(8, opened), threads=2, chunk_bytes=8),
    ):
        failing()
    assert Held.chunks_read <= 2
    assert all(staging.closed for staging in opened)


def test_no_files_need_no_buffer() -> None:
    with filling([], {}, lambda: pytest.fail("a buffer for nothing")):
        pass


def test_memory_is_allocated_for_each_tensor_by_itself(files: list[SafetensorsFile]) -> None:
    weights = allocate(files, CPU)
    entries = {name: entry for file in files for name, entry in file.tensors.items()}
    for name, tensor in weights.items():
        assert tensor.dtype is to_torch(entries[name].dtype)
        assert tensor.untyped_storage().nbytes() == entries[name].nbytes
