"""The helpers that start jobs of several ranks."""

from __future__ import annotations

import socket
import subprocess
import tempfile
from pathlib import Path

import pytest
from trtc.tests.rank_jobs import finish, mpirun


@pytest.mark.slow
def test_what_a_killed_mpirun_left_behind_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mpirun refuses to start beside the files of an earlier one with its process id: here every id that may come next."""
    process = subprocess.Popen(["true"])
    process.wait()
    for pid in range(process.pid, process.pid + 1000):
        left = tmp_path / f"ompi.{pid}"
        left.mkdir()
        (left / f"pmix.{socket.gethostname()}.tool").touch()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert finish(mpirun((1, ["echo", "started"]))) == (0, "started\n", "")
    assert not list(tmp_path.glob("trtc-job-*"))
