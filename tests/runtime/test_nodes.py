"""Ranks on two machines that share nothing but a network. Oracle: the tokens of one rank, in this process.

The machines are namespaces (`nodes.py`): other host names, other addresses, no way from one to the other but the cable.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from trtc.core.build import build_engine
from trtc.core.sharding import ShardingOptions
from trtc.tests.opt_models import BUILD, OptCheckpoint

from .nodes import NAMES, NotPermitted, two_nodes
from .ranks_script import generate

SCRIPT = Path(__file__).with_name("ranks_script.py")
TOKENS = 6
ROOT = {"OMP_NUM_THREADS": "1", "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


@pytest.mark.slow
def test_two_machines_give_the_tokens_of_one_rank(
    opt_checkpoint: Callable[[str], OptCheckpoint],
    opt_engine: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A layer over two machines, and a stage on each."""
    if not Path(sys.executable).with_name("mpirun").exists():
        pytest.skip("Open MPI is not installed: pip install 'trtc[mpi]'")
    checkpoint, engines = opt_checkpoint("pre_norm"), []
    for sharding in (ShardingOptions(tp_size=2), ShardingOptions(pp_size=2)):
        engines.append(tmp_path / f"engine-{sharding.tp_size}-{sharding.pp_size}")
        build = replace(BUILD, tp_size=sharding.tp_size, pp_size=sharding.pp_size)
        weights = checkpoint.weights(sharding=sharding)
        build_engine(checkpoint.family, checkpoint.config, weights, build, engines[-1])
    results, seen = tmp_path / "results.json", tmp_path / "hosts"
    command = [sys.executable, str(SCRIPT), str(results), str(TOKENS), *map(str, engines)]
    for name, value in ROOT.items():
        monkeypatch.setenv(name, value)
    try:
        with two_nodes() as nodes:
            shell = f'hostname >> {seen}; exec "$@"'
            job = nodes.mpirun(2, "sh", "-c", shell, "sh", *command)
            done = subprocess.run(job, capture_output=True, text=True, timeout=240)
    except NotPermitted as refusal:
        pytest.skip(f"this machine does not let us make network namespaces: {refusal}")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert sorted(seen.read_text().split()) == sorted(NAMES)
    expected = generate(opt_engine("pre_norm"), TOKENS)
    assert json.loads(results.read_text()) == {str(engine): expected for engine in engines}
