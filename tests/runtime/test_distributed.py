"""Tensor and pipeline parallel on the CPU target with real processes.

Oracle: the tokens of the same checkpoint's engine of one rank, in this process. For failures: the promise that all ranks are
gone within ten seconds, with an exit code other than 0 and a line that names rank, host and cause.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import numpy as np
import pytest
import torch
from trtc.cli.main import main
from trtc.core.build import build_engine
from trtc.core.config import BuildConfig
from trtc.core.engine import Engine
from trtc.core.errors import ConfigError, EngineError, TargetError
from trtc.core.hf import HFCheckpoint
from trtc.core.plugin_registry import PluginRegistry
from trtc.core.sharding import ShardingOptions
from trtc.runtime.follower import HEADER, STOP, length, pack, pack_copies, unpack
from trtc.runtime.launcher import launch
from trtc.runtime.load import load_executor
from trtc.runtime.placement import Placement, environment, placement, require_runnable
from trtc.runtime.step_input import StepInput
from trtc.tests.opt_models import BUILD, OptCheckpoint
from trtc.tests.rank_jobs import finish, lose, mpirun

from .ranks_script import generate

SCRIPT = Path(__file__).with_name("ranks_script.py")
TOKENS = 8


class Case(NamedTuple):
    """An engine of several ranks. dim: embedding_sharding_dim of a parallel embedding, or None."""

    variant: str
    tp_size: int = 1
    pp_size: int = 1
    dim: int | None = None


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
LLAMA = {
    "vocab_size": 101,
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 10,
    "num_hidden_layers": 2,
    "intermediate_size": 61,
    "max_position_embeddings": 128,
}
PACKAGES: Mapping[str, Mapping[str, Any]] = {
    "gpt2": {"vocab_size": 101, "n_embd": 48, "n_head": 4, "n_layer": 2, "n_positions": 128},
    "llama": LLAMA,
    # Fewer heads of keys and values than ranks; of the one, the seven queries are padded to eight.
    "llama_one_kv_head": {**LLAMA, "hidden_size": 56, "num_attention_heads": 7, "num_key_value_heads": 1},
    "llama_two_kv_heads": {**LLAMA, "num_attention_heads": 8, "num_key_value_heads": 2},
}

RanksEngine = Callable[[Case], Path]


def package_checkpoint(name: str, folder: Path) -> OptCheckpoint:
    """A tiny random checkpoint of the variant `name` of a family that a package in examples/ brings, opened with it."""
    transformers = pytest.importorskip("transformers")
    fields, name = {**PACKAGES[name], "initializer_range": 0.2}, name.partition("_")[0]
    config, model = {"gpt2": ("GPT2Config", "GPT2LMHeadModel"), "llama": ("LlamaConfig", "LlamaForCausalLM")}[
        name
    ]
    torch.manual_seed(0)
    getattr(transformers, model)(getattr(transformers, config)(**fields)).save_pretrained(folder)
    package = Path(__file__).parents[2] / "examples" / f"trtc-{name}"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(package)
        family = PluginRegistry([EntryPoint(name, f"trtc_{name}", "trtc")]).family(name)
    hf = HFCheckpoint.open(folder)
    return OptCheckpoint(folder, family, family.config(hf.config), hf)


@pytest.fixture(scope="module")
def ranks_engine(
    opt_checkpoint: Callable[[str], OptCheckpoint], tmp_path_factory: pytest.TempPathFactory
) -> RanksEngine:
    """Case -> folder of its engine, built once."""
    folder = tmp_path_factory.mktemp("ranks")

    @cache
    def checkpoint(variant: str) -> OptCheckpoint:
        if variant in PACKAGES:
            return package_checkpoint(variant, folder / variant)
        return opt_checkpoint(variant)

    @cache
    def engine(case: Case) -> Path:
        source = checkpoint(case.variant)
        sharding = ShardingOptions(case.tp_size, case.dim is not None, case.dim or 0, case.pp_size)
        build = BuildConfig(
            **{**vars(BUILD), "tp_size": case.tp_size, "pp_size": case.pp_size, "max_beam_width": 2}
        )
        path = folder / "-".join(map(str, case))
        build_engine(source.family, source.config, source.weights(sharding=sharding), build, path)
        return path

    return engine


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

    def first_token(process: subprocess.Popen[str]) -> None:
        while not results.exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)

    err = lose(1, signal.SIGSTOP, mpirun(*parts), first_token)
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
    assert launch([sys.executable, "-c", ALL_WRONG], 2) == 1
    assert capfd.readouterr().err == "found by 0\n"


@pytest.mark.slow
def test_exchanges(tmp_path: Path) -> None:
    """Oracle: numpy's order of rows and columns, written down."""
    assert launch([sys.executable, "-c", EXCHANGES, str(tmp_path)], 2) == 0
    columns = [[1, 2, 10, 20], [3, 4, 30, 40]]
    expected = {"sum": [[11, 22], [33, 44]], "rows": [[1, 2], [3, 4], [10, 20], [30, 40]], "columns": columns}
    for rank in range(2):
        found = json.loads((tmp_path / str(rank)).read_text())
        assert found == {**expected, "last": columns, "least": 6, "local": rank}


STUCK = """
import threading
from trtc.runtime import distributed, heartbeat
from trtc.runtime.placement import placement

heartbeat.INTERVAL_S, distributed.STALL_S = 0.2, 0.5
group = distributed.join(placement())
if group.rank == 0:
    group._heartbeat.next_round()
    with group.device_work():
        threading.Event().wait(60)
threading.Event().wait(60)
"""


@pytest.mark.slow
def test_a_device_that_waits_for_a_rank_ends_the_job(capfd: pytest.CaptureFixture[str]) -> None:
    """Rank 1 lives, and does not come to what rank 0's device waits for; neither can be interrupted."""
    assert launch([sys.executable, "-c", STUCK], 2) == 1
    host = socket.gethostname()
    named = rf"trtc: error: rank 0 on {host} .*: a step does not end; furthest behind is rank 1 on {host} "
    assert re.search(named, capfd.readouterr().err)


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


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 3])
def test_a_rank_that_is_killed_under_mpirun_ends_stages_of_several(
    lost: int, ranks_engine: RanksEngine, tmp_path: Path
) -> None:
    """Two stages of two ranks each: the first rank, which schedules and which all others listen to, and the last."""
    engine = shutil.copytree(ranks_engine(Case("pre_norm", 2, 2, dim=0)), tmp_path / "engine")
    results = tmp_path / "results.json"
    script = [sys.executable, str(SCRIPT), str(results), "100", *[str(engine)] * 50]

    def first_token(process: subprocess.Popen[str]) -> None:
        while not results.exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)

    err = lose(lost, signal.SIGKILL, mpirun((4, script)), first_token, ranks=4)
    assert re.search(
        rf"process rank {lost} with PID \d+ on node \S+ exited on signal 9", " ".join(err.split())
    ), err


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

    monkeypatch.setattr("trtc.runtime.launcher.launch", launched)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", interface)
    folder = shutil.copytree(ranks_engine(Case("pre_norm", 2)), tmp_path / "engine")
    if gone is not None:
        (folder / gone).unlink()
    assert main(["run", "--engine-dir", str(folder), "--input-ids", "5", "--nproc", str(nproc)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("trtc run: error: ") and says in line


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
