"""The engine directory: what a build leaves behind and a runtime loads.

    engine.json                 graph of every rank, model and build configuration, versions, sha256 of each file
    rank{r}-{n}.safetensors     weights of rank r by the names of its graph's weight nodes, at most FILE_BYTES a file
    rank{r}.*                   what the target compiled for rank r
    kernels.*                   what the target compiled for all ranks alike
    tokenizer.json, ...         text files of the checkpoint, where it had them

`engine.json` carries a digest of itself. An engine that is damaged, cut short, foreign or of another format is refused.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from .config import TARGETS, BuildConfig, ModelConfig
from .engine_files import DESCRIPTION, FORMAT, FORMAT_VERSION, EngineFiles, sha256
from .errors import CheckpointError, EngineError, PluginError, TrtcError
from .graph import Graph
from .ops import op_names
from .plugin_registry import plugins
from .safetensors_io import SafetensorsFile
from .spec import TensorSpec

FILE_BYTES = 1 << 30
"""Weights are spread over files of about this size, so that they are written, hashed and loaded side by side."""


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
    def open(cls, path: str | os.PathLike[str], *, verify: bool = True, rank: int | None = None) -> Engine:
        """Reads and checks an engine directory. Loads the plugins, which may have registered ops that its graphs hold.

        path:   also `EngineFiles`, whose comparison it then waits for: `verify` and `rank` have been said to them.
        verify: also compare the sha256 of every file (sizes are always compared).
        rank:   check only the files of this rank and of all ranks, and with rank 0 those of no rank; only they need to be
            there.
        Raises EngineError naming the file and the reason.
        """
        files = path if isinstance(path, EngineFiles) else EngineFiles(path, verify=verify, rank=rank)
        data = files.description
        where = str(files.folder / DESCRIPTION)
        try:
            engine = cls(
                path=files.folder,
                model=ModelConfig.from_json(data["model"], where),
                build=BuildConfig.from_json(data["build"], where),
                ranks=tuple(map(RankPart.from_json, data["ranks"])),
                files=data["files"],
                trtc_version=data["trtc_version"],
            )
            _require_ops(engine, where)
            for part in engine.ranks:
                part.graph.verify(where)
                unknown = sorted(set(part.weights) - engine.files.keys())
                if unknown:
                    raise EngineError(f"{where}: weights are in {unknown}, which is not among the files")
        except EngineError:
            raise
        except (TrtcError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise EngineError(f"{where}: not an engine of this format: {error}") from None
        if engine.build.target not in TARGETS:
            known = ", ".join(TARGETS)
            raise EngineError(
                f"{where}: built for target {engine.build.target!r}; this is trtc {__version__}, which has {known}"
            )
        if len(engine.ranks) != engine.build.num_ranks:
            raise EngineError(
                f"{where}: holds {len(engine.ranks)} ranks for tp_size {engine.build.tp_size}, "
                f"pp_size {engine.build.pp_size}"
            )
        files.wait()
        return engine

    @contextmanager
    def weight_files(self, rank: int) -> Iterator[list[SafetensorsFile]]:
        """The weight files of `rank`, open. Raises EngineError when they do not fit its graph."""
        part = self.ranks[rank]
        with open_files(self.path / name for name in part.weights) as files:
            stored = {name: entry for file in files for name, entry in file.tensors.items()}
            for node in part.graph.weights:
                found = stored.get(node.name)
                if found is None or TensorSpec(found.dtype, found.shape) != node.outputs[0]:
                    raise EngineError(
                        f"{self.path}: rank {rank} has no weight {node.name!r} of type {node.outputs[0]}"
                    )
            yield files

    def map_weights(self, rank: int) -> dict[str, torch.Tensor]:
        """The weights of `rank`, memory-mapped (read-only). Raises EngineError when they do not fit its graph."""
        with self.weight_files(rank) as files:
            return _map_all(files)


def _require_ops(engine: Engine, where: str) -> None:
    """Loads the plugins. Raises EngineError, saying which is missing, for ops that neither the core nor a plugin has."""
    registry = plugins()
    unknown = {node.op for part in engine.ranks for node in part.graph.nodes} - op_names()
    if not unknown:
        return
    try:
        registry.family(engine.model.family)
        reason = "`trtc plugins` lists those that there are"
    except PluginError as error:
        reason = str(error)
    names = ", ".join(sorted(unknown))
    raise EngineError(
        f"{where}: neither trtc {__version__} nor a plugin that it loaded has the op {names}: {reason}"
    )


@contextmanager
def open_files(paths: Iterable[Path]) -> Iterator[list[SafetensorsFile]]:
    """Safetensors files of an engine. Raises EngineError for a damaged file."""
    with ExitStack() as stack:
        try:
            files = [stack.enter_context(SafetensorsFile(path)) for path in paths]
        except CheckpointError as error:
            raise EngineError(str(error)) from None
        yield files


def map_files(paths: Iterable[Path]) -> dict[str, torch.Tensor]:
    """All tensors of safetensors files, memory-mapped (read-only), by name. Raises EngineError for a damaged file."""
    with open_files(paths) as files:
        return _map_all(files)


def _map_all(files: Iterable[SafetensorsFile]) -> dict[str, torch.Tensor]:
    return {name: file.map(name) for file in files for name in file.tensors}


def describe(
    folder: Path, model: ModelConfig, build: BuildConfig, ranks: Iterable[RankPart], workers: int
) -> dict[str, Any]:
    """The content of engine.json, but its digest, for the files that lie in `folder`."""
    names = sorted(entry.name for entry in folder.iterdir())
    with ThreadPoolExecutor(workers) as pool:
        hashes = list(pool.map(lambda name: sha256(folder / name), names))
    return {
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
