"""Weights on their way to a GPU. Oracle: the tensors as the file's own reader gives them.

The stand-in for the driver copies as late as it may: when a stream is waited for, from what the buffer holds then. A buffer
that is filled again too early, or not waited for at the end, gives wrong weights.
"""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from trtc.core.errors import EngineError
from trtc.core.safetensors_io import SafetensorsFile, write_file
from trtc.kernels import launch, memory
from trtc.kernels.errors import DeviceError
from trtc.kernels.memory import DeviceMemory, PinnedBuffer
from trtc.runtime import weight_loading
from trtc.runtime.weight_loading import EarlyWeights, Filling, allocate, chunks
from trtc.tests.driver_stand_in import DriverStandIn

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> DriverStandIn:
    driver = DriverStandIn()
    for module in (memory, launch):
        monkeypatch.setattr(module, "driver", lambda: driver)
    for module in (memory, weight_loading):
        monkeypatch.setattr(module, "primary_context", lambda device=0: "context")
    return driver


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


def addresses(weights: Mapping[str, torch.Tensor]) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in weights.items()}


def check_equal(weights: Mapping[str, torch.Tensor], files: list[SafetensorsFile]) -> None:
    expected = {name: file.read(name) for file in files for name in file.tensors}
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        found = weights[name]
        assert (found.shape, found.dtype) == (tensor.shape, tensor.dtype)
        raw = [x.reshape(-1).view(torch.uint8) for x in (found, tensor)]
        assert torch.equal(*raw), name


def loaders() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name in ("weights", "early-weights")]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("chunk_bytes", [7, 64, 1000, 1 << 20])
def test_every_byte_arrives(
    driver: DriverStandIn, files: list[SafetensorsFile], threads: int, chunk_bytes: int
) -> None:
    weights = allocate(files, CPU)
    with Filling(
        files,
        addresses(weights),
        lambda: PinnedBuffer(chunk_bytes),
        threads=threads,
        chunk_bytes=chunk_bytes,
    ):
        pass
    check_equal(weights, files)
    assert not driver.pinned and not driver.streams
    assert 0 < driver.most_pinned <= 2 * threads * chunk_bytes, "host memory is that of two buffers a thread"


def test_a_file_is_read_from_its_start_to_its_end_in_large_pieces(files: list[SafetensorsFile]) -> None:
    file = files[0]
    pieces = list(chunks(file, addresses(allocate(files, CPU)), 100))
    entries = list(file.tensors.values())
    assert [piece.nbytes for piece in pieces[:-1]] == [100] * (len(pieces) - 1)
    place = entries[0].offset
    for piece in pieces:
        assert piece.offset == place
        assert sum(part.nbytes for part in piece.parts) == piece.nbytes
        place += piece.nbytes
    assert place == entries[-1].offset + entries[-1].nbytes


@pytest.mark.parametrize("threads", [1, 3])
def test_a_read_error_in_a_thread_is_the_callers(
    driver: DriverStandIn, files: list[SafetensorsFile], threads: int
) -> None:
    """The second file has become shorter since it was opened."""
    weights = allocate(files, CPU)
    with files[1].path.open("r+b") as file:
        file.truncate(files[1].path.stat().st_size - 5)
    filling = Filling(files, addresses(weights), lambda: PinnedBuffer(50), threads=threads, chunk_bytes=50)
    with pytest.raises(EngineError, match=rf"{files[1].path.name}: truncated: ends at byte \d+"):
        filling.wait()
    assert not driver.pinned and not driver.streams
    assert not loaders()


def test_an_error_leaves_the_rest_unread(driver: DriverStandIn, files: list[SafetensorsFile]) -> None:
    """What a buffer raises is raised, and no thread reads on."""
    driver.refuse = "cuMemHostAlloc"

    class Unread(SafetensorsFile):
        def read_into(self, offset: int, view: memoryview) -> None:
            raise AssertionError("read although there is no buffer")

    with Unread(files[0].path) as file:
        filling = Filling([file], addresses(allocate(files, CPU)), lambda: PinnedBuffer(8), chunk_bytes=8)
        with pytest.raises(DeviceError, match="page-locked memory: CUDA_ERROR_OUT_OF_MEMORY"):
            filling.wait()


def test_an_error_of_the_block_ends_the_reading(driver: DriverStandIn, files: list[SafetensorsFile]) -> None:
    """As when the KV cache does not fit: nobody reads on for weights that nobody will use."""
    held = threading.Event()

    class Held(SafetensorsFile):
        chunks_read = 0

        def read_into(self, offset: int, view: memoryview) -> None:
            Held.chunks_read += 1
            assert held.wait(20)

    def failing() -> None:
        threading.Timer(0.05, held.set).start()
        raise torch.OutOfMemoryError("no room for the KV cache")

    weights = allocate(files, CPU)
    with (
        Held(files[0].path) as file,
        pytest.raises(torch.OutOfMemoryError, match="KV cache"),
        Filling([file], addresses(weights), lambda: PinnedBuffer(8), threads=2, chunk_bytes=8),
    ):
        failing()
    assert Held.chunks_read <= 2
    assert not driver.pinned


def test_no_files_need_no_buffer() -> None:
    with Filling([], {}, lambda: pytest.fail("a buffer for nothing")):
        pass


def test_memory_is_allocated_for_each_tensor_by_itself(files: list[SafetensorsFile]) -> None:
    weights = allocate(files, CPU)
    entries = {name: entry for file in files for name, entry in file.tensors.items()}
    for name, tensor in weights.items():
        assert tensor.untyped_storage().nbytes() == entries[name].nbytes


# ---- before torch is there


@pytest.fixture
def as_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch makes of memory on a GPU, for the stand-in's: a tensor that keeps it."""

    def tensor_over(held: DeviceMemory, device: torch.device) -> torch.Tensor:
        (nbytes,), (address, read_only) = (
            held.__cuda_array_interface__["shape"],
            held.__cuda_array_interface__["data"],
        )
        assert device == GPU and not read_only and held.__cuda_array_interface__["typestr"] == "|u1"
        block = (ctypes.c_ubyte * nbytes).from_address(address)
        block.owner = held
        return torch.frombuffer(block, dtype=torch.uint8)

    monkeypatch.setattr(torch, "as_tensor", tensor_over)


def test_early_weights_are_the_weights(
    driver: DriverStandIn, files: list[SafetensorsFile], as_tensor: None
) -> None:
    """The tensors keep their memory, each its own; the driver gets it back with the last of them."""
    early = EarlyWeights([file.path for file in files])
    weights = early.tensors(GPU)
    assert weights is not None
    check_equal(weights, files)
    assert not driver.pinned and not loaders()
    assert len(driver.device) == len(weights)
    del weights["matrix"]
    assert len(driver.device) == len(weights)
    del weights
    gc.collect()
    assert not driver.device


@pytest.mark.parametrize("refuse", ["cuMemAlloc", "cuMemHostAlloc", "cuMemcpyHtoDAsync"])
def test_what_does_not_work_early_is_left_to_be_tried_again(
    driver: DriverStandIn, files: list[SafetensorsFile], refuse: str
) -> None:
    driver.refuse = refuse
    early = EarlyWeights([file.path for file in files])
    assert early.tensors(GPU) is None
    assert not driver.device, "no room for those that are loaded again"
    assert not driver.pinned and not loaders()


def test_without_a_gpu_or_files_there_are_no_early_weights(
    driver: DriverStandIn, files: list[SafetensorsFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert EarlyWeights([files[0].path.with_name("none")]).tensors(GPU) is None
    assert EarlyWeights([files[0].path]).tensors(torch.device("cuda", 1)) is None

    def no_gpu() -> None:
        raise DeviceError("no CUDA driver on this machine")

    monkeypatch.setattr(weight_loading, "primary_context", no_gpu)
    assert EarlyWeights([files[0].path]).tensors(GPU) is None
    assert not driver.device


def test_nobody_loads_for_an_owner_that_is_gone(
    driver: DriverStandIn, files: list[SafetensorsFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a command line turns out to be wrong."""
    read, reading, stopped = [], threading.Event(), threading.Event()
    stop = Filling.stop

    def noted_stop(filling: Filling) -> None:
        stop(filling)
        stopped.set()

    def read_into(file: SafetensorsFile, offset: int, view: memoryview) -> None:
        read.append(offset)
        reading.set()
        assert stopped.wait(20)

    monkeypatch.setattr(Filling, "stop", noted_stop)
    monkeypatch.setattr(SafetensorsFile, "read_into", read_into)
    monkeypatch.setattr(weight_loading, "EARLY_THREADS", 2)
    monkeypatch.setattr(weight_loading, "EARLY_CHUNK_BYTES", 8)
    early = EarlyWeights([file.path for file in files])
    assert reading.wait(20)
    del early
    gc.collect()
    assert not loaders()
    assert len(read) <= 2
    assert not driver.pinned and not driver.device
