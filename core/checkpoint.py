"""The trtc checkpoint: a converted, sharded model on disk.

    config.json           format, versions, the model's configuration, sharding, aliases, size and sha256 of each file;
                          of a quantized checkpoint, how and which weights (`core.quantize.scheme.Quantization`)
    rank{r}.safetensors   the weights of rank r of tp_size, by our names, of all layers; a quantized one as integers
                          and `.scale`
    tokenizer files       copied along, with a tokenizer.json

`convert` writes one from a Hugging Face checkpoint; `TrtcCheckpoint` reads it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import __version__
from .atomic import atomic_directory
from .dtypes import DType
from .engine_files import sha256
from .errors import CheckpointError, ConfigError
from .hf import HFCheckpoint
from .quantize.scheme import Quantization
from .quantize.source import Quantizer
from .safetensors_io import SafetensorsFile, SafetensorsWriter, TensorEntry
from .sharding import ShardingOptions
from .strict_json import read_object
from .text_files import copy_text_files
from .weight_source import Convertible, DummyWeights, HFWeights, WeightSource, cut_block
from .weights import Shape, WeightTable

if TYPE_CHECKING:
    from .config import ModelConfig

__all__ = [
    "DummyWeights",
    "HFWeights",
    "TrtcCheckpoint",
    "WeightSource",
    "convert",
    "is_checkpoint",
]

FORMAT = "trtc-checkpoint"
FORMAT_VERSION = 1

Progress = Callable[[int, int, str], None]
"""Called with (weights done, weights in all, name of the one just done)."""

_KEYS = {"format", "format_version", "trtc_version", "model", "hf_config", "sharding", "aliases", "files"}
_OPTIONAL_KEYS = {"quantization"}


# ---- writing -------------------------------------------------------------------------------------


def convert(
    source: HFCheckpoint,
    table: WeightTable,
    config: ModelConfig,
    output_dir: Path,
    *,
    dtype: DType,
    sharding: ShardingOptions,
    workers: int = 1,
    progress: Progress | None = None,
    quantize: Quantizer | None = None,
) -> None:
    """Writes the trtc checkpoint of `source` to the folder `output_dir`, which appears complete or not at all.

    table, config: of the family that owns the model.
    workers: threads that read, convert and write; memory grows by about one block of rows for each, or by one
        whole tensor where the table transforms it.
    progress: called from this thread after every weight.
    quantize: what makes quantized weights of float ones; see `core.quantize.source.nearest`.
    Raises CheckpointError when tensors do not fit or tokenizer files cannot be read, ConfigError when tensors cannot be split
    over the ranks or quantized, when `workers` is not positive, or when `output_dir` is a folder that trtc did not write.
    """
    if workers < 1:
        raise ConfigError(f"workers is {workers}; accepted: a whole number >= 1")
    sharding.check_layers(config.num_layers)
    floats = HFWeights(source, table, config, dtype=dtype, sharding=sharding)
    weights = floats if quantize is None else quantize(floats)
    with atomic_directory(output_dir, is_checkpoint, seal="config.json") as folder:
        copy_text_files(source.path, folder)  # first: files that cannot be read cost no time
        _write_ranks(weights, folder, workers, progress)
        description = _describe(dataclasses.replace(config, dtype=dtype), source.config, weights, folder)
        (folder / "config.json").write_text(json.dumps(description, indent=2) + "\n")


def _write_ranks(weights: Convertible, folder: Path, workers: int, progress: Progress | None) -> None:
    ranks = range(weights.sharding.tp_size)
    names = sorted(weights.owners(), key=weights.location)
    with ExitStack() as stack:
        writers = [stack.enter_context(_open_writer(weights, folder, rank)) for rank in ranks]
        pool = stack.enter_context(ThreadPoolExecutor(workers))
        futures = {pool.submit(_write_weight, weights, writers, name): name for name in names}
        try:
            for done, future in enumerate(as_completed(futures), start=1):
                future.result()
                if progress is not None:
                    progress(done, len(names), futures[future])
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _open_writer(weights: WeightSource, folder: Path, rank: int) -> SafetensorsWriter:
    specs = {name: (weights.dtype(rank, name), weights.shape(rank, name)) for name in weights.names(rank)}
    return SafetensorsWriter(folder / _rank_file(rank), specs)


def _write_weight(weights: Convertible, writers: list[SafetensorsWriter], name: str) -> None:
    for start, stored in weights.stored_blocks(name):
        for tensor, block in stored.items():
            for rank, writer in enumerate(writers):
                cut = cut_block(start, block, weights.part(rank, tensor))
                if cut is not None:
                    writer.write_rows(tensor, *cut)


def _describe(
    config: ModelConfig, hf_config: Mapping[str, Any], weights: WeightSource, folder: Path
) -> dict[str, Any]:
    """The content of config.json for the rank files in `folder`."""
    description = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "trtc_version": __version__,
        "model": config.to_json(),
        "hf_config": dict(
            hf_config
        ),  # what the family reads its own configuration from when an engine is built
        "sharding": weights.sharding.to_json(),
        "aliases": dict(weights.aliases),
        "files": {
            name: {"size": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
            for name in map(_rank_file, range(weights.sharding.tp_size))
        },
    }
    if weights.quantization is None:
        return description
    return description | {"quantization": weights.quantization.to_json()}


def _rank_file(rank: int) -> str:
    return f"rank{rank}.safetensors"


# ---- reading -------------------------------------------------------------------------------------


def is_checkpoint(path: Path) -> bool:
    """Whether `path` looks like a trtc checkpoint, of whatever version: how a folder is told from a Hugging
    Face one.
    """
    try:
        return read_object(path / "config.json", CheckpointError).get("format") == FORMAT
    except CheckpointError:
        return False


class TrtcCheckpoint:
    """An open trtc checkpoint: a WeightSource.

    path: the folder.
    config: config.json as it is; config["model"] is ModelConfig.to_json().
    sharding, aliases, quantization: how the weights are split, shared and stored.
    """

    def __init__(self, path: Path, config: dict[str, Any], ranks: list[SafetensorsFile]) -> None:
        """`open` is the usual way in."""
        self.path = path
        self.config = config
        self.sharding = ShardingOptions.from_json(config["sharding"], str(path / "config.json"))
        self.aliases: Mapping[str, str] = config["aliases"]
        self.quantization = _quantization(path, config)
        self._ranks = ranks

    @classmethod
    def open(cls, path: Path | str) -> TrtcCheckpoint:
        """Opens the folder `path`.

        Raises CheckpointError, naming the file and the reason, when it is not a trtc checkpoint, is one of
        another format version, or a file is missing, of the wrong size or damaged in its header. `verify`
        checks the data.
        """
        path = Path(path)
        config = _read_description(path)
        where = str(path / "config.json")
        sharding = ShardingOptions.from_json(config["sharding"], where)
        _check_files(path, config["files"], sharding.tp_size)
        ranks = [SafetensorsFile(path / _rank_file(rank)) for rank in range(sharding.tp_size)]
        for rank in ranks:
            if rank.tensors.keys() != ranks[0].tensors.keys():
                odd = min(rank.tensors.keys() ^ ranks[0].tensors.keys())
                raise CheckpointError(f"{rank.path}: does not hold the same tensors as rank 0: {odd!r}")
        _check_aliases(config["aliases"], ranks[0].tensors.keys(), where)
        return cls(path, config, ranks)

    def names(self, rank: int) -> tuple[str, ...]:
        """The weights that `rank` holds, aliases left out."""
        return tuple(self._file(rank).tensors)

    def dtype(self, rank: int, name: str) -> DType:
        return self._entry(rank, name).dtype

    def shape(self, rank: int, name: str) -> Shape:
        return self._entry(rank, name).shape

    def read(self, rank: int, name: str) -> torch.Tensor:
        """The shard of `name` that `rank` holds, in fresh memory."""
        return self._file(rank).read(self.aliases.get(name, name))

    def check_model(self, model: ModelConfig) -> None:
        """Raises CheckpointError unless `model`, which a family has read from `config["hf_config"]`, is the one that was
        converted, as far as both know its fields.
        """
        read = json.loads(json.dumps(model.to_json()))
        for name, value in self.config["model"].items():
            if name in read.keys() - {"family"} and (type(value), value) != (type(read[name]), read[name]):
                raise CheckpointError(
                    f"{self.path / 'config.json'}: model has {name} {value!r}, hf_config gives {read[name]!r}; convert again"
                )

    def verify(self) -> None:
        """Reads every file and raises CheckpointError, naming the file, when its sha256 is not the recorded
        one.
        """
        for name, record in self.config["files"].items():
            if sha256(self.path / name) != record["sha256"]:
                raise CheckpointError(
                    f"{self.path / name}: damaged: sha256 differs from config.json; convert again"
                )

    def close(self) -> None:
        for file in self._ranks:
            file.close()

    def _file(self, rank: int) -> SafetensorsFile:
        if not 0 <= rank < len(self._ranks):
            raise CheckpointError(
                f"{self.path}: has no rank {rank}; it was converted for tp_size {len(self._ranks)}"
            )
        return self._ranks[rank]

    def _entry(self, rank: int, name: str) -> TensorEntry:
        file = self._file(rank)
        name = self.aliases.get(name, name)
        if name not in file.tensors:
            raise CheckpointError(f"{file.path}: holds no tensor {name!r}")
        return file.tensors[name]


def _read_description(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        what = "is a file" if path.exists() else "no such folder"
        raise CheckpointError(f"{path}: {what}; expected a trtc checkpoint folder")
    file = path / "config.json"
    config = read_object(file, CheckpointError)
    if config.get("format") != FORMAT:
        raise CheckpointError(f"{path}: is not a trtc checkpoint; make one with `trtc convert`")
    if config.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: has the checkpoint format {config.get('format_version')!r}, written by trtc"
            f" {config.get('trtc_version')!r}; this trtc reads format {FORMAT_VERSION}; convert again"
        )
    odd = (config.keys() - _OPTIONAL_KEYS) ^ _KEYS
    if odd:
        raise CheckpointError(f"{file}: keys missing or unknown: {', '.join(sorted(odd))}")
    for key in ("model", "hf_config", "aliases", "files"):
        if not isinstance(config[key], dict):
            raise CheckpointError(f"{file}: {key} must be an object")
    return config


def _quantization(path: Path, config: Mapping[str, Any]) -> Quantization | None:
    if "quantization" not in config:
        return None
    return Quantization.from_json(config["quantization"], str(path / "config.json"))


def _check_files(path: Path, files: dict[str, Any], tp_size: int) -> None:
    if len(files) != tp_size or files.keys() != set(map(_rank_file, range(tp_size))):
        raise CheckpointError(
            f"{path / 'config.json'}: files {', '.join(sorted(files))} do not fit tp_size {tp_size}"
        )
    for name, record in files.items():
        if not isinstance(record, dict) or type(record.get("size")) is not int or "sha256" not in record:
            raise CheckpointError(f"{path / 'config.json'}: files: {name} must have a size and a sha256")
        if not (path / name).is_file():
            raise CheckpointError(f"{path / name}: is missing; convert again")
        size = (path / name).stat().st_size
        if size != record["size"]:
            raise CheckpointError(
                f"{path / name}: has {size} bytes, expected {record['size']}; convert again"
            )


def _check_aliases(aliases: dict[str, Any], names: Iterable[str], where: str) -> None:
    names = set(names)
    for name, owner in aliases.items():
        if name in names or not isinstance(owner, str) or owner not in names:
            raise CheckpointError(f"{where}: alias {name!r} of {owner!r} does not fit the tensors of rank 0")
