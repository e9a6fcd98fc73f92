"""What a command begins before it imports torch, and what it never imports."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from trtc.core.engine_files import EngineFiles
from trtc.core.errors import EngineError
from trtc.kernels import launch
from trtc.kernels.errors import DeviceError
from trtc.runtime import early_start
from trtc.runtime.early_start import begin_loading
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


@pytest.mark.parametrize("broken", [False, True])
def test_the_gpu_is_opened_meanwhile(built: Path, monkeypatch: pytest.MonkeyPatch, broken: bool) -> None:
    """In a thread, for target cuda only; what is wrong with it is left to the executor to say."""
    opened: list[threading.Thread] = []

    def context() -> None:
        opened.append(threading.current_thread())
        if broken:
            raise DeviceError("no GPU")

    monkeypatch.setattr(launch, "primary_context", context)
    monkeypatch.setattr(launch, "bindings", lambda: None)
    begin_loading(built)
    assert not opened
    monkeypatch.setattr(EngineFiles, "target", "cuda")
    begin_loading(built)
    for thread in threading.enumerate():
        if thread.name == "open-gpu":
            thread.join()
    (thread,) = opened
    assert thread is not threading.main_thread()


def test_without_cuda_python_there_is_nothing_to_open(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise DeviceError("cuda-python is not installed")

    monkeypatch.setattr(launch, "bindings", missing)
    monkeypatch.setattr(EngineFiles, "target", "cuda")
    begin_loading(built)
    assert not [thread for thread in threading.enumerate() if thread.name == "open-gpu"]
