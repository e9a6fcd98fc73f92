"""An engine, with more than one weight file, and the checkpoint that it was built from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from trtc.core import build as build_module
from trtc.tests.opt_models import BUILD, OptCheckpoint

VARIANT = "post_norm_projected"


@pytest.fixture(scope="session")
def checkpoint(opt_checkpoint: Callable[[str], OptCheckpoint]) -> OptCheckpoint:
    return opt_checkpoint(VARIANT)


@pytest.fixture(scope="session")
def built(checkpoint: OptCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine with two weight files and two tokenizer files. Tests must not change it."""
    source = tmp_path_factory.mktemp("text")
    (source / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    (source / "tokenizer.json").write_text("{}")
    folder = tmp_path_factory.mktemp("built") / "engine"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_module, "FILE_BYTES", 300_000)
        build_module.build_engine(
            checkpoint.family,
            checkpoint.config,
            checkpoint.weights(),
            BUILD,
            folder,
            text_files=source,
            workers=2,
        )
    return folder
