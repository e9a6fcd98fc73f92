"""What ranks are not started with, or say before they run. Oracle: the text."""

from __future__ import annotations

import re
import shutil
import socket
import sys
from pathlib import Path

import pytest
from trtc.cli.main import main
from trtc.core.engine import Engine
from trtc.core.errors import EngineError, TargetError
from trtc.runtime.launcher import launch_ranks
from trtc.runtime.load import load_executor
from trtc.runtime.placement import require_runnable
from trtc.tests.rank_jobs import finish, mpirun

from .rank_engines import Case, RanksEngine


@pytest.mark.slow
def test_ranks_with_different_engines_are_refused(ranks_engine: RanksEngine) -> None:
    one, other = ranks_engine(Case("pre_norm", 2)), ranks_engine(Case("pre_norm", 2, dim=0))
    run = [sys.executable, "-P", "-m", "trtc.cli", "run", "--input-ids", "2,5", "--engine-dir"]
    code, out, err = finish(mpirun((1, [*run, str(one)]), (1, [*run, str(other)])))
    assert (code, out) == (1, "")
    assert f"trtc run: error: rank 1 on {socket.gethostname()} (process " in err
    assert "has engine.json " in err and "every rank needs the same trtc, the same engine" in err


OTHER_VERSION = """
import sys
import trtc

trtc.__version__ = "9.9"
from trtc.cli.main import main

sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("differs", ["version", "options"])
def test_ranks_of_another_version_or_with_other_options_are_refused(
    differs: str, ranks_engine: RanksEngine
) -> None:
    """Before anything runs, with what each of the two has."""
    words = ["run", "--input-ids", "2,5", "--engine-dir", str(ranks_engine(Case("pre_norm", 2)))]
    one, other = ([sys.executable, "-P", "-m", "trtc.cli", *words] for _ in range(2))
    if differs == "version":
        other = [sys.executable, "-P", "-c", OTHER_VERSION, *words]
    else:
        other += ["--kv-cache-memory-bytes", str(1 << 22)]
    code, out, err = finish(mpirun((1, one), (1, other)))
    assert (code, out) == (1, "")
    theirs = "trtc 9.9" if differs == "version" else "kv_cache_memory_bytes 4194304"
    host = socket.gethostname()
    named = rf"trtc run: error: rank 1 on {host} \(process \d+\) has {theirs}, rank 0 on {host} "
    assert re.search(named, err), err
    assert "every rank needs the same trtc, the same engine and the same options" in err


@pytest.mark.parametrize(
    ("tp_size", "processes", "says"),
    [
        (
            4,
            2,
            "built for 4 ranks and 2 processes run it: start it with `mpirun -n 4` or `--nproc 4`, or build it for",
        ),
        (
            1,
            2,
            "built for 1 rank and 2 processes run it: start it with `mpirun -n 1` or `--nproc 1`, or build it for",
        ),
    ],
)
def test_another_number_of_processes_is_refused(
    ranks_engine: RanksEngine, tp_size: int, processes: int, says: str
) -> None:
    engine = Engine.open(ranks_engine(Case("pre_norm", tp_size)))
    require_runnable(engine.path, len(engine.ranks), tp_size)
    with pytest.raises(TargetError) as error:
        require_runnable(engine.path, len(engine.ranks), processes)
    assert says in str(error.value) and f"build it for {processes}: --tp-size times --pp-size" in str(
        error.value
    )


@pytest.mark.parametrize(
    ("nproc", "interface", "gone", "says"),
    [
        (3, "lo", None, "built for 2 ranks and 3 processes run it"),
        (2, "lo", "rank1-0.safetensors", "rank1-0.safetensors: file of the engine is missing"),
        (2, "lo", "engine.json", "has no engine.json"),
        (2, "lo,nowhere0", None, "GLOO_SOCKET_IFNAME is 'lo,nowhere0'; accepted: networks of "),
    ],
)
def test_what_is_wrong_for_all_ranks_is_said_before_there_are_any(
    ranks_engine: RanksEngine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    nproc: int,
    interface: str,
    gone: str | None,
    says: str,
) -> None:
    def launched(*_: object, **__: object) -> int:
        raise AssertionError("ranks were started")

    monkeypatch.setattr("trtc.runtime.launcher.launch_ranks", launched)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", interface)
    folder = shutil.copytree(ranks_engine(Case("pre_norm", 2)), tmp_path / "engine")
    if gone is not None:
        (folder / gone).unlink()
    assert main(["run", "--engine-dir", str(folder), "--input-ids", "5", "--nproc", str(nproc)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("trtc run: error: ") and says in line


ALL_WRONG = """
import sys
from trtc.core.errors import EngineError
from trtc.runtime import distributed
from trtc.runtime.placement import placement

group = distributed.join(placement())
try:
    with group.failing_together():
        raise EngineError(f"found by {group.rank}")
except EngineError as error:
    sys.exit(str(error))
"""


@pytest.mark.slow
def test_what_all_ranks_find_wrong_is_said_once(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")  # as the command line does
    assert launch_ranks([sys.executable, "-c", ALL_WRONG], 2) == 1
    assert capfd.readouterr().err == "found by 0\n"


def test_a_rank_checks_its_own_files_only(ranks_engine: RanksEngine, tmp_path: Path) -> None:
    folder = shutil.copytree(ranks_engine(Case("pre_norm", 2)), tmp_path / "engine")
    (folder / "rank1-0.safetensors").write_bytes(b"damaged")
    (folder / "config.json").unlink(missing_ok=True)
    assert len(Engine.open(folder, rank=0).ranks) == 2
    for rank in (1, None):
        with pytest.raises(EngineError, match=r"rank1-0\.safetensors"):
            Engine.open(folder, rank=rank)


def test_one_process_cannot_run_an_engine_of_several(ranks_engine: RanksEngine) -> None:
    with pytest.raises(TargetError, match="mpirun -n 2 trtc run"):
        load_executor(ranks_engine(Case("pre_norm", 2)))
