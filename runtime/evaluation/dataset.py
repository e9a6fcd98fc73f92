"""Articles with reference summaries: from a jsonl file, a saved dataset folder, or the `datasets` hub."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ...core.errors import ConfigError, TargetError
from ..tokenizer import in_utf8

FIELDS = ("article", "highlights")
"""The fields of the CNN/DailyMail dataset."""

_DEFAULT_CONFIGS = {"cnn_dailymail": "3.0.0"}
"""Hub datasets that cannot be loaded without naming a configuration, by the last part of their name."""


@dataclass(frozen=True)
class Pair:
    """An article and the summary a person wrote of it."""

    article: str
    highlights: str


def load_pairs(dataset: str, count: int, *, config: str | None = None, split: str = "test") -> list[Pair]:
    """The first `count` pairs of a dataset, or all when it has fewer.

    dataset: path of a jsonl file with the fields article and highlights; path of a folder written by
             `Dataset.save_to_disk`; otherwise a name on the `datasets` hub, as `abisee/cnn_dailymail`
    config:  configuration of a hub dataset; None: 3.0.0 for CNN/DailyMail, the dataset's own default otherwise
    split:   of a folder with several splits, or of a hub dataset
    Raises ConfigError naming what cannot be read and what is accepted, TargetError when the package `datasets` is missing.
    """
    path = Path(dataset)
    if path.is_file():
        rows = _jsonl_rows(path)
    elif path.is_dir():
        rows = _rows(_saved_dataset(path, split), dataset)
    elif path.suffix in (".jsonl", ".json") or path.is_absolute():
        raise ConfigError(f"dataset {dataset}: no such file or folder")
    else:
        rows = _rows(_hub_dataset(dataset, config, split), dataset)
    pairs = [_pair(row, where) for where, row in islice(rows, min(count, sys.maxsize))]
    if not pairs:
        raise ConfigError(f"dataset {dataset}: holds no article")
    return pairs


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").split(
            "\n"
        )  # texts may hold the others that Python takes for ends
    except OSError as error:
        raise ConfigError(f"dataset {path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"dataset {path}: not UTF-8 text (byte {error.start})") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"dataset {where}: not valid JSON: {error}") from None


def _rows(rows: Iterable[Any], name: str) -> Iterator[tuple[str, Any]]:
    return ((f"{name}, row {number}", row) for number, row in enumerate(rows))


def _pair(row: Any, where: str) -> Pair:
    texts = [row.get(field) for field in FIELDS] if isinstance(row, Mapping) else [None]
    if not all(isinstance(text, str) and in_utf8(text) for text in texts):
        raise ConfigError(
            f"dataset {where}: not a pair; accepted: texts, that UTF-8 can encode, in the fields {' and '.join(FIELDS)}"
        )
    return Pair(*texts)


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise TargetError(
            "a hub name or a saved dataset needs the package datasets: pip install datasets; a jsonl file does not"
        ) from None
    return datasets


def _saved_dataset(path: Path, split: str) -> Iterable[Any]:
    datasets = _datasets()
    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:  # FileNotFoundError for a folder of something else
        raise ConfigError(f"dataset {path}: not a folder written by Dataset.save_to_disk: {error}") from None
    if isinstance(loaded, Mapping):
        if split not in loaded:
            raise ConfigError(f"dataset {path}: has no split {split}; accepted: {', '.join(loaded)}")
        loaded = loaded[split]
    rows: Iterable[Any] = loaded
    return rows


def _hub_dataset(name: str, config: str | None, split: str) -> Iterable[Any]:
    datasets = _datasets()
    config = config or _DEFAULT_CONFIGS.get(name.rpartition("/")[2])
    try:
        rows: Iterable[Any] = datasets.load_dataset(name, config, split=split)
    except (
        Exception
    ) as error:  # the library raises many types: no network, unknown name, configuration or split
        raise ConfigError(
            f"dataset {name}: neither a file or folder here nor to be had from the hub: {type(error).__name__}: {error}; "
            f"accepted: a jsonl file, a saved dataset folder, a hub name (needs the network)"
        ) from error
    return rows
