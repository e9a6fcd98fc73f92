"""Takes what belongs to text (tokenizer, generation defaults, chat template) along from a checkpoint to an engine."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from .errors import CheckpointError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "tokenizer.model",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files of a Hugging Face folder that belong to text, not to weights; copied where they exist."""

TOKENIZER_JSON = "tokenizer.json"
_SLOW_FILES = ("vocab.json", "merges.txt", "tokenizer.model")
"""What folders without a tokenizer.json keep their vocabulary in."""


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
