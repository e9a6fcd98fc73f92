"""Takes what belongs to text (tokenizer, generation defaults, chat template) along from a checkpoint to an engine."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from pathlib import Path

from .config import ModelConfig
from .errors import CheckpointError
from .hf_config import HFConfigReader
from .strict_json import read_object

GENERATION_CONFIG = "generation_config.json"

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "tokenizer.model",
    GENERATION_CONFIG,
    "chat_template.jinja",
    "chat_template.json",
)
"""Files of a Hugging Face folder that belong to text, not to weights; copied where they exist."""

TOKENIZER_JSON = "tokenizer.json"
_SLOW_FILES = ("vocab.json", "merges.txt", "tokenizer.model")
"""What folders without a tokenizer.json keep their vocabulary in."""


def with_generation_config(model: ModelConfig, folder: Path) -> ModelConfig:
    """`model` with the end-of-sequence ids of generation_config.json in `folder`, where that names any.

    As in transformers, they take the place of those of config.json: chat models name the end of a turn only there.
    Raises CheckpointError when the file cannot be read, ConfigError when it names something else.
    """
    file = folder / GENERATION_CONFIG
    if not file.is_file():
        return model
    fields = HFConfigReader(read_object(file, CheckpointError), model.family, str(file))
    ids = fields.token_ids("eos_token_id")
    return dataclasses.replace(model, eos_token_ids=ids) if ids else model


def copy_text_files(source: Path, destination: Path) -> None:
    """Copies the text files of `source`, and makes tokenizer.json where only older files are.

    The runtime reads tokenizer.json alone, with the `tokenizers` library: it starts in milliseconds, without transformers.
    A folder without any tokenizer files is fine: its engine works with token ids.
    Raises CheckpointError when the tokenizer files cannot be read.
    """
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, destination / name)
    if not (source / TOKENIZER_JSON).is_file() and any((source / name).is_file() for name in _SLOW_FILES):
        _make_tokenizer_json(source, destination)


def _make_tokenizer_json(source: Path, destination: Path) -> None:
    from transformers import AutoTokenizer  # only here: the import takes seconds

    with tempfile.TemporaryDirectory() as scratch:
        try:
            AutoTokenizer.from_pretrained(source, use_fast=True).save_pretrained(scratch)
        # transformers raises many types for a bad tokenizer folder; all of them mean the same to the user.
        except Exception as error:
            raise CheckpointError(
                f"{source}: tokenizer files cannot be read: {type(error).__name__}: {error}"
            ) from None
        made = Path(scratch) / TOKENIZER_JSON
        if not made.is_file():
            raise CheckpointError(
                f"{source}: its tokenizer has no fast form; add a {TOKENIZER_JSON} or remove its files"
            )
        shutil.copyfile(made, destination / TOKENIZER_JSON)
