"""Tensor and pipeline parallel on the CPU target with real processes.

Oracle: the tokens of the same checkpoint's engine of one rank, in this process. Jobs that do not come to their end are in
test_lost_ranks.py, those that do not begin in test_refused_ranks.py.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trtc.cli.main import main
from trtc.core.errors import ConfigError
from trtc.runtime.follower import HEADER, STOP, length, pack, pack_copies, unpack
from trtc.runtime.launcher import launch_ranks
from trtc.runtime.placement import Placement, environment, placement
from trtc.runtime.step_input import StepInput
from trtc.tests.rank_jobs import finish, mpirun

from .rank_engines import SCRIPT, Case, RanksEngine
from .ranks_script import generate

TOKENS = 8
CASES = {
    2: [
        Case("pre_norm", tp_size=2),
        Case("post_norm_projected", tp_size=2, dim=0),
        Case("post_norm_projected", tp_size=2, dim=1),
        Case("odd_sizes", tp_size=2, dim=0),
        Case("gpt2", tp_size=2),
        Case("llama", tp_size=2),
        Case("post_norm_projected", pp_size=2),
        Case("vocabulary_odd", pp_size=2),
    ],
    4: [
        Case("post_norm_projected", tp_size=4),
        Case("pre_norm", tp_size=4, dim=1),
        Case("vocabulary_odd", tp_size=4, dim=0),
        Case("pre_norm", tp_size=2, pp_size=2, dim=0),
        Case("post_norm_projected", tp_size=2, pp_size=2),
        Case("gpt2", tp_size=4),
        Case("gpt2", tp_size=2, pp_size=2),
        Case("llama_one_kv_head", tp_size=4),
        Case("llama_two_kv_heads", tp_size=4),
    ],
}
"""By the number of ranks. The heads of odd_sizes and llama are padded; gpt2 and llama are packages in examples/."""


@pytest.fixture(scope="module")
def expected_tokens(ranks_engine: RanksEngine) -> Callable[[str], list[list[int]]]:
    """variant -> what one rank says to the prompts, in this process."""

    @cache
    def tokens(variant: str) -> list[list[int]]:
        found = generate(ranks_engine(Case(variant)), TOKENS)
        assert len({tuple(one) for one in found}) > 1  # a model that always says the same proves nothing
        return found

    return tokens


@pytest.mark.slow
@pytest.mark.parametrize("count", CASES)
def test_mpirun_gives_the_tokens_of_one_rank(
    count: int, ranks_engine: RanksEngine, expected_tokens: Callable[[str], list[list[int]]], tmp_path: Path
) -> None:
    engines = {case: str(ranks_engine(case)) for case in CASES[count]}
    results = tmp_path / "results.json"
    command = [sys.executable, str(SCRIPT), str(results), str(TOKENS), *engines.values()]
    code, out, err = finish(mpirun((count, command)))
    assert (code, out) == (0, ""), err
    found = json.loads(results.read_text())
    for case, engine in engines.items():
        assert found[engine] == expected_tokens(case.variant), f"{case}: other tokens than one rank"


@pytest.mark.slow
def test_nproc_gives_the_tokens_of_one_rank(
    ranks_engine: RanksEngine,
    expected_tokens: Callable[[str], list[list[int]]],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    folder, results = ranks_engine(Case("pre_norm", 2, dim=0)), tmp_path / "out.json"
    command = ["run", "--engine-dir", str(folder), "--max_output_len", str(TOKENS), "--ignore-eos"]
    command += ["--input-ids", "2,21", "2,5", "--output-json", str(results), "--nproc=2"]
    capfd.readouterr()  # what making the engine said
    assert main(command) == 0
    said = capfd.readouterr()
    assert said.out.count("Output [") == 2 and len(said.err.splitlines()) == 1  # rank 0 alone speaks
    expected = expected_tokens("pre_norm")
    found = [result["token_ids"] for result in json.loads(results.read_text())]
    assert found == [expected[1], expected[4]]


@pytest.mark.slow
def test_beams_of_a_pipeline_are_those_of_one_rank(
    ranks_engine: RanksEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages are copied on every rank, each of its own layers."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    prompts = ["2,21,30,31", "2,5"]
    found = []
    for case in (Case("pre_norm"), Case("pre_norm", pp_size=2)):
        results = tmp_path / f"{case.pp_size}.json"
        command = ["run", "--engine-dir", str(ranks_engine(case)), "--output-json", str(results)]
        command += ["--num_beams", "2", "--max-output-len", "20", "--input-ids", *prompts]
        assert main([*command, "--nproc", str(case.pp_size)]) == 0
        found.append(json.loads(results.read_text()))
    assert found[0] == found[1]
    assert all(len(result["more"]) == 1 for result in found[0])


EXCHANGES = """
import json, sys
import torch
from trtc.runtime import distributed
from trtc.runtime.placement import placement

group = distributed.join(placement())
with group.failing_together():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]]) * 10**group.rank
    kept, lost = group.all_reduce(x), x.clone()
    assert group.all_reduce(lost, overwrite=True) is lost and torch.equal(kept, lost)
    nothing = torch.empty(0, 2)
    assert group.all_reduce(nothing).shape == (0, 2) and group.all_gather(nothing, 1).shape == (0, 4)
    found = {"sum": kept, "rows": group.all_gather(x, 0), "columns": group.all_gather(x, 1), "last": group.all_gather(x, -1)}
    found = {name: tensor.tolist() for name, tensor in found.items()}
    found |= {"least": group.least(7 - group.rank), "local": group.local_rank}
    open(f"{sys.argv[1]}/{group.rank}", "w").write(json.dumps(found))
group.close()
"""


@pytest.mark.slow
def test_exchanges(tmp_path: Path) -> None:
    """Oracle: numpy's order of rows and columns, written down."""
    assert launch_ranks([sys.executable, "-c", EXCHANGES, str(tmp_path)], 2) == 0
    columns = [[1, 2, 10, 20], [3, 4, 30, 40]]
    expected = {"sum": [[11, 22], [33, 44]], "rows": [[1, 2], [3, 4], [10, 20], [30, 40]], "columns": columns}
    for rank in range(2):
        found = json.loads((tmp_path / str(rank)).read_text())
        assert found == {**expected, "last": columns, "least": 6, "local": rank}


def test_placement() -> None:
    """Oracle: the variables that Open MPI and MPICH document, and what our launcher writes."""
    assert placement({}) == Placement(0, 1)
    assert placement({"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"}) == Placement(3, 4)
    assert placement({"PMI_RANK": "1", "PMI_SIZE": "2"}) == Placement(1, 2)
    open_mpi = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
    assert placement(open_mpi) == Placement(3, 4, local_rank=1)
    mpich = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0"}
    assert placement(mpich) == Placement(3, 4, local_rank=0)
    ours = Placement(1, 2, "file", 7)
    assert placement(environment(ours)) == ours
    assert placement({**environment(ours), "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}) == ours


@pytest.mark.parametrize(("rank", "size"), [("2", "2"), ("-1", "2"), ("a", "2"), ("0", "")])
def test_a_bad_environment_is_refused(rank: str, size: str) -> None:
    with pytest.raises(ConfigError, match="OMPI_COMM_WORLD_"):
        placement({"OMPI_COMM_WORLD_RANK": rank, "OMPI_COMM_WORLD_SIZE": size})


def test_a_rank_of_nobody_is_refused() -> None:
    with pytest.raises(ConfigError, match="TRTC_RANK is set without TRTC_RENDEZVOUS"):
        placement({"TRTC_RANK": "0", "TRTC_NUM_RANKS": "1"})


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
    copies = pack_copies([3, 5, 3], [7, 8, 9])
    assert unpack(copies) is None and length(copies[:HEADER]) == len(copies) and copies[:2].any()
