"""The launcher of `--nproc`, with ranks that only sleep, exit or die. Oracle: POSIX exit codes, and the docstrings."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from trtc.cli.main import main
from trtc.core.errors import TargetError
from trtc.runtime.launcher import launch_ranks

RANK = "import os, signal, sys, time; rank = int(os.environ['TRTC_RANK']); "
LAUNCH = "import sys; from trtc.runtime.launcher import launch_ranks; sys.exit(launch_ranks(sys.argv[1:], 2))"

LIMIT_S = 60
"""For what takes a second where the machine is not busy."""


def ranks(code: str) -> list[str]:
    """A command in which each rank runs `code`; its number is `rank`."""
    return [sys.executable, "-c", RANK + code]


def test_every_rank_runs_with_its_number(tmp_path: Path) -> None:
    assert launch_ranks([*ranks("open(sys.argv[1] + str(rank), 'w').close()"), f"{tmp_path}/"], 3) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2"]


def test_the_first_rank_to_fail_ends_the_job_with_its_code() -> None:
    start = time.monotonic()
    assert launch_ranks(ranks("time.sleep(600) if rank == 0 else sys.exit(7)"), 2) == 7
    assert time.monotonic() - start < LIMIT_S


def test_a_rank_that_ignores_the_end_is_killed() -> None:
    start = time.monotonic()
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    assert launch_ranks(ranks(f"sys.exit(5) if rank else exec({deaf!r})"), 2) == 5
    assert time.monotonic() - start < LIMIT_S


def test_a_killed_rank_is_named() -> None:
    with pytest.raises(TargetError, match=r"rank 1 on host .* \(process \d+\) was killed by SIGSEGV"):
        launch_ranks(ranks("os.kill(os.getpid(), signal.SIGSEGV) if rank else time.sleep(60)"), 2)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)]
)
def test_a_signal_to_the_launcher_ends_all_ranks(number: signal.Signals, code: int, tmp_path: Path) -> None:
    launcher = launched(tmp_path, number, signal.SIG_DFL, "time.sleep(60)")
    launcher.send_signal(number)
    # an uncaught KeyboardInterrupt ends Python by the signal itself
    assert launcher.wait(LIMIT_S) in (code, -number)
    for path in tmp_path.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.name), 0)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_a_signal_that_is_ignored_stays_so(number: signal.Signals, tmp_path: Path) -> None:
    """As nohup, or a script that starts a background job, has it. Oracle: the ranks' exit code, once they may end."""
    wait = "path = sys.argv[1] + 'end'\nwhile not os.path.exists(path): time.sleep(0.01)"
    launcher = launched(tmp_path, number, signal.SIG_IGN, wait)
    launcher.send_signal(number)
    time.sleep(0.1)
    (tmp_path / "end").touch()
    assert launcher.wait(LIMIT_S) == 0


def launched(
    folder: Path, number: signal.Signals, disposition: signal.Handlers, then: str
) -> subprocess.Popen[bytes]:
    """A launcher that starts with this disposition of `number`, once each of two ranks has left its process id in `folder`."""
    command = [*ranks(f"open(sys.argv[1] + str(os.getpid()), 'w').close(); {then}"), f"{folder}/"]
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCH, *command], stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(number, disposition),
    )  # fmt: skip
    end = time.monotonic() + LIMIT_S
    while len(list(folder.iterdir())) < 2:
        assert launcher.poll() is None and time.monotonic() < end, "the ranks did not start"
        time.sleep(0.01)
    return launcher


def test_a_signal_before_the_first_rank_has_started_ends_well(monkeypatch: pytest.MonkeyPatch) -> None:
    def signalled(*_: object, **__: object) -> None:
        raise SystemExit(143)

    monkeypatch.setattr(subprocess, "Popen", signalled)
    assert launch_ranks(ranks(""), 2, drain_s=1.0) == 0


def test_a_bad_number_of_ranks_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--engine-dir", "engine", "--input-ids", "5", "--nproc", "0"]) == 1
    assert capsys.readouterr().err == "trtc run: error: --nproc is 0; accepted: 1 or more\n"
