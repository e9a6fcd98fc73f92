"""Reading and writing safetensors files: a strict header, positioned reads, memory maps, and parallel writes.

Format (https://github.com/huggingface/safetensors): 8 bytes little-endian header length, a JSON header
`{name: {dtype, shape, data_offsets}}`, the data without holes. The official library reads what we write. Ours
exists because conversion needs what it does not offer: reads that do not go through a memory map (mapped
pages would count as resident memory) and a writer that knows the header in advance and is filled tensor by
tensor from many threads. Header and bytes need no torch, which is imported where tensors are made.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import threading
import warnings
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .dtypes import DType, from_torch, to_torch
from .errors import CheckpointError
from .strict_json import parse_object

if TYPE_CHECKING:
    import torch

MAX_HEADER_BYTES = 100_000_000
"""The limit of the official library."""

DATA_ALIGNMENT = 64
"""The data of files we write starts at a multiple of this many bytes, so that maps suit vector loads."""

_CODES = {
    DType.FLOAT32: "F32",
    DType.FLOAT16: "F16",
    DType.BFLOAT16: "BF16",
    DType.FLOAT8_E4M3: "F8_E4M3",
    DType.INT64: "I64",
    DType.INT32: "I32",
    DType.INT8: "I8",
    DType.UINT8: "U8",
    DType.BOOL: "BOOL",
}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}


class TensorEntry(NamedTuple):
    """Where a tensor lies: `offset` and `nbytes` count bytes in the file."""

    dtype: DType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


# ---- header --------------------------------------------------------------------------------------


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of the safetensors file `path`, by name, in file order.

    Raises CheckpointError, naming the file and the reason, unless the header is well-formed and the tensors
    fill the rest of the file without holes or overlaps.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            return _parse_header(file, size, str(path))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None


def _parse_header(file: Any, file_size: int, where: str) -> dict[str, TensorEntry]:
    prefix = file.read(8)
    if len(prefix) < 8:
        raise CheckpointError(f"{where}: not a safetensors file: {file_size} bytes are too few for a header")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES or 8 + length > file_size:
        raise CheckpointError(
            f"{where}: not a safetensors file, or truncated: header of {length} bytes, file of {file_size}"
        )
    fields = parse_object(file.read(length), f"{where}: header", CheckpointError)
    _check_metadata(fields.pop("__metadata__", {}), where)
    start = 8 + length
    tensors = {name: _check_entry(name, value, start, where) for name, value in fields.items()}
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)))
    _check_layout(tensors, start, file_size, where)
    return tensors


def _check_metadata(value: object, where: str) -> None:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise CheckpointError(f"{where}: header: __metadata__ must map strings to strings")


def _check_entry(name: str, value: object, start: int, where: str) -> TensorEntry:
    """One tensor of the header; `start` is where the data begins in the file."""
    tensor = f"{where}: header: tensor {name!r}"
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{tensor} must have exactly the keys dtype, shape, data_offsets")
    code, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(code, str) or code not in _DTYPES:
        raise CheckpointError(f"{tensor} has the dtype {code!r}; accepted: {', '.join(_DTYPES)}")
    if not _are_sizes(shape):
        raise CheckpointError(f"{tensor} has the shape {shape!r}; expected a list of whole numbers >= 0")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{tensor} has the data_offsets {offsets!r}; expected [begin, end]")
    dtype, nbytes = _DTYPES[code], offsets[1] - offsets[0]
    if nbytes != math.prod(shape) * dtype.itemsize:
        raise CheckpointError(f"{tensor}: {nbytes} bytes of data do not fit {code} {shape}")
    return TensorEntry(dtype, tuple(shape), start + offsets[0], nbytes)


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_layout(tensors: Mapping[str, TensorEntry], start: int, file_size: int, where: str) -> None:
    """`tensors` in file order must cover [start, file_size) exactly."""
    end = start
    for name, entry in tensors.items():
        if entry.offset != end:
            what = "overlaps the one before it" if entry.offset < end else "leaves a hole before it"
            raise CheckpointError(f"{where}: header: tensor {name!r} {what}")
        end += entry.nbytes
    if end != file_size:
        what = "truncated" if end > file_size else "has bytes after the last tensor"
        raise CheckpointError(f"{where}: {what}: the header asks for {end} bytes, the file has {file_size}")


# ---- positioned input and output -----------------------------------------------------------------


def read_at(fd: int, offset: int, dtype: DType, shape: tuple[int, ...], where: str) -> torch.Tensor:
    """A fresh tensor filled from `offset` of an open file. Raises CheckpointError when the file ends
    early.
    """
    import torch

    tensor = torch.empty(shape, dtype=to_torch(dtype))
    _fill(fd, offset, _bytes_of(tensor), where)
    return tensor


def _fill(fd: int, offset: int, view: memoryview, where: str) -> None:
    done = 0
    while done < len(view):
        try:
            count = os.preadv(fd, [view[done:]], offset + done)
        except OSError as error:
            raise CheckpointError(f"{where}: cannot be read: {error.strerror}") from None
        if count == 0:
            raise CheckpointError(f"{where}: truncated: ends at byte {offset + done}")
        done += count


def _write_at(fd: int, offset: int, tensor: torch.Tensor) -> None:
    view = _bytes_of(tensor.contiguous())
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], offset + done)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    import torch

    return tensor.reshape(-1).view(torch.uint8).numpy().data


class SafetensorsFile:
    """An open safetensors file; safe to read from many threads.

    tensors: name -> (dtype, shape, offset, nbytes), in file order.
    Raises CheckpointError as `read_header` does.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors = read_header(path)
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._close = weakref.finalize(self, os.close, self._fd)
        self._lock = threading.Lock()
        self._mapped: torch.Tensor | None = None

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file. Tensors that `map` gave stay valid."""
        self._close()
        self._fd = -1

    def read(self, name: str) -> torch.Tensor:
        """A copy of the tensor `name`."""
        entry = self._entry(name)
        return read_at(self._fd, entry.offset, entry.dtype, entry.shape, f"{self.path}: tensor {name!r}")

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """A copy of the rows [start, stop) of the tensor `name`."""
        entry = self._entry(name)
        row_bytes = math.prod(entry.shape[1:]) * entry.dtype.itemsize
        shape = (stop - start, *entry.shape[1:])
        where = f"{self.path}: tensor {name!r}"
        return read_at(self._fd, entry.offset + start * row_bytes, entry.dtype, shape, where)

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fills `view` with the bytes of the file from `offset` on, whatever tensors they belong to."""
        _fill(self._fd, offset, view, str(self.path))

    def map(self, name: str) -> torch.Tensor:
        """The tensor `name` as a view of the memory-mapped file. Must not be written to: the pages are
        read-only.

        A tensor that lies at an address its dtype does not allow is copied instead.
        """
        entry = self._entry(name)
        data = self._map_file()[entry.offset : entry.offset + entry.nbytes]
        if entry.offset % entry.dtype.itemsize:
            data = data.clone()
        return data.view(to_torch(entry.dtype)).reshape(entry.shape)

    def _entry(self, name: str) -> TensorEntry:
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.path}: holds no tensor {name!r}") from None

    def _map_file(self) -> torch.Tensor:
        """The whole file as bytes, mapped at the first call."""
        import torch

        with self._lock:
            if self._mapped is None:
                mapped = mmap.mmap(self._fd, 0, access=mmap.ACCESS_READ)
                with warnings.catch_warnings():
                    # torch cannot mark a tensor read-only and says so; `map` documents it.
                    warnings.filterwarnings("ignore", message="The given buffer is not writable")
                    self._mapped = torch.frombuffer(mapped, dtype=torch.uint8)
            return self._mapped


class SafetensorsWriter:
    """Writes a safetensors file whose tensors are known in advance; the data may come in any order, from any
    thread.

    specs: name -> (dtype, shape).
    Raises CheckpointError when the file cannot be created or written.

    Tensors lie by falling element size, then in the order of `specs`: this keeps each of them aligned.
    """

    def __init__(self, path: Path, specs: Mapping[str, tuple[DType, tuple[int, ...]]]) -> None:
        self.path = path
        header, self.tensors, size = _lay_out(specs)
        self._lock = threading.Lock()
        self._missing = {name: entry.nbytes for name, entry in self.tensors.items()}
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
            self._close = weakref.finalize(self, os.close, self._fd)
            os.ftruncate(self._fd, size)
            os.pwrite(self._fd, header, 0)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be written: {error.strerror}") from None
        except OverflowError:
            raise CheckpointError(f"{path}: cannot be written: no file can have {size} bytes") from None

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        if exc_type is None:
            self.close()
        else:
            self._close()

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Writes the whole tensor `name`."""
        self.write_rows(name, 0, tensor)

    def write_rows(self, name: str, start: int, tensor: torch.Tensor) -> None:
        """Writes `tensor` as the rows [start, start + len(tensor)) of the tensor `name`. Each row is written
        once.
        """
        entry = self.tensors[name]
        assert from_torch(tensor.dtype) is entry.dtype, f"{name}: {tensor.dtype}, expected {entry.dtype}"
        assert tensor.shape[1:] == entry.shape[1:], (
            f"{name}: {list(tensor.shape)} are not rows of {list(entry.shape)}"
        )
        nbytes = tensor.numel() * entry.dtype.itemsize
        begin = start * math.prod(entry.shape[1:]) * entry.dtype.itemsize
        assert 0 <= begin <= begin + nbytes <= entry.nbytes, (
            f"{name}: row {start} is beyond {list(entry.shape)}"
        )
        try:
            _write_at(self._fd, entry.offset + begin, tensor)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be written: {error.strerror}") from None
        with self._lock:
            self._missing[name] -= nbytes

    def close(self) -> None:
        """Flushes the file to the disk and closes it. Every byte must have been written."""
        incomplete = [name for name, nbytes in self._missing.items() if nbytes]
        assert not incomplete, f"{self.path}: not written completely: {', '.join(incomplete)}"
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be written: {error.strerror}") from None
        finally:
            self._close()


def write_file(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes tensors that are at hand to a safetensors file."""
    specs = {name: (from_torch(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()}
    with SafetensorsWriter(path, specs) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def _lay_out(
    specs: Mapping[str, tuple[DType, tuple[int, ...]]],
) -> tuple[bytes, dict[str, TensorEntry], int]:
    """(header with its length prefix, tensors, size of the file)."""
    ordered = sorted(specs.items(), key=lambda item: -item[1][0].itemsize)
    fields: dict[str, Any] = {}
    relative: dict[str, TensorEntry] = {}
    end = 0
    for name, (dtype, shape) in ordered:
        nbytes = math.prod(shape) * dtype.itemsize
        relative[name] = TensorEntry(dtype, shape, end, nbytes)
        fields[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [end, end + nbytes]}
        end += nbytes
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % DATA_ALIGNMENT)
    start = 8 + len(text)
    tensors = {name: entry._replace(offset=start + entry.offset) for name, entry in relative.items()}
    return len(text).to_bytes(8, "little") + text, tensors, start + end
