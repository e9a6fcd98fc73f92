"""The GPU of a rank, and what is set for NCCL. Oracle: the order of the ranks of a host, and the user's own settings."""

from __future__ import annotations

import socket

import pytest
from trtc.core.errors import TargetError
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
