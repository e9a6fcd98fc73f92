"""Ranks that die, hang or do not come, in jobs of real processes.

Oracle: the promise that all ranks are gone within ten seconds, with an exit code other than 0 and a line that names rank, host
and cause.
"""

from __future__ import annotations

import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import pytest
from trtc.runtime.launcher import launch_ranks
from trtc.tests.rank_jobs import lose, mpirun

from .rank_engines import SCRIPT, Case, RanksEngine


def until_written(results: Path) -> Callable[[subprocess.Popen[str]], None]:
    """Waits until the job has written its first tokens there."""

    def wait(process: subprocess.Popen[str]) -> None:
        while not results.exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)

    return wait


@pytest.mark.slow
def test_a_killed_rank_ends_the_job(ranks_engine: RanksEngine, tmp_path: Path) -> None:
    source = shutil.copytree(ranks_engine(Case("pre_norm", 2)), tmp_path / "engine")
    command = [
        sys.executable,
        "-P",
        "-m",
        "trtc.cli",
        "run",
        "--nproc",
        "2",
        "--input-ids",
        "2,5",
        "--stream",
    ]
    command += ["--ignore-eos", "--max-output-len", "120", "--engine-dir", str(source)]
    err = lose(1, signal.SIGKILL, command, lambda process: process.stdout.read(1))
    (line,) = [text for text in err.splitlines() if text.startswith("trtc")]  # gloo may add lines of its own
    assert line.startswith(f"trtc run: error: rank 1 on host {socket.gethostname()} (process ")
    assert line.endswith(") was killed by SIGKILL; the job ends")


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_job(ranks_engine: RanksEngine, tmp_path: Path) -> None:
    """The last stage of a pipeline. Until then each rank has worked with its own files alone: there are no others."""
    results, name = tmp_path / "results.json", f"engine-{uuid4().hex}"
    parts = []
    for rank in (0, 1):
        folder = shutil.copytree(ranks_engine(Case("pre_norm", pp_size=2)), tmp_path / str(rank) / name)
        for file in folder.iterdir():
            if not file.name.startswith((f"rank{rank}-", "engine.json")):
                file.unlink()
        script = [sys.executable, str(SCRIPT), str(results), "120", name]
        parts.append((1, ["--wdir", str(folder.parent), *script]))
    err = lose(1, signal.SIGSTOP, mpirun(*parts), until_written(results))
    assert f"trtc: error: rank 1 on {socket.gethostname()} (process " in err
    assert re.search(r"died or hangs: no sign of life for \d+ s; the job ends", err), err


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 3])
def test_a_rank_that_is_killed_under_mpirun_ends_stages_of_several(
    lost: int, ranks_engine: RanksEngine, tmp_path: Path
) -> None:
    """Two stages of two ranks each: the first rank, which schedules and which all others listen to, and the last."""
    engine = shutil.copytree(ranks_engine(Case("pre_norm", 2, 2, dim=0)), tmp_path / "engine")
    results = tmp_path / "results.json"
    script = [sys.executable, str(SCRIPT), str(results), "100", *[str(engine)] * 50]
    err = lose(lost, signal.SIGKILL, mpirun((4, script)), until_written(results), ranks=4)
    assert re.search(
        rf"process rank {lost} with PID \d+ on node \S+ exited on signal 9", " ".join(err.split())
    ), err


LATE = """
import time
import torch
from trtc.runtime import distributed, heartbeat
from trtc.runtime.placement import placement

heartbeat.INTERVAL_S, heartbeat.SILENCE_S, heartbeat.COURTESY_S, distributed.STALL_S = 0.2, 2.0, 0.1, 5
group = distributed.join(placement())
with group.failing_together():
    if group.rank == 1:
        time.sleep(60)
    group.all_reduce(torch.ones(3))
"""


@pytest.mark.slow
def test_a_rank_that_lives_and_does_not_come_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    assert launch_ranks([sys.executable, "-c", LATE], 2) == 1
    err = capfd.readouterr().err  # gloo may add lines of its own, before or after
    host = socket.gethostname()
    named = rf"TargetError: rank 0 on {host} .*: an exchange failed; furthest behind is rank 1 on {host} .*Timed out"
    assert re.search(named, err), err


STUCK = """
import threading
from trtc.runtime import distributed, heartbeat
from trtc.runtime.placement import placement

heartbeat.INTERVAL_S = 0.2
group = distributed.join(placement())
distributed.STALL_S = 0.5  # not while the ranks meet, which takes longer on a busy machine
if group.rank == 0:
    group._heartbeat.next_round()
    with group.device_work():
        threading.Event().wait(60)
threading.Event().wait(60)
"""


@pytest.mark.slow
def test_a_device_that_waits_for_a_rank_ends_the_job(capfd: pytest.CaptureFixture[str]) -> None:
    """Rank 1 lives, and does not come to what rank 0's device waits for; neither can be interrupted."""
    assert launch_ranks([sys.executable, "-c", STUCK], 2) == 1
    host = socket.gethostname()
    named = rf"trtc: error: rank 0 on {host} .*: a step does not end; furthest behind is rank 1 on {host} "
    assert re.search(named, capfd.readouterr().err)
