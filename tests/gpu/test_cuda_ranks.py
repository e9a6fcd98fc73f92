"""Tensor and pipeline parallel on two and four GPUs with real processes. Oracles: transformers in float32, one rank on one GPU.

For failures: the promise that all ranks are gone within ten seconds, with a line that names rank and host.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from trtc.core.build import build_engine
from trtc.core.dtypes import DType
from trtc.core.sharding import ShardingOptions
from trtc.tests.opt_models import BUILD, OptCheckpoint, hf_logits, save_hf
from trtc.tests.rank_jobs import finish, lose, mpirun
from trtc.tests.tolerances import logits_tolerance, max_error

from .ranks_script import PROMPTS, TOKENS, compute

pytestmark = pytest.mark.multi_gpu
SCRIPT = Path(__file__).with_name("ranks_script.py")
JOB_S = 110.0
TRTC = [sys.executable, "-P", "-m", "trtc.cli"]


class Case(NamedTuple):
    """An engine. dim: embedding_sharding_dim of a parallel embedding, or None."""

    variant: str
    tp_size: int = 2
    dim: int | None = None
    dtype: DType = DType.FLOAT16
    pp_size: int = 1

    @property
    def ranks(self) -> int:
        return self.tp_size * self.pp_size


CASES = [
    Case("cuda_pre_norm"),
    Case("cuda_pre_norm", dim=0, dtype=DType.BFLOAT16),
    Case("cuda_post_norm_projected", dim=0),
    Case("cuda_post_norm_projected", dim=1),
    Case("cuda_head_dim_80_odd_vocabulary", dim=0),
    Case("cuda_pre_norm", tp_size=1, pp_size=2),
    Case("cuda_post_norm_projected", tp_size=1, dtype=DType.BFLOAT16, pp_size=2),
    Case("cuda_pre_norm", tp_size=4),
    Case("cuda_pre_norm", tp_size=4, dim=0, dtype=DType.BFLOAT16),
    Case("cuda_post_norm_projected", tp_size=4, dim=1),
    Case("cuda_odd_sizes", tp_size=4, dim=0),
    Case("cuda_pre_norm", pp_size=2),
]


def needs_gpus(count: int) -> None:
    if torch.cuda.device_count() < count:
        pytest.skip(f"needs {count} CUDA GPUs")


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, Path]:
    """Every case that there are GPUs for, and the one rank of the first."""
    needs_gpus(2)
    folder = tmp_path_factory.mktemp("ranks")
    major, minor = torch.cuda.get_device_capability()
    options = {"target": "cuda", "target_options": {"architectures": [f"sm_{major}{minor}"]}}
    checkpoints = {v: OptCheckpoint.open(save_hf(v, folder / v)) for v in {case.variant for case in CASES}}
    made = {}
    possible = [case for case in CASES if case.ranks <= torch.cuda.device_count()]
    for case in [*possible, CASES[0]._replace(tp_size=1)]:
        source = checkpoints[case.variant]
        model = dataclasses.replace(source.config, dtype=case.dtype)
        sharding = ShardingOptions(case.tp_size, case.dim is not None, case.dim or 0, case.pp_size)
        made[case] = folder / "-".join(map(str, case))
        build = dataclasses.replace(BUILD, tp_size=case.tp_size, pp_size=case.pp_size, **options)
        build_engine(source.family, model, source.weights(case.dtype, sharding), build, made[case])
    return made


Results = dict[tuple[str, bool], Any]
"""By the engine, and whether sums and norms were one kernel."""
Jobs = Callable[[Case], Results]


@pytest.fixture(scope="module")
def results(engines: dict[Case, Path], tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """What a case computes, with all others of as many ranks and stages: each such job of mpirun runs once."""

    @functools.cache
    def job(ranks: int, pp_size: int) -> Results:
        cases = [case for case in engines if (case.ranks, case.pp_size) == (ranks, pp_size)]
        path = tmp_path_factory.mktemp("results") / "results.pt"
        words = [sys.executable, str(SCRIPT), str(path), *(str(engines[case]) for case in cases)]
        code, out, err = finish(mpirun((ranks, words)), JOB_S)
        assert (code, out) == (0, ""), err
        assert "no memory shared between GPUs" not in err, err
        found: Results = torch.load(path)
        return found

    return lambda case: job(case.ranks, case.pp_size)


def assert_same_up_to_ties(variant: str, prompt: list[int], found: list[int], expected: list[int]) -> None:
    """Where two generations part, float32 logits have the two tokens within the type's error of each other."""
    parted = next((i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b), None)
    if parted is not None:
        logits = hf_logits(variant, prompt + expected[:parted])[-1]
        gap = float((logits[found[parted]] - logits[expected[parted]]).abs())
        assert gap <= 2 * logits_tolerance(DType.FLOAT16, logits), f"token {parted} differs by {gap}"


@pytest.mark.parametrize("normed", [False, True], ids=["sum, then norm", "in one kernel"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_ranks_compute_what_transformers_does(
    case: Case, normed: bool, engines: dict[Case, Path], results: Jobs
) -> None:
    """Logits of prompts, chunks and CUDA graphs; and of greedy tokens, run ahead in graphs, each is the best by the float32
    logits for what came before it, or within the type's error of it."""
    needs_gpus(case.ranks)
    found = results(case)[str(engines[case]), normed]
    reference = hf_logits(case.variant, TOKENS)
    assert max_error(found["logits"], reference) <= logits_tolerance(case.dtype, reference)
    assert found["chosen"] == found["logits"].argmax(-1).tolist()  # by every rank, on its device
    agreed = 0
    for prompt, new in zip(PROMPTS, found["together"], strict=True):
        logits = hf_logits(case.variant, prompt + new)[len(prompt) - 1 : -1]
        chosen = logits[torch.arange(len(new)), torch.tensor(new)]
        assert (logits.max(-1).values - chosen).max() <= 2 * logits_tolerance(case.dtype, logits)
        agreed += int((logits.argmax(-1) == torch.tensor(new)).sum())
    assert agreed >= (0.97 if case.dtype is DType.FLOAT16 else 0.9) * sum(map(len, found["together"]))


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_kernel_of_small_sums(ranks: int) -> None:
    """Oracle: float64, and the bits of a float32 sum in the order of ranks."""
    needs_gpus(ranks)
    words = [sys.executable, "-m", "trtc.bench.all_reduce", "--nproc", str(ranks), "--check"]
    code, _, err = finish(words, JOB_S)
    assert code == 0, err


def test_nproc_gives_the_tokens_of_one_rank(engines: dict[Case, Path], results: Jobs, tmp_path: Path) -> None:
    """The launcher's ranks say what mpirun's did, and what one rank on one GPU says."""
    path = tmp_path / "out.json"
    prompt = ",".join(map(str, PROMPTS[0]))
    words = [*TRTC, "run", "--nproc", "2", "--input-ids", prompt, "--ignore-eos", "--max-output-len", "32"]
    code, _, err = finish([*words, "--output-json", str(path), "--engine-dir", str(engines[CASES[0]])], JOB_S)
    assert code == 0, err
    (found,) = json.loads(path.read_text())
    ranks = results(CASES[0])[str(engines[CASES[0]]), False]
    assert found["token_ids"] == ranks["alone"]
    one = compute(engines[CASES[0]._replace(tp_size=1)])
    assert_same_up_to_ties(CASES[0].variant, PROMPTS[0], found["token_ids"], one["alone"])
    tolerance = logits_tolerance(DType.FLOAT16, one["logits"])
    assert max_error(ranks["logits"], one["logits"]) <= tolerance


def test_a_model_of_1_3b_says_on_ranks_what_it_says_on_one(tmp_path: Path) -> None:
    """Oracle: float32 on the CPU, with the tokens that one rank generates; see `bench/rank_tokens.py`."""
    needs_gpus(2)
    sizes = [str(ranks) for ranks in (2, 4) if ranks <= torch.cuda.device_count()]
    words = [sys.executable, "-m", "trtc.bench.rank_tokens", "--size", "1.3b", "--work-dir", str(tmp_path)]
    words += ["--tp-sizes", *sizes, "--arch", "sm_{}{}".format(*torch.cuda.get_device_capability())]
    code, out, err = finish(words, JOB_S)
    assert code == 0, err
    for ranks in sizes:
        assert f"next tokens are the same on {ranks} ranks" in out


def test_more_ranks_than_gpus_are_refused(engines: dict[Case, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    code, _, err = finish(
        [*TRTC, "run", "--nproc", "2", "--input-ids", "2,5", "--engine-dir", str(engines[CASES[0]])]
    )
    assert code == 1
    assert f"rank 1 on host {socket.gethostname()} has no GPU: it is number 2 of the ranks there" in err


SPIN = """
import sys
from trtc.runtime.llm import LLM
from trtc.runtime.sampling_params import SamplingParams

with LLM(sys.argv[1]) as llm:
    params = SamplingParams(max_tokens=100, temperature=0, ignore_eos=True)
    while True:
        llm.generate([[2, 5]], params)
        print("said", flush=True)
"""
LAUNCH = """
import sys
from trtc.runtime.launcher import launch_ranks

sys.exit(launch_ranks([sys.executable, "-c", *sys.argv[1:]], 2))
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_rank_ends_the_job(how: signal.Signals, engines: dict[Case, Path], tmp_path: Path) -> None:
    """While rank 0 waits for its GPU, which waits for the other."""
    source = tmp_path / "engine"
    source.symlink_to(engines[CASES[0]])

    def first_token(process: Any) -> None:
        assert process.stdout.readline() == "said\n", process.communicate()

    err = lose(1, how, [sys.executable, "-c", LAUNCH, SPIN, str(source)], first_token)
    assert f"rank 1 on {'host ' if how == signal.SIGKILL else ''}{socket.gethostname()} (process " in err
