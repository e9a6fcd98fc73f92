"""Ranks on two machines that share nothing but a network. Oracle: the tokens of one rank, in this process.

The machines are namespaces (`nodes.py`): other host names, other addresses, no way from one to the other but the cable.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from trtc.core.build import build_engine
from trtc.core.sharding import ShardingOptions
from trtc.tests.opt_models import BUILD, OptCheckpoint
from trtc.tests.rank_jobs import LIMIT_S, finish, job, lose, ranks_of

from .nodes import NAMES, Nodes, NotPermitted, two_nodes
from .ranks_script import generate

SCRIPT = Path(__file__).with_name("ranks_script.py")
TOKENS = 6
SPLITS = (ShardingOptions(tp_size=2), ShardingOptions(pp_size=2))


@pytest.fixture
def nodes(request: pytest.FixtureRequest) -> Iterator[Nodes]:
    """With a slot each, or as many as a test's parameter says."""
    if not Path(sys.executable).with_name("mpirun").exists():
        pytest.skip("Open MPI is not installed: pip install 'trtc[mpi]'")
    try:
        with two_nodes(getattr(request, "param", 1)) as made:
            yield made
    except NotPermitted as refusal:
        pytest.skip(f"this machine does not let us make network namespaces: {refusal}")


def built(checkpoint: OptCheckpoint, split: ShardingOptions, folder: Path) -> Path:
    engine = folder / f"engine-{split.tp_size}-{split.pp_size}"
    build = replace(BUILD, tp_size=split.tp_size, pp_size=split.pp_size)
    build_engine(checkpoint.family, checkpoint.config, checkpoint.weights(sharding=split), build, engine)
    return engine


@pytest.mark.slow
def test_two_machines_give_the_tokens_of_one_rank(
    opt_checkpoint: Callable[[str], OptCheckpoint],
    opt_engine: Callable[[str], Path],
    nodes: Nodes,
    tmp_path: Path,
) -> None:
    """A layer over two machines, and a stage on each."""
    engines = [built(opt_checkpoint("pre_norm"), split, tmp_path) for split in SPLITS]
    results, seen = tmp_path / "results.json", tmp_path / "hosts"
    command = [sys.executable, str(SCRIPT), str(results), str(TOKENS), *map(str, engines)]
    shell = f'hostname >> {seen}; exec "$@"'
    code, out, err = finish(nodes.mpirun(2, "sh", "-c", shell, "sh", *command))
    assert (code, out) == (0, ""), err
    assert sorted(seen.read_text().split()) == sorted(NAMES)
    expected = generate(opt_engine("pre_norm"), TOKENS)
    assert json.loads(results.read_text()) == {str(engine): expected for engine in engines}


@pytest.mark.slow
@pytest.mark.parametrize("split", SPLITS, ids=["a layer over both", "a stage on each"])
def test_a_cut_cable_ends_the_job_on_both_machines(
    split: ShardingOptions, opt_checkpoint: Callable[[str], OptCheckpoint], nodes: Nodes, tmp_path: Path
) -> None:
    """Neither side is told: packets are lost. All ranks are gone in time, and the first machine says which one it has lost.
    mpirun, which waits for its own half on the other machine, is no part of the promise."""
    engine, results = built(opt_checkpoint("pre_norm"), split, tmp_path), tmp_path / "results.json"
    # Again and again, so that it does not end by itself.
    script = [sys.executable, str(SCRIPT), str(results), "100", *[str(engine)] * 100]
    with job(nodes.mpirun(2, *script)) as process:
        try:
            while not results.exists():
                assert process.poll() is None, process.communicate()
                time.sleep(0.01)
            assert sorted(ranks_of(script).values()) == [0, 1]
            nodes.cut()
            start = time.monotonic()
            while left := ranks_of(script):
                assert time.monotonic() - start < LIMIT_S, f"still there: {left}"
                time.sleep(0.05)
        finally:
            nodes.end_all()
        _, err = process.communicate(timeout=LIMIT_S)
    assert f"trtc: error: rank 1 on {NAMES[1]} (process " in err
    assert re.search(r"died or hangs: no sign of life for \d+ s; the job ends", err), err


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [2], indirect=True)
def test_two_ranks_on_each_of_two_machines(
    opt_checkpoint: Callable[[str], OptCheckpoint],
    opt_engine: Callable[[str], Path],
    nodes: Nodes,
    tmp_path: Path,
) -> None:
    """Stages of two ranks that share a vocabulary, then the same over both machines; and a rank of the other machine killed:
    Open MPI names it and its machine, and nobody is left on either."""
    splits = (ShardingOptions(2, True, 0, pp_size=2), ShardingOptions(4))
    engines = [built(opt_checkpoint("pre_norm"), split, tmp_path) for split in splits]
    results = tmp_path / "results.json"
    command = [sys.executable, str(SCRIPT), str(results), str(TOKENS), *map(str, engines)]
    code, out, err = finish(nodes.mpirun(4, *command))
    assert (code, out) == (0, ""), err
    expected = generate(opt_engine("pre_norm"), TOKENS)
    assert json.loads(results.read_text()) == {str(engine): expected for engine in engines}

    results.unlink()
    script = [sys.executable, str(SCRIPT), str(results), "100", *[str(engines[0])] * 100]

    def first_token(process: subprocess.Popen[str]) -> None:
        while not results.exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)

    err = " ".join(lose(3, signal.SIGKILL, nodes.mpirun(4, *script), first_token, ranks=4).split())
    assert re.search(rf"process rank 3 with PID \d+ on node {NAMES[1]} exited on signal 9", err), err
