"""`kill -9` while `trtc convert` and `trtc build` write: never a half output that loads.

Oracle: what a run that is left alone writes. The victim runs the command again and again over the same output folder, so
that a kill at a random moment meets every phase: writing, syncing, swapping old for new, cleaning up.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from trtc.cli.main import main
from trtc.core.checkpoint import TrtcCheckpoint
from trtc.core.engine import Engine
from trtc.core.errors import TrtcError

TINY_OPT = Path(__file__).parents[2] / "examples" / "tiny-opt"
KILLS = 10


def run_forever(command: list[str]) -> None:
    while main(command) == 0:
        pass


def open_checkpoint(path: Path) -> None:
    checkpoint = TrtcCheckpoint.open(path)
    checkpoint.verify()
    checkpoint.close()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def loads(load: Callable[[Path], object], folder: Path) -> bool:
    try:
        load(folder)
    except TrtcError:
        return False
    return True


@pytest.mark.parametrize(("command", "load"), [("convert", open_checkpoint), ("build", Engine.open)])
def test_kill_at_random_moments(command: str, load: Callable[[Path], object], tmp_path: Path) -> None:
    words = [command, "--model-dir", str(TINY_OPT), "--dtype", "float32", "--output-dir"]
    assert main([*words, str(tmp_path / "whole")]) == 0
    expected = contents(tmp_path / "whole")
    output = tmp_path / "output"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trtc.core.build", "trtc.core.checkpoint", "trtc.plugins.opt"])
    moments = random.Random(0)
    for _ in range(KILLS):
        victim = context.Process(target=run_forever, args=([*words, str(output)],))
        victim.start()
        time.sleep(moments.uniform(0.05, 0.8))
        os.kill(victim.pid, signal.SIGKILL)
        victim.join()
        assert victim.exitcode == -signal.SIGKILL  # it was still at work, not stopped by an error
        if output.exists():
            load(output)
            assert contents(output) == expected
        for left in tmp_path.glob(".output*"):
            assert not loads(load, left) or contents(left) == expected  # whole, about to be renamed
    assert main([*words, str(output)]) == 0
    assert contents(output) == expected
    assert not list(tmp_path.glob(".output*")), "what killed runs left behind is removed by the next one"
