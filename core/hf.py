"""Reading a Hugging Face checkpoint folder: config.json, safetensors or `.bin` weights, in one file or in
shards.

Names and shapes are known without loading data; tensors are read one at a time by positioned reads, so that
the model is never in memory as a whole. `.bin` files are unpickled with torch's weights-only loader: a pickle
with code in it is refused.
"""

from __future__ import annotations

import math
import os
import pickle
import re
import threading
import warnings
import weakref
import zipfile
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch

from .dtypes import DType, from_torch
from .errors import CheckpointError, ConfigError
from .safetensors_io import SafetensorsFile, TensorEntry, read_at
from .strict_json import read_object

SINGLE_SAFETENSORS = "model.safetensors"
SINGLE_BIN = "pytorch_model.bin"
WEIGHT_FILES = (
    SINGLE_SAFETENSORS,
    f"{SINGLE_SAFETENSORS}.index.json",
    SINGLE_BIN,
    f"{SINGLE_BIN}.index.json",
)
"""The accepted ways to keep weights, the preferred one first."""

_OTHER_FRAMEWORKS = {
    "tf_model*.h5": "TensorFlow",
    "flax_model*.msgpack": "Flax",
    "*.gguf": "GGUF",
    "*.onnx": "ONNX",
}
_LFS_POINTER = b"version https://git-lfs"
_ZIP_MAGIC = b"PK\x03\x04"


@dataclass(frozen=True)
class SourceTensor:
    """A tensor of the checkpoint: its type and the file that holds it."""

    dtype: DType
    shape: tuple[int, ...]
    file: str
    offset: int
    """Position in the file, for reading in the order of the disk."""


class WeightFile(Protocol):
    """One file of weights, open."""

    @property
    def tensors(self) -> Mapping[str, TensorEntry]: ...
    def read(self, name: str) -> torch.Tensor: ...
    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor: ...
    def close(self) -> None: ...


class HFCheckpoint:
    """An open checkpoint folder; safe to read from many threads.

    path: the folder.
    config: config.json as it is.
    tensors: name -> SourceTensor.
    """

    def __init__(self, path: Path, files: Mapping[str, WeightFile], locations: Mapping[str, str]) -> None:
        """`locations` maps the name of each tensor to its file; `open` is the usual way in."""
        self.path = path
        self._files = files
        self.tensors = {
            name: SourceTensor(entry.dtype, entry.shape, file, entry.offset)
            for name, file in locations.items()
            for entry in (files[file].tensors[name],)
        }

    @classmethod
    def open(cls, path: Path | str) -> HFCheckpoint:
        """Opens the folder `path`.

        Raises CheckpointError, naming the file and the reason, when the folder, config.json or the weights
        are missing, damaged, of another framework, or hold pickled code.
        """
        path = Path(path)
        _check_folder(path)
        weights = _find_weights(path)
        loaded = LegacyCache()
        if not weights.name.endswith(".index.json"):
            file = _open_weight_file(weights, loaded)
            return cls(path, {weights.name: file}, dict.fromkeys(file.tensors, weights.name))
        locations = _read_index(weights)
        files = {name: _open_weight_file(path / name, loaded) for name in sorted(set(locations.values()))}
        missing = [f"{name} in {file}" for name, file in locations.items() if name not in files[file].tensors]
        if missing:
            raise CheckpointError(
                f"{weights}: names tensors that their shards do not hold: {'; '.join(missing)}"
            )
        return cls(path, files, locations)

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json. Raises CheckpointError when it is missing or not a JSON object."""
        return read_config(self.path)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        """A copy of the tensor `name`."""
        return self._files[self.tensors[name].file].read(name)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """A copy of the rows [start, stop) of the tensor `name`."""
        return self._files[self.tensors[name].file].read_rows(name, start, stop)

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def __enter__(self) -> HFCheckpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# ---- the folder ----------------------------------------------------------------------------------


def read_config(path: Path) -> dict[str, Any]:
    """config.json of the checkpoint folder `path`, which needs to hold no weights.

    Raises CheckpointError when the folder or the file is missing, or the file is not a JSON object.
    """
    _check_folder(path)
    return read_object(path / "config.json", CheckpointError)


def _check_folder(path: Path) -> None:
    if not path.exists():
        raise CheckpointError(f"{path}: no such folder; expected a Hugging Face checkpoint folder")
    if not path.is_dir():
        raise CheckpointError(f"{path}: is a file; expected a Hugging Face checkpoint folder")
    if not (path / "config.json").is_file():
        what = "has no config.json" if any(path.iterdir()) else "is empty"
        raise CheckpointError(f"{path}: {what}; expected a Hugging Face checkpoint folder")


def _find_weights(path: Path) -> Path:
    for name in WEIGHT_FILES:
        if (path / name).is_file():
            return path / name
    for pattern, framework in _OTHER_FRAMEWORKS.items():
        found = next(path.glob(pattern), None)
        if found is not None:
            raise CheckpointError(
                f"{path}: holds only {framework} weights ({found.name}); accepted: {', '.join(WEIGHT_FILES)}"
            )
    raise CheckpointError(f"{path}: holds no weights; accepted: {', '.join(WEIGHT_FILES)}")


def _read_index(index: Path) -> dict[str, str]:
    """Tensor name -> shard file name, of a `*.index.json` whose shards are all there."""
    locations = read_object(index, CheckpointError).get("weight_map")
    if not isinstance(locations, dict) or not locations:
        raise CheckpointError(f"{index}: has no weight_map from tensor names to shard files")
    for name, file in locations.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(
                f"{index}: tensor {name!r} is in {file!r}; expected the name of a file beside it"
            )
    missing = sorted(file for file in set(locations.values()) if not (index.parent / file).is_file())
    if missing:
        raise CheckpointError(f"{index}: names shards that are not there: {', '.join(missing)}")
    return locations


def _open_weight_file(path: Path, loaded: LegacyCache) -> WeightFile:
    try:
        with open(path, "rb") as file:
            start = file.read(len(_LFS_POINTER))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    if start == _LFS_POINTER:
        raise CheckpointError(
            f"{path}: is a git-lfs pointer, not the file itself; run `git lfs pull` in the folder"
        )
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    return ZipBinFile(path) if start.startswith(_ZIP_MAGIC) else LegacyBinFile(path, loaded)


# ---- .bin files ----------------------------------------------------------------------------------


class ZipBinFile:
    """A `.bin` file as torch writes it since 1.6: a zip archive of uncompressed storages.

    The pickle is read with fake storages that know only their place in the file; data is read by position.
    Raises CheckpointError when the archive is damaged, holds pickled code, or something other than tensors.
    """

    def __init__(self, path: Path) -> None:
        # Costs a second to import, and safetensors checkpoints never need it.
        from torch._subclasses.fake_tensor import FakeTensorMode

        self.path = path
        _check_archive(path)
        fakes = _load_state_dict(path, FakeTensorMode())
        self.tensors = {name: _place(path, name, fake) for name, fake in fakes.items()}
        self._strides = {name: fake.stride() for name, fake in fakes.items() if not fake.is_contiguous()}
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._close = weakref.finalize(self, os.close, self._fd)

    def close(self) -> None:
        self._close()
        self._fd = -1

    def read(self, name: str) -> torch.Tensor:
        entry = self.tensors[name]
        if name not in self._strides or 0 in entry.shape:
            return self._read_at(name, entry.offset, entry.shape)
        strides = self._strides[name]
        span = 1 + sum((size - 1) * stride for size, stride in zip(entry.shape, strides, strict=True))
        return self._read_at(name, entry.offset, (span,)).as_strided(entry.shape, strides)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        if name in self._strides:
            return self.read(name)[start:stop]
        entry = self.tensors[name]
        row_bytes = math.prod(entry.shape[1:]) * entry.dtype.itemsize
        return self._read_at(name, entry.offset + start * row_bytes, (stop - start, *entry.shape[1:]))

    def _read_at(self, name: str, offset: int, shape: tuple[int, ...]) -> torch.Tensor:
        return read_at(self._fd, offset, self.tensors[name].dtype, shape, f"{self.path}: tensor {name!r}")


class LegacyBinFile:
    """A `.bin` file from before torch 1.6: one pickle stream, which can only be loaded as a whole.

    loaded: cache shared by the shards of a checkpoint, so that few of them are in memory at a time.
    Raises CheckpointError as ZipBinFile does.
    """

    def __init__(self, path: Path, loaded: LegacyCache) -> None:
        self.path = path
        self._loaded = loaded
        tensors = loaded.load(path)
        self.tensors = {
            name: TensorEntry(_dtype(path, name, tensor), tuple(tensor.shape), index, tensor.nbytes)
            for index, (name, tensor) in enumerate(tensors.items())
        }

    def close(self) -> None:
        self._loaded.clear()

    def read(self, name: str) -> torch.Tensor:
        return self._loaded.load(self.path)[name].clone()

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._loaded.load(self.path)[name][start:stop].clone()


class LegacyCache:
    """The legacy shards in memory: the two used last, since parallel readers stand on both sides of a shard's
    end.
    """

    SIZE = 2

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._shards: dict[Path, dict[str, torch.Tensor]] = {}

    def load(self, path: Path) -> dict[str, torch.Tensor]:
        with self._lock:
            if path in self._shards:
                self._shards[path] = self._shards.pop(path)
                return self._shards[path]
            while len(self._shards) >= self.SIZE:
                del self._shards[next(iter(self._shards))]
            self._shards[path] = _load_state_dict(path, nullcontext())
            return self._shards[path]

    def clear(self) -> None:
        with self._lock:
            self._shards.clear()


def _check_archive(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            compressed = [
                entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED
            ]
    except (zipfile.BadZipFile, OSError) as error:
        raise CheckpointError(f"{path}: truncated or damaged: {error}") from None
    if compressed:
        raise CheckpointError(
            f"{path}: is a compressed archive ({compressed[0]}); expected a file of torch.save"
        )


def _load_state_dict(path: Path, mode: AbstractContextManager[Any]) -> dict[str, torch.Tensor]:
    """The tensors of a `.bin` file, loaded under `mode`."""
    try:
        with mode, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: {_unpickling_problem(str(error))}") from None
    except Exception as error:  # noqa: BLE001 - bytes that are no pickle make the loader fail in any way
        reason = type(error).__name__
        raise CheckpointError(f"{path}: truncated, damaged, or not a file of torch.save ({reason})") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: holds a {type(state).__name__}; expected a dict of tensors")
    for name, tensor in state.items():
        if not isinstance(name, str):
            raise CheckpointError(
                f"{path}: entry {name!r} is named by {type(name).__name__}; expected names as text"
            )
        kind = str(tensor.layout) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        if kind != str(torch.strided):
            raise CheckpointError(f"{path}: entry {name!r} is of the kind {kind}; expected a dense tensor")
    return state


def _unpickling_problem(message: str) -> str:
    found = re.search(r"GLOBAL (\S+)", message)
    if found is None:
        return (
            "not a file of torch.save, or of a kind that weights-only loading does not read; use safetensors"
        )
    return f"refused: its pickle holds code ({found[1]}), not only tensors; use a safetensors version"


def _place(path: Path, name: str, fake: torch.Tensor) -> TensorEntry:
    """Where the data of a tensor lies that was loaded under FakeTensorMode."""
    dtype = _dtype(path, name, fake)
    # Set by torch.load under FakeTensorMode on every storage it makes.
    storage_offset = fake.untyped_storage()._checkpoint_offset
    assert storage_offset is not None, f"{path}: {name}: torch.load gave no offset"
    offset = storage_offset + int(fake.storage_offset()) * dtype.itemsize
    return TensorEntry(dtype, tuple(fake.shape), offset, fake.numel() * dtype.itemsize)


def _dtype(path: Path, name: str, tensor: torch.Tensor) -> DType:
    try:
        return from_torch(tensor.dtype)
    except ConfigError as error:
        raise CheckpointError(f"{path}: tensor {name!r}: {error}") from None
