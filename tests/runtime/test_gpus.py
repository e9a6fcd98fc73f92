"""The GPU of a rank, what is set for NCCL, and GPUs that an engine is not for.

Oracles: the order of the ranks of a host, the user's own settings, and what `trtc build` takes.
"""

from __future__ import annotations

import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from trtc.core.errors import TargetError
from trtc.core.targets.cuda.code import ARCHITECTURES
from trtc.runtime import cuda_executor
from trtc.runtime.gpus import DEFAULTS, choose_device, set_defaults


def test_every_rank_of_a_host_has_a_gpu_of_its_own() -> None:
    ranks = [(0, 0), (1, 1), (2, 0), (3, 1)]  # two hosts
    assert [choose_device(rank, local, 2, {}) for rank, local in ranks] == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("count", "environ", "says"),
    [
        (1, {}, "torch sees 1 GPU; start fewer"),
        (0, {}, "torch sees 0 GPUs; build with --target cpu"),
        (1, {"CUDA_VISIBLE_DEVICES": "3"}, "torch sees 1 GPU, with CUDA_VISIBLE_DEVICES=3; start fewer"),
    ],
)
def test_too_few_gpus(count: int, environ: dict[str, str], says: str) -> None:
    with pytest.raises(TargetError) as error:
        choose_device(5, 1, count, environ)
    assert f"rank 5 on host {socket.gethostname()} has no GPU: it is number 2 of the ranks there" in str(
        error.value
    )
    assert says in str(error.value) and "\n" not in str(error.value)


def test_multicast_stays_off_unless_the_user_says_otherwise() -> None:
    environ = {"NCCL_NVLS_ENABLE": "1"}
    set_defaults(environ)
    assert environ == {**DEFAULTS, "NCCL_NVLS_ENABLE": "1"}
    assert DEFAULTS["TORCH_SYMM_MEM_DISABLE_MULTICAST"] == "1" and DEFAULTS["NCCL_NVLS_ENABLE"] == "0"


@pytest.mark.parametrize(
    ("gpu", "advised"), [("sm_90", "--cuda-arch"), ("sm_86", "--target"), ("sm_100", "--target")]
)
def test_a_gpu_that_an_engine_is_not_for(gpu: str, advised: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is advised is what a build accepts: an architecture that target cuda has, or another target."""
    monkeypatch.setattr(cuda_executor, "architecture", lambda device: gpu)
    rank = SimpleNamespace(artifacts={"code": {"sm_80": "kernels.sm_80.cubins"}})
    engine: Any = SimpleNamespace(path=Path("engine"), ranks=[rank], build=SimpleNamespace(tp_size=1))
    with pytest.raises(
        TargetError, match=f"built for sm_80, this GPU is {gpu}; build with {advised}"
    ) as error:
        cuda_executor.EngineKernels(engine, 0)
    assert (f"--cuda-arch {gpu}" in str(error.value)) == (gpu in ARCHITECTURES)
