"""What a command begins before it imports torch, and what it never imports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from trtc.core.errors import EngineError
from trtc.kernels import launch
from trtc.kernels.errors import DeviceError
from trtc.runtime import early_start, load
from trtc.runtime.early_start import BegunEngine, begin_loading
from trtc.tests.opt_models import OptCheckpoint, save_hf

UNWANTED = (
    "datasets", "fastapi", "lm_eval", "matplotlib", "mpi4py", "onnx", "pandas", "pydantic", "rouge_score", "safetensors",
    "scipy", "sympy", "tensorrt", "tensorrt_rtx", "torch._dynamo", "torch._inductor", "transformers", "uvicorn",
    "trtc.core.build", "trtc.core.checkpoint", "trtc.core.hf", "trtc.kernels.nvrtc", "trtc.runtime.follower",
    "trtc.runtime.server.app",
)  # fmt: skip
"""Modules that `trtc run` has no use for, on one rank of target cpu."""
RUN = """
import sys
from trtc.cli.main import main
from trtc.cli import run
from trtc.runtime.early_start import begin_loading as real

def begin_loading(*args, **options):
    files = real(*args, **options)
    print("before:", "torch" in sys.modules, "numpy" in sys.modules)
    return files

run.begin_loading = begin_loading
assert main(["run", "--engine-dir", sys.argv[1], "--input-ids", "5,6,7", "--max-output-len", "2"]) == 0
print("after:", "torch" in sys.modules, [name for name in sys.argv[2:] if name in sys.modules])
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("early")
    return OptCheckpoint.open(save_hf("pre_norm", folder / "hf")).build(folder / "engine")


def test_a_run_compares_files_before_it_imports_torch_and_imports_no_more_than_it_needs(built: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", RUN, str(built), *UNWANTED], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "before: False False\n" in result.stdout
    assert "after: True []\n" in result.stdout


def test_what_is_no_engine_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no such folder"):
        begin_loading(tmp_path / "none")


def test_ranks_of_a_job_begin_when_they_have_met(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(early_start, "placement", lambda: SimpleNamespace(size=2))
    assert begin_loading(built) == built


def test_weights_start_on_their_way_for_target_cuda_only(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[Path]] = []

    class Early:
        def __init__(self, paths: list[Path]) -> None:
            started.append(paths)

    monkeypatch.setattr(early_start, "EarlyWeights", Early)
    monkeypatch.setattr(launch, "bindings", lambda: None)
    assert begin_loading(built).weights is None
    assert not started
    monkeypatch.setattr(BegunEngine, "target", "cuda")
    assert isinstance(begin_loading(built).weights, Early)
    assert started == [[built / "rank0-0.safetensors"]]


def test_an_executor_takes_the_weights_that_are_on_their_way(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for the executor of target cuda, which needs a GPU."""
    taken: list[object] = []
    monkeypatch.setattr(early_start, "EarlyWeights", lambda paths: "on their way")
    monkeypatch.setattr(launch, "bindings", lambda: None)
    monkeypatch.setattr(BegunEngine, "target", "cuda")
    monkeypatch.setattr(load, "_cuda", lambda *args: taken.append(args[2]))
    load.load_executor(begin_loading(built))
    assert taken == ["on their way"]


def test_without_cuda_python_nothing_starts(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise DeviceError("cuda-python is not installed")

    monkeypatch.setattr(launch, "bindings", missing)
    monkeypatch.setattr(BegunEngine, "target", "cuda")
    assert begin_loading(built).weights is None
