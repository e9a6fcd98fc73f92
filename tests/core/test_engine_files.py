"""Files of an engine that are compared while their owner does other things. What is refused: see test_engine_damage."""

from __future__ import annotations

import gc
import hashlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from trtc.core import engine_files
from trtc.core.engine import Engine
from trtc.core.engine_files import DESCRIPTION, EngineFiles, sha256
from trtc.core.errors import EngineError
from trtc.tests.opt_models import OptCheckpoint, save_hf


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    return OptCheckpoint.open(save_hf("pre_norm", folder / "hf")).build(folder / "engine")


def hashers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "sha256"]


def test_files_stand_for_their_directory(built: Path) -> None:
    files = EngineFiles(built)
    assert os.fspath(files) == str(built)
    assert files.target == "cpu"
    assert Engine.open(files) == Engine.open(built)


def test_opening_waits_for_the_comparison(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is found damaged after the engine's description has been read."""
    reading = threading.Event()

    def late(path: Path, stopped: Callable[[], bool]) -> str:
        assert reading.wait(20)
        return "0" * 64 if path.suffix == ".safetensors" else sha256(path)

    monkeypatch.setattr(engine_files, "sha256", late)
    files = EngineFiles(built)
    threading.Timer(0.05, reading.set).start()
    with pytest.raises(EngineError, match=r"rank0-0\.safetensors: content does not match its sha256"):
        Engine.open(files)


def test_what_cannot_be_read_is_said_in_one_line(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(path: Path, stopped: Callable[[], bool]) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(engine_files, "sha256", unreadable)
    with pytest.raises(EngineError, match="cannot be read: Input/output error"):
        EngineFiles(built).wait()


def test_nobody_hashes_for_an_owner_that_is_gone(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a command line turns out to be wrong: the program does not first read all weights."""

    def endless(path: Path, stopped: Callable[[], bool]) -> str:
        while not stopped():
            time.sleep(0.001)
        return ""

    monkeypatch.setattr(engine_files, "sha256", endless)
    files = EngineFiles(built)
    assert hashers()
    del files
    gc.collect()
    assert not hashers()


def test_who_waits_is_not_kept_by_the_few_threads_of_before(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One thread while others work; as many as there are processors when nobody has anything else to do."""
    together = threading.Barrier(2)
    first, second = sorted(path.name for path in built.iterdir() if path.name != DESCRIPTION)[:2]

    def in_twos(path: Path, stopped: Callable[[], bool]) -> str:
        if path.name in (first, second):
            together.wait(20)
        return sha256(path)

    monkeypatch.setattr(engine_files, "processors", lambda: 2)
    monkeypatch.setattr(engine_files, "sha256", in_twos)
    files = EngineFiles(built, threads=1)
    assert len(hashers()) == 1
    files.wait()


def test_without_verification_nothing_is_hashed(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_files, "sha256", lambda *_: pytest.fail("hashed"))
    EngineFiles(built, verify=False).wait()


def test_a_digest_is_that_of_all_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_files, "_HASH_BLOCK", 100)
    for size in (0, 1, 100, 250):
        content = os.urandom(size)
        (tmp_path / "file").write_bytes(content)
        assert sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()
