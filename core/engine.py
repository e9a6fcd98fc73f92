"""The engine directory: what a build leaves behind and a runtime loads.

    engine.json                 graph of every rank, model and build configuration, versions, sha256 of each file
    rank{r}-{n}.safetensors     weights of rank r by the names of its graph's weight nodes, at most FILE_BYTES a file
    rank{r}.*                   what the target compiled for rank r
    kernels.*                   what the target compiled for all ranks alike
    tokenizer.json, ...         text files of the checkpoint, where it had them

`engine.json` carries a digest of itself. An engine that is damaged, cut short, foreign or of another format is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from .config import BuildConfig, ModelConfig
from .dtypes import from_torch
from .errors import CheckpointError, EngineError, TrtcError
from .graph import Graph
from .safetensors_io import SafetensorsFile
from .spec import TensorSpec
from .strict_json import read_object

FORMAT = "trtc-engine"
FORMAT_VERSION = 1
DESCRIPTION = "engine.json"
FILE_BYTES = 1 << 30
"""Weights are spread over files of about this size, so that they are written, hashed and loaded side by side."""
_KEYS = {"format", "format_version", "trtc_version", "model", "build", "ranks", "files", "digest"}
_HASH_BLOCK = 4 << 20


@dataclass(frozen=True)
class RankPart:
    """One rank's share of an engine."""

    graph: Graph
    weights: tuple[str, ...]
    """Names of its weight files."""
    artifacts: Mapping[str, Any]
    """What the target's `compile` returned."""

    def to_json(self) -> dict[str, Any]:
        return {
            "graph": self.graph.to_json(),
            "weights": list(self.weights),
            "artifacts": dict(self.artifacts),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RankPart:
        return cls(Graph.from_json(data["graph"]), tuple(data["weights"]), dict(data["artifacts"]))


@dataclass(frozen=True)
class Engine:
    """An engine directory, checked. `path` holds its files."""

    path: Path
    model: ModelConfig
    build: BuildConfig
    ranks: tuple[RankPart, ...]
    files: Mapping[str, Mapping[str, Any]]
    trtc_version: str

    @classmethod
    def open(cls, path: Path | str, *, verify: bool = True, rank: int | None = None) -> Engine:
        """Reads and checks an engine directory.

        verify: also compare the sha256 of every file (sizes are always compared).
        rank:   check only the files of this rank and of all ranks, and with rank 0 those of no rank; only they need to be
            there.
        Raises EngineError naming the file and the reason.
        """
        folder = Path(path)
        data = _read_description(folder)
        where = str(folder / DESCRIPTION)
        try:
            engine = cls(
                path=folder,
                model=ModelConfig.from_json(data["model"], where),
                build=BuildConfig.from_json(data["build"], where),
                ranks=tuple(map(RankPart.from_json, data["ranks"])),
                files=data["files"],
                trtc_version=data["trtc_version"],
            )
            for part in engine.ranks:
                part.graph.verify(where)
        except (TrtcError, KeyError, TypeError, AttributeError) as error:
            raise EngineError(f"{where}: not an engine of this format: {error}") from None
        if len(engine.ranks) != engine.build.num_ranks:
            raise EngineError(
                f"{where}: holds {len(engine.ranks)} ranks for tp_size {engine.build.tp_size}, "
                f"pp_size {engine.build.pp_size}"
            )
        needed = {
            name: entry for name, entry in engine.files.items() if rank is None or _needed_by(name, rank)
        }
        _check_files(folder, needed, hashes=verify)
        return engine

    def map_weights(self, rank: int) -> dict[str, torch.Tensor]:
        """The weights of `rank`, memory-mapped (read-only). Raises EngineError when they do not fit its graph."""
        part = self.ranks[rank]
        mapped = map_files(self.path / name for name in part.weights)
        for node in part.graph.weights:
            found = mapped.get(node.name)
            if found is None or TensorSpec(from_torch(found.dtype), tuple(found.shape)) != node.outputs[0]:
                raise EngineError(
                    f"{self.path}: rank {rank} has no weight {node.name!r} of type {node.outputs[0]}"
                )
        return mapped


def map_files(paths: Iterable[Path]) -> dict[str, torch.Tensor]:
    """All tensors of safetensors files, memory-mapped (read-only), by name. Raises EngineError for a damaged file."""
    mapped: dict[str, torch.Tensor] = {}
    for path in paths:
        try:
            with SafetensorsFile(path) as file:
                mapped |= {tensor: file.map(tensor) for tensor in file.tensors}
        except CheckpointError as error:
            raise EngineError(str(error)) from None
    return mapped


def describe(
    folder: Path, model: ModelConfig, build: BuildConfig, ranks: Iterable[RankPart], workers: int
) -> dict[str, Any]:
    """The content of engine.json for the files that lie in `folder`."""
    names = sorted(entry.name for entry in folder.iterdir())
    with ThreadPoolExecutor(workers) as pool:
        hashes = list(pool.map(lambda name: sha256(folder / name), names))
    data = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "trtc_version": __version__,
        "model": model.base().to_json(),
        "build": build.to_json(),
        "ranks": [part.to_json() for part in ranks],
        "files": {
            name: {"bytes": (folder / name).stat().st_size, "sha256": digest}
            for name, digest in zip(names, hashes, strict=True)
        },
    }
    return data | {"digest": _digest(data)}


def write_description(folder: Path, data: Mapping[str, Any]) -> None:
    (folder / DESCRIPTION).write_text(_text(data))


def _text(data: Mapping[str, Any]) -> str:
    return json.dumps(data, separators=(",", ":")) + "\n"


def is_engine(path: Path) -> bool:
    """Whether `path` looks like an engine directory (whole or not): what a build may replace."""
    try:
        return read_object(path / DESCRIPTION, EngineError).get("format") == FORMAT
    except EngineError:
        return False


def sha256(path: Path) -> str:
    """Hex digest of a file, as sha256sum prints it."""
    state = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(_HASH_BLOCK):
            state.update(block)
    return state.hexdigest()


def _digest(data: Mapping[str, Any]) -> str:
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION
    if not folder.is_dir():
        raise EngineError(f"{folder}: no such folder; `trtc build` makes an engine directory")
    if not path.is_file():
        raise EngineError(
            f"{folder}: not an engine directory: it has no {DESCRIPTION}; `trtc build` makes one"
        )
    data = read_object(path, EngineError)
    if data.get("format") != FORMAT:
        raise EngineError(f"{path}: format is {data.get('format')!r}, not {FORMAT!r}: not an engine of trtc")
    if data.get("format_version") != FORMAT_VERSION:
        raise EngineError(
            f"{path}: written by trtc {data.get('trtc_version', '(unknown)')} in engine format "
            f"{data.get('format_version')!r}; this is trtc {__version__}, which reads format {FORMAT_VERSION}; "
            f"build the engine again"
        )
    if data.keys() != _KEYS:
        raise EngineError(f"{path}: keys are {sorted(data)}, expected {sorted(_KEYS)}")
    # Compared as text too: `1E-05` for `1e-05`, or another last digit, can be the same value.
    if path.read_bytes() != _text(data).encode() or data.pop("digest") != _digest(data):
        raise EngineError(f"{path}: content does not match its digest: the file was damaged or edited")
    return data


def _needed_by(name: str, rank: int) -> bool:
    """Whether a rank needs a file; what belongs to no rank is rank 0's."""
    found = re.match(r"rank(\d+)[-.]", name)
    return name.startswith("kernels.") or rank == (int(found[1]) if found else 0)


def _check_files(folder: Path, files: Mapping[str, Mapping[str, Any]], *, hashes: bool) -> None:
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            raise EngineError(f"{path}: file of the engine is missing")
        if path.stat().st_size != entry["bytes"]:
            raise EngineError(
                f"{path}: has {path.stat().st_size} bytes, expected {entry['bytes']}: truncated or replaced"
            )
    if not hashes:
        return
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        found = pool.map(lambda name: (name, sha256(folder / name)), files)
        for name, digest in found:
            if digest != files[name]["sha256"]:
                raise EngineError(f"{folder / name}: content does not match its sha256: the file is damaged")
