"""Tensor parallel on the CPU target with real processes.

Oracle: the tokens of the same checkpoint's engine of one rank, in this process. For failures: the promise that all ranks are
gone within ten seconds, with an exit code other than 0 and a line that names rank, host and cause.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trtc.cli.main import main
from trtc.core.build import build_engine
from trtc.core.config import BuildConfig
from trtc.core.engine import Engine
from trtc.core.errors import ConfigError, EngineError, TargetError
from trtc.core.sharding import ShardingOptions
from trtc.runtime.follower import HEADER, STOP, length, pack, require_runnable, unpack
from trtc.runtime.launcher import launch
from trtc.runtime.load import load_executor
from trtc.runtime.placement import Placement, environment, placement
from trtc.runtime.step_input import StepInput
from trtc.tests.opt_models import BUILD, OptCheckpoint

from .ranks_script import generate

SCRIPT = Path(__file__).with_name("ranks_script.py")
TOKENS = 8
LIMIT_S = 10.0
"""Within which a job must be gone once a rank is lost."""

CASES = {
    2: [
        ("pre_norm", None),
        ("post_norm_projected", 0),
        ("post_norm_projected", 1),
        ("vocabulary_odd", 0),
    ],
    4: [("post_norm_projected", None), ("pre_norm", 1), ("vocabulary_odd", 0)],
}
"""tp_size -> variant, embedding_sharding_dim of a parallel embedding or None."""

TpEngine = Callable[[str, int, int | None], Path]


@pytest.fixture(scope="module")
def tp_engine(
    opt_checkpoint: Callable[[str], OptCheckpoint], tmp_path_factory: pytest.TempPathFactory
) -> TpEngine:
    """(variant, tp_size, embedding_sharding_dim) -> folder of the engine."""
    folder = tmp_path_factory.mktemp("tp")

    def engine(variant: str, tp_size: int, dim: int | None) -> Path:
        path = folder / f"{variant}-{tp_size}-{dim}"
        if not path.exists():
            source = opt_checkpoint(variant)
            sharding = ShardingOptions(tp_size, dim is not None, dim or 0)
            build = BuildConfig(**{**vars(BUILD), "tp_size": tp_size})
            build_engine(source.family, source.config, source.weights(sharding=sharding), build, path)
        return path

    return engine


def mpirun(*parts: tuple[int, list[str]]) -> list[str]:
    """Open MPI's command line: each part a number of ranks and what they run."""
    program = Path(sys.executable).with_name("mpirun")
    if not program.exists():
        pytest.skip("Open MPI is not installed: pip install 'trtc[mpi]'")
    words = [str(program), "--oversubscribe"]
    for index, (count, command) in enumerate(parts):
        words += [":"] * (index > 0) + ["-n", str(count), *command]
    return words


@contextmanager
def job(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A started command; one thread a rank, and root may use mpirun."""
    quiet = {"OMP_NUM_THREADS": "1", "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **quiet}
    )
    try:
        yield process
    finally:
        for pid in ranks_of(command):
            os.kill(pid, signal.SIGKILL)
        process.kill()
        process.communicate()


def finish(command: list[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command that ends by itself."""
    with job(command) as process:
        out, err = process.communicate(timeout=60)
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


def lose(rank: int, how: signal.Signals, command: list[str], first_token: Callable[[Any], None]) -> str:
    """Sends `how` to a rank once there is a token; returns stderr when all ranks are gone in time with an error."""
    with job(command) as process:
        first_token(process)
        pids = {found: pid for pid, found in ranks_of(command).items()}
        assert len(pids) == 2, f"expected two ranks at work, found {pids}"
        os.kill(pids[rank], how)
        start = time.monotonic()
        while ranks_of(command):
            assert time.monotonic() - start < LIMIT_S, f"still there: {ranks_of(command)}"
            time.sleep(0.05)
        _, err = process.communicate(timeout=LIMIT_S)
        assert process.returncode != 0
        return err


@pytest.mark.slow
@pytest.mark.parametrize("tp_size", CASES)
def test_mpirun_gives_the_tokens_of_one_rank(tp_size: int, tp_engine: TpEngine, tmp_path: Path) -> None:
    engines = [str(tp_engine(variant, tp_size, dim)) for variant, dim in CASES[tp_size]]
    results = tmp_path / "results.json"
    command = [sys.executable, str(SCRIPT), str(results), str(TOKENS), *engines]
    code, out, err = finish(mpirun((tp_size, command)))
    assert (code, out) == (0, ""), err
    found = json.loads(results.read_text())
    for engine, (variant, _) in zip(engines, CASES[tp_size], strict=True):
        expected = generate(tp_engine(variant, 1, None), TOKENS)
        assert found[engine] == expected, f"{engine}: other tokens than one rank"
        assert (
            len({tuple(tokens) for tokens in expected}) > 1
        )  # a model that always says the same proves nothing


@pytest.mark.slow
def test_nproc_gives_the_tokens_of_one_rank(
    tp_engine: TpEngine, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    folder, results = tp_engine("pre_norm", 2, 0), tmp_path / "out.json"
    command = ["run", "--engine-dir", str(folder), "--max_output_len", str(TOKENS), "--ignore-eos"]
    command += ["--input-ids", "2,21", "2,5", "--output-json", str(results), "--nproc=2"]
    capfd.readouterr()  # what making the engine said
    assert main(command) == 0
    said = capfd.readouterr()
    assert said.out.count("Output [") == 2 and len(said.err.splitlines()) == 1  # rank 0 alone speaks
    expected = generate(tp_engine("pre_norm", 1, None), TOKENS)
    found = [result["token_ids"] for result in json.loads(results.read_text())]
    assert found == [expected[1], expected[4]]


@pytest.mark.slow
def test_a_killed_rank_ends_the_job(tp_engine: TpEngine, tmp_path: Path) -> None:
    source = shutil.copytree(tp_engine("pre_norm", 2, None), tmp_path / "engine")
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
def test_a_rank_that_hangs_ends_the_job(tp_engine: TpEngine, tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    source = shutil.copytree(tp_engine("pre_norm", 2, None), tmp_path / "engine")
    command = mpirun((2, [sys.executable, str(SCRIPT), str(results), "120", str(source)]))

    def first_token(_: object) -> None:
        while not results.exists():
            time.sleep(0.01)

    err = lose(1, signal.SIGSTOP, command, first_token)
    assert f"trtc: error: rank 1 on {socket.gethostname()} (process " in err
    assert "died or hangs: no sign of life for 5 s; the job ends" in err


LATE = """
import time
import torch
from trtc.runtime import distributed, heartbeat
from trtc.runtime.placement import placement

heartbeat.INTERVAL_S, heartbeat.SILENCE_S, heartbeat.COURTESY_S, distributed.STALL_S = 0.2, 2.0, 0.1, 1
group = distributed.join(placement())
with group.failing_together():
    if group.rank == 1:
        time.sleep(60)
    group.all_reduce(torch.ones(3))
"""


@pytest.mark.slow
def test_a_rank_that_lives_and_does_not_come_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    assert launch([sys.executable, "-c", LATE], 2) == 1
    err = capfd.readouterr().err  # gloo may add lines of its own, before or after
    host = socket.gethostname()
    named = rf"TargetError: rank 0 on {host} .*: an exchange failed; furthest behind is rank 1 on {host} .*Timed out"
    assert re.search(named, err), err


@pytest.mark.slow
def test_ranks_with_different_engines_are_refused(tp_engine: TpEngine) -> None:
    one, other = tp_engine("pre_norm", 2, None), tp_engine("pre_norm", 2, 0)
    run = [sys.executable, "-P", "-m", "trtc.cli", "run", "--input-ids", "2,5", "--engine-dir"]
    code, out, err = finish(mpirun((1, [*run, str(one)]), (1, [*run, str(other)])))
    assert (code, out) == (1, "")
    assert f"trtc run: error: rank 1 on {socket.gethostname()} (process " in err
    assert "has engine.json " in err and "every rank needs the same trtc, the same engine" in err


@pytest.mark.parametrize(
    ("tp_size", "processes", "says"),
    [
        (
            4,
            2,
            "built for 4 ranks and 2 processes run it: start it with `mpirun -n 4` or `--nproc 4`, or build it",
        ),
        (
            1,
            2,
            "built for 1 rank and 2 processes run it: start it with `mpirun -n 1` or `--nproc 1`, or build it",
        ),
    ],
)
def test_another_number_of_processes_is_refused(
    tp_engine: TpEngine, tp_size: int, processes: int, says: str
) -> None:
    engine = Engine.open(tp_engine("pre_norm", tp_size, None))
    require_runnable(engine, tp_size)
    with pytest.raises(TargetError) as error:
        require_runnable(engine, processes)
    assert says in str(error.value) and f"with --tp-size {processes}" in str(error.value)


def test_a_rank_checks_its_own_files_only(tp_engine: TpEngine, tmp_path: Path) -> None:
    folder = shutil.copytree(tp_engine("pre_norm", 2, None), tmp_path / "engine")
    (folder / "rank1-0.safetensors").write_bytes(b"damaged")
    (folder / "config.json").unlink(missing_ok=True)
    assert len(Engine.open(folder, rank=0).ranks) == 2
    for rank in (1, None):
        with pytest.raises(EngineError, match=r"rank1-0\.safetensors"):
            Engine.open(folder, rank=rank)


def test_one_process_cannot_run_an_engine_of_several(tp_engine: TpEngine) -> None:
    with pytest.raises(TargetError, match="mpirun -n 2 trtc run"):
        load_executor(tp_engine("pre_norm", 2, None))


def test_placement() -> None:
    """Oracle: the variables that Open MPI and MPICH document, and what our launcher writes."""
    assert placement({}) == Placement(0, 1)
    assert placement({"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"}) == Placement(3, 4)
    assert placement({"PMI_RANK": "1", "PMI_SIZE": "2"}) == Placement(1, 2)
    ours = Placement(1, 2, "file", 7)
    assert placement(environment(ours)) == ours
    assert placement({**environment(ours), "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}) == ours


@pytest.mark.parametrize(("rank", "size"), [("2", "2"), ("-1", "2"), ("a", "2"), ("0", "")])
def test_a_bad_environment_is_refused(rank: str, size: str) -> None:
    with pytest.raises(ConfigError, match="OMPI_COMM_WORLD_"):
        placement({"OMPI_COMM_WORLD_RANK": rank, "OMPI_COMM_WORLD_SIZE": size})


def test_a_step_survives_its_message() -> None:
    """Two sequences: a chunk of a prompt without logits, and a decode step."""

    def array(*values: int) -> Any:
        return np.array(values, np.int32)

    step = StepInput(
        token_ids=array(5, 6, 7, 9),
        positions=array(16, 17, 18, 40),
        query_start=array(0, 3, 4),
        kv_length=array(19, 41),
        page_table=np.array([[4, 2, -1], [1, 0, 3]], np.int32),
        logits_index=array(3),
    )
    message = pack(step)
    assert message.dtype == np.int32 and length(message[:HEADER]) == len(message) == 4 + 4 + 2 + 2 + 6 + 1
    found = unpack(message)
    assert found is not None
    for name, value in vars(step).items():
        np.testing.assert_array_equal(getattr(found, name), value, err_msg=name)
        assert getattr(found, name).dtype == np.int32
    assert unpack(STOP) is None and length(STOP) == len(STOP)
