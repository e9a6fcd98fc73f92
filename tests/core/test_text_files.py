"""What an engine takes from the text files of a checkpoint beside its tokenizer."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from trtc.core.build import build_engine
from trtc.core.engine import Engine
from trtc.core.errors import CheckpointError, ConfigError
from trtc.tests.opt_models import BUILD, OptCheckpoint


@pytest.fixture
def checkpoint(opt_checkpoint: Callable[[str], OptCheckpoint]) -> OptCheckpoint:
    return opt_checkpoint("pre_norm")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, (2,)),
        ("{}", (2,)),
        ('{"eos_token_id": null}', (2,)),
        ('{"eos_token_id": []}', (2,)),
        ('{"eos_token_id": 7}', (7,)),
        ('{"eos_token_id": [7, 9]}', (7, 9)),
    ],
)
def test_an_engine_ends_where_generation_config_says(
    content: str | None, expected: tuple[int, ...], checkpoint: OptCheckpoint, tmp_path: Path
) -> None:
    """Oracle: transformers, which reads config.json's id only where this file names none."""
    source = tmp_path / "text"
    source.mkdir()
    if content is not None:
        (source / "generation_config.json").write_text(content)
    assert checkpoint.config.eos_token_ids == (2,)
    arguments = checkpoint.family, checkpoint.config, checkpoint.weights(), BUILD
    build_engine(*arguments, tmp_path / "engine", text_files=source)
    assert Engine.open(tmp_path / "engine").model.eos_token_ids == expected


@pytest.mark.parametrize(
    "content", ['{"eos_token_id": "2"}', '{"eos_token_id": [2, true]}', '{"eos_token_id": -1}', "[]", "{"]
)
def test_a_bad_generation_config_is_refused_before_anything_is_built(
    content: str, checkpoint: OptCheckpoint, tmp_path: Path
) -> None:
    source = tmp_path / "text"
    source.mkdir()
    (source / "generation_config.json").write_text(content)
    arguments = checkpoint.family, checkpoint.config, checkpoint.weights(), BUILD
    with pytest.raises(
        (CheckpointError, ConfigError), match=re.escape(str(source / "generation_config.json"))
    ):
        build_engine(*arguments, tmp_path / "engine", text_files=source)
    assert not (tmp_path / "engine").exists()
