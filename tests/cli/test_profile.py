"""`trtc profile`. Oracle: an operator of torch that the test itself puts into every step."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from trtc.cli.main import main
from trtc.core.targets.cpu import CpuProgram
from trtc.kernels import cpu_step
from trtc.tests.tiny_opt import build_tiny_opt


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_opt(tmp_path_factory.mktemp("profile") / "engine", "--max-batch-size", "2")


def with_more(method: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def changed(self: CpuProgram, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        torch.cumprod(torch.ones(1 << 18), 0)
        return method(self, inputs)

    return changed


def test_every_kernel_of_a_step_is_counted(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("run", "next_tokens"):
        monkeypatch.setattr(CpuProgram, name, with_more(getattr(CpuProgram, name)))
    report = tmp_path / "profile.json"
    command = f"profile --engine-dir {engine} --batch 2 --input-len 16 --steps 3 --top 4 --json {report}"
    assert main(command.split()) == 0
    prefill, decode = json.loads(report.read_text())
    assert (prefill["phase"], prefill["steps"]) == ("prefill", 1)
    assert (decode["phase"], decode["steps"]) == ("decode", 3)
    for found in (prefill, decode):
        times = [kernel["time_us"] for kernel in found["kernels"]]
        assert times == sorted(times, reverse=True) and times[-1] > 0
        (ours,) = [kernel for kernel in found["kernels"] if kernel["name"] == "aten::cumprod"]
        assert ours["calls"] == 1
        assert 0 < ours["time_us"] < sum(times)
        assert found["wall_us"] > 0
    names = {kernel["name"]: kernel["calls"] for kernel in decode["kernels"]}
    assert names.get("trtc::cpu_step") == (1 if cpu_step.library() else None)
    printed, others = capfd.readouterr()
    # The library behind the profiler writes to the file descriptor.
    assert others == "" or torch.cuda.is_available()
    assert printed.count("others") == 2
    assert "decode, batch 2: " in printed


def test_whole_prompts_are_prefilled(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the tokens asked for, of which the prefix cache must know none."""
    tokens: list[int] = []

    def counted(method: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def changed(self: CpuProgram, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
            tokens.append(len(inputs["token_ids"]))
            return method(self, inputs)

        return changed

    for name in ("run", "next_tokens"):
        monkeypatch.setattr(CpuProgram, name, counted(getattr(CpuProgram, name)))
    assert (
        main(
            ["profile", "--engine-dir", str(engine), *["--batch", "2", "--input-len", "100", "--steps", "2"]]
        )
        == 0
    )
    assert tokens.count(200) > 3 and set(tokens) <= {200, 2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--batch 0", "batch is 0; accepted: 1 to the engine's max_batch_size, 2"),
        ("--batch 3", "batch is 3; accepted: 1 to the engine's max_batch_size, 2"),
        ("--steps 0", "steps is 0; accepted: at least 1"),
        ("--input-len -1", "input_len is -1; accepted: 1 to the engine's max_input_len, 1023"),
        (f"--input-len {10**12}", f"input_len is {10**12}; accepted: 1 to the engine's max_input_len, 1023"),
    ],
)
def test_what_cannot_be_profiled(
    engine: Path, options: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the limits in the message."""
    assert main(["profile", "--engine-dir", str(engine), *options.split()]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert message in err
