"""Jobs of several ranks as processes: started, waited for, and robbed of a rank."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

LIMIT_S = 20.0
"""Within which a job must be gone once a rank is lost: the promise is ten seconds, where the machine has time for it."""
FINISH_S = 240.0
"""For a job that ends by itself; no promise, but an end for one that does not."""


def mpirun(*parts: tuple[int, list[str]]) -> list[str]:
    """Open MPI's command line: each part a number of ranks and what they run."""
    beside = Path(sys.executable).with_name("mpirun")
    program = str(beside) if beside.exists() else shutil.which("mpirun")
    if program is None:
        pytest.skip("Open MPI is not installed: pip install 'trtc[mpi]'")
    words = [program, "--oversubscribe"]
    for index, (count, command) in enumerate(parts):
        words += [":"] * (index > 0) + ["-n", str(count), *command]
    return words


@contextmanager
def job(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A started command; one thread a rank, and root may use mpirun.

    Its TMPDIR is its own: mpirun keeps files in `ompi.PID` there and leaves them behind when it is killed; another one that is
    given the same process id later refuses to start beside them.
    """
    quiet = {"OMP_NUM_THREADS": "1", "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    with tempfile.TemporaryDirectory(prefix="trtc-job-", ignore_cleanup_errors=True) as scratch:
        variables = {**os.environ, **quiet, "TMPDIR": scratch}
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables
        )
        try:
            yield process
        finally:
            for pid in ranks_of(command):
                with suppress(ProcessLookupError):  # it has ended by itself
                    os.kill(pid, signal.SIGKILL)
            process.kill()
            process.communicate()


def finish(command: list[str], timeout: float = FINISH_S) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command that ends by itself."""
    with job(command) as process:
        out, err = process.communicate(timeout=timeout)
        return process.returncode, out, err


def ranks_of(command: list[str]) -> dict[int, int]:
    """Living processes of a job: pid -> rank. Found by the command's last word, which only this job has."""
    found = {}
    for folder in Path("/proc").iterdir():
        try:
            words = (folder / "cmdline").read_bytes().decode().split("\0")
            variables = dict(
                line.split("=", 1) for line in (folder / "environ").read_text().split("\0") if "=" in line
            )
        except (OSError, ValueError):
            continue
        rank = variables.get("TRTC_RANK", variables.get("OMPI_COMM_WORLD_RANK"))
        if command[-1] in words and rank is not None:
            found[int(folder.name)] = int(rank)
    return found


def lose(
    rank: int, how: signal.Signals, command: list[str], first_token: Callable[[Any], None], ranks: int = 2
) -> str:
    """Sends `how` to a rank once there is a token; returns stderr when all ranks are gone in time with an error."""
    with job(command) as process:
        first_token(process)
        pids = {found: pid for pid, found in ranks_of(command).items()}
        assert len(pids) == ranks, f"expected {ranks} ranks at work, found {pids}"
        os.kill(pids[rank], how)
        start = time.monotonic()
        while ranks_of(command):
            assert time.monotonic() - start < LIMIT_S, f"still there: {ranks_of(command)}"
            time.sleep(0.05)
        _, err = process.communicate(timeout=LIMIT_S)
        assert process.returncode != 0
        return err
