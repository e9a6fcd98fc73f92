"""Which way a sum takes, and what happens without shared memory. Oracle: a group that writes down what it is asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch
from trtc.core.targets.cuda.sums import NormingCommunicator
from trtc.kernels.all_reduce import AllReduce, memory_bytes
from trtc.kernels.all_reduce.norm import AllReduceNorm
from trtc.kernels.all_reduce.two_shot import TwoShotAllReduce
from trtc.kernels.all_reduce.two_shot import memory_bytes as line_bytes
from trtc.kernels.library import KernelLibrary
from trtc.runtime import gpu_communicator, peer_memory
from trtc.runtime.distributed import RankGroup
from trtc.runtime.gpu_communicator import GpuCommunicator, largest_small_sum, largest_two_shot_sum
from trtc.runtime.peer_memory import PeerMemory, lend_memory

CPU = torch.device("cpu")


class Group:
    """Rank 1 of several; the others say `others` where all must agree."""

    rank, member, name = 1, 1, "rank 1 on here (process 7)"

    def __init__(self, size: int = 2, *, one_host: bool = True, others: Sequence[int] = (1, 1)) -> None:
        self.size, self.one_host, self._others = size, one_host, list(others)
        self.num_peers = size
        self.calls: list[Any] = []

    def connect_gpus(self, device: torch.device) -> None:
        self.calls.append("connect")

    def least(self, value: int) -> int:
        self.calls.append("agree")
        return min(value, self._others.pop(0))

    def all_reduce(self, x: torch.Tensor, *, overwrite: bool = False) -> torch.Tensor:
        self.calls.append(("nccl", x.nbytes, overwrite))
        return x

    def all_gather(self, x: torch.Tensor, axis: int) -> torch.Tensor:
        self.calls.append(("gather", axis))
        return x


@pytest.fixture(autouse=True)
def packets(monkeypatch: pytest.MonkeyPatch) -> None:
    """No NVLink between all GPUs, if a test does not say otherwise."""
    monkeypatch.setattr(gpu_communicator, "are_linked", lambda _: False)


def lent(group: RankGroup, device: torch.device, size: int) -> PeerMemory:
    limits = largest_small_sum(group.size), largest_two_shot_sum(group.size)
    assert size == memory_bytes(limits[0], group.size, limits[1])
    return PeerMemory(torch.zeros(1), None, tuple(range(256, 256 * (group.size + 1), 256)))


def test_small_sums_go_through_memory_all_else_through_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    group, summed = Group(), []

    def kernel(
        self: AllReduce, x: torch.Tensor, *, out: torch.Tensor, dependent: bool = True
    ) -> torch.Tensor:
        summed.append((x.nbytes, out is x))
        return out

    monkeypatch.setattr(gpu_communicator, "lend_memory", lent)
    monkeypatch.setattr(AllReduce, "__call__", kernel)
    communicator = GpuCommunicator(cast(RankGroup, group), CPU, KernelLibrary())
    limit = largest_small_sum(2)
    small, large = (torch.zeros(size // 2, dtype=torch.float16) for size in (limit, limit + 16))
    assert communicator.all_reduce(small, overwrite=True) is small
    assert communicator.all_reduce(small) is not small
    communicator.all_reduce(large, overwrite=True)
    communicator.all_reduce(torch.zeros(3, dtype=torch.float16))  # no whole vector
    communicator.all_gather(small, 1)
    assert summed == [(limit, True), (limit, False)]
    assert group.calls == ["connect", ("nccl", limit + 16, True), ("nccl", 6, False), ("gather", 1)]


@pytest.mark.parametrize(("ranks", "least"), [(2, 64), (4, 13)])
def test_sums_of_some_sizes_are_made_with_their_norms(
    ranks: int, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is shared memory between the GPUs, and of sizes for which that was measured to be faster."""
    monkeypatch.setattr(gpu_communicator, "lend_memory", lent)
    communicator = GpuCommunicator(cast(RankGroup, Group(ranks)), CPU, KernelLibrary())
    assert isinstance(communicator, NormingCommunicator)
    sizes = {rows: torch.zeros(rows, 4096, dtype=torch.float16) for rows in (least - 1, least, 288, 289)}
    assert [communicator.norms(x) for x in sizes.values()] == [False, True, True, False]
    x = sizes[288]
    assert not communicator.norms(x.view(-1))
    given: list[Any] = []
    monkeypatch.setattr(
        AllReduceNorm, "__call__", lambda _, *args, **named: given.append((*args, *named.values()))
    )
    communicator.all_reduce_norm(x, None, None, out=x, residual=x, total=None, kind="rms", epsilon=0.5)
    assert given == [(x, None, None, x, x, None, "rms", 0.5)]
    monkeypatch.setattr(gpu_communicator, "lend_memory", lambda *_: None)
    assert not GpuCommunicator(cast(RankGroup, Group()), CPU, KernelLibrary()).norms(x)


@pytest.mark.parametrize("ranks", [3, 4, 8])
def test_sums_in_lines(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step, then lines with and without a norm, then NCCL, and packets alone where NVLink does not connect all GPUs."""
    before, most = (
        gpu_communicator.largest_sum_before_lines(ranks),
        gpu_communicator.largest_sum_in_lines(ranks),
    )
    size = line_bytes(most, ranks) + memory_bytes(before, ranks)
    summed: list[Any] = []

    def lines(group: RankGroup, device: torch.device, asked: int) -> PeerMemory:
        assert asked == size
        return PeerMemory(torch.zeros(1), None, tuple(range(256, 256 * (ranks + 1), 256)))

    monkeypatch.setattr(gpu_communicator, "lend_memory", lines)
    monkeypatch.setattr(gpu_communicator, "are_linked", lambda _: True)
    for kernel in (AllReduce, TwoShotAllReduce):
        monkeypatch.setattr(
            kernel, "__call__", lambda one, x, *, out: summed.append((type(one), x.nbytes)) or out
        )
    group = Group(ranks)
    communicator = GpuCommunicator(cast(RankGroup, group), CPU, KernelLibrary())
    for size_of in (before, before + 16, most, 20 << 20):
        communicator.all_reduce(torch.zeros(size_of // 2, dtype=torch.float16))
    assert summed == [(AllReduce, before), (TwoShotAllReduce, before + 16), (TwoShotAllReduce, most)]
    assert group.calls == ["connect", "agree", ("nccl", 20 << 20, False)]
    rows = before // 8192
    assert [communicator.norms(torch.zeros(n, 4096, dtype=torch.float16)) for n in (rows, rows + 1)] == [
        False,
        True,
    ]
    monkeypatch.setattr(gpu_communicator, "are_linked", lambda _: False)
    monkeypatch.setattr(gpu_communicator, "lend_memory", lent)
    unlinked = GpuCommunicator(cast(RankGroup, Group(ranks)), CPU, KernelLibrary())
    unlinked.all_reduce(torch.zeros(before // 2 + 8, dtype=torch.float16))
    assert summed[-1] == (AllReduce, before + 16)


def test_a_second_step_saves_as_much_with_any_number_of_gpus() -> None:
    assert largest_small_sum(2) == gpu_communicator.SENT_BYTES // 2
    assert largest_small_sum(4) == 100 << 10
    for ranks in range(3, 9):
        limit = largest_small_sum(ranks)
        saved = limit * (2 * (ranks - 1) - 4 * (ranks - 1) / ranks)
        assert saved == pytest.approx(gpu_communicator.SAVED_BYTES, rel=0.01) and limit % 16 == 0


def test_lines_save_and_send_as_much_with_any_number_of_gpus() -> None:
    """Of 128 bytes in a line 112 are data; two steps send two of a rank's pieces to each other rank."""
    for ranks in range(3, 9):
        in_lines = 128 / 112 * 2 * (ranks - 1) / ranks  # bytes sent for one of a part
        before, most = (
            gpu_communicator.largest_sum_before_lines(ranks),
            gpu_communicator.largest_sum_in_lines(ranks),
        )
        assert before * (2 * (ranks - 1) - in_lines) == pytest.approx(
            gpu_communicator.LINES_SAVED_BYTES, rel=0.01
        )
        assert most * in_lines == pytest.approx(gpu_communicator.SENT_BYTES, rel=0.01)
        assert before % 16 == most % 16 == 0


def test_more_gpus_send_no_more() -> None:
    in_two = {ranks: largest_two_shot_sum(ranks) for ranks in range(3, 9)}
    sent = [2 * 2 * (ranks - 1) * -(-size // ranks) for ranks, size in in_two.items()]
    assert all(
        0.99 * gpu_communicator.SENT_BYTES < size <= 1.01 * gpu_communicator.SENT_BYTES for size in sent
    )
    assert all(
        size > largest_small_sum(ranks) for ranks, size in in_two.items()
    ) and not largest_two_shot_sum(2)


@pytest.mark.parametrize("size", [2, 9])
def test_without_shared_memory_nccl_sums(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks on two hosts, and more ranks than the kernel takes."""
    group = Group(size, one_host=size > 8)
    communicator = GpuCommunicator(cast(RankGroup, group), CPU, KernelLibrary())
    communicator.all_reduce(torch.zeros(64))
    assert communicator.small is None and group.calls == ["connect", ("nccl", 256, False)]


def test_the_switch_leaves_all_sums_to_nccl(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peer_memory, "_rendezvous", lambda *_: pytest.fail("memory is lent"))
    monkeypatch.setenv("TRTC_PEER_MEMORY", "0")
    group = Group()
    assert lend_memory(cast(RankGroup, group), CPU, 64) is None
    assert group.calls == ["agree"] and capsys.readouterr().err == ""


@pytest.mark.parametrize(("fails", "others"), [(True, (1, 1)), (False, (1, 0)), (False, (0,))])
def test_all_ranks_lend_or_none(
    fails: bool, others: Sequence[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rank that cannot says why, in one line; the others follow."""

    def rendezvous(group: RankGroup, device: torch.device, size: int) -> PeerMemory:
        if fails:
            raise RuntimeError("CUDA driver error: not supported\nException raised from alloc")
        return PeerMemory(torch.zeros(1), None, (16, 32))

    monkeypatch.setattr(peer_memory, "_rendezvous", rendezvous)
    group = Group(others=others)
    assert lend_memory(cast(RankGroup, group), CPU, 64) is None
    assert group.calls == ["agree"] * len(others)
    said = capsys.readouterr().err
    expected = (
        "trtc: rank 1 on here (process 7): no memory shared between GPUs, small sums go through NCCL too: "
    )
    assert said == (f"{expected}CUDA driver error: not supported\n" if fails else "")
