"""Fixtures of all rooms: tiny checkpoints and the engines built from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from trtc.core.dtypes import DType
from trtc.tests.opt_models import OptCheckpoint, save_hf
from trtc.tests.runtime.rank_engines import PACKAGES, package_checkpoint


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """The tensors of the tests are tiny: threads cost more than they give."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def opt_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], OptCheckpoint]:
    """variant of `opt_models.VARIANTS` -> its checkpoint, written once in a session."""

    @cache
    def checkpoint(variant: str) -> OptCheckpoint:
        return OptCheckpoint.open(save_hf(variant, tmp_path_factory.mktemp("hf") / variant))

    return checkpoint


@pytest.fixture(scope="session")
def family_checkpoint(
    opt_checkpoint: Callable[[str], OptCheckpoint], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], OptCheckpoint]:
    """variant of `opt_models.VARIANTS`, or of a package's family in `PACKAGES` -> its checkpoint, written once in a session."""

    @cache
    def checkpoint(variant: str) -> OptCheckpoint:
        if variant in PACKAGES:
            return package_checkpoint(variant, tmp_path_factory.mktemp(variant))
        return opt_checkpoint(variant)

    return checkpoint


@pytest.fixture(scope="session")
def opt_engine(
    opt_checkpoint: Callable[[str], OptCheckpoint], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """(variant, dtype) -> folder of the engine, built once in a session. Tests must not change it."""

    @cache
    def engine(variant: str, dtype: DType = DType.FLOAT32) -> Path:
        folder = tmp_path_factory.mktemp("engine") / f"{variant}-{dtype}"
        return opt_checkpoint(variant).build(folder, dtype=dtype)

    return engine
