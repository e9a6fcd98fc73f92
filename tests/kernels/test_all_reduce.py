"""all_reduce: the protocol, step by step in any order, and the contract. The kernel itself needs two GPUs: `tests/gpu`."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from trtc.kernels.all_reduce import AllReduce, blocks, memory_bytes, sources
from trtc.kernels.errors import KernelContractError
from trtc.kernels.library import KernelLibrary

ROOMS = 2
"""As in all_reduce.cu."""


def rank_steps(
    rank: int, memory: list[dict[tuple[int, int, int], tuple[int, int]]], sizes: list[int], rooms: int
) -> Iterator[bool]:
    """What one rank does, a memory access a step, as all_reduce.cu has it; its blocks in a random order. Memory of a rank:
    (room, from, index) -> (number, data). Yields whether it got on; asserts that it sums what belongs together."""
    order = random.Random(rank)
    for number, size in enumerate(sizes, start=1):
        room = number % rooms
        indices = list(range(size))
        order.shuffle(indices)
        for index in indices:
            for peer in range(len(memory)):
                if peer != rank:
                    memory[peer][room, rank, index] = number, value(rank, number, index)
                    yield True
        for index in indices:
            for peer in range(len(memory)):
                while peer != rank and memory[rank].get((room, peer, index), (0, 0))[0] != number:
                    yield False
                if peer != rank:
                    assert memory[rank][room, peer, index][1] == value(peer, number, index)
                yield True


def value(rank: int, number: int, index: int) -> int:
    return (rank * 1000 + number) * 1000 + index


def run(ranks: int, sums: int, seed: int, rooms: int) -> bool:
    """Whether all ranks come to the end, in one random order of their steps."""
    chance = random.Random(seed)
    sizes = [chance.randint(1, 5) for _ in range(sums)]
    memory: list[dict[tuple[int, int, int], tuple[int, int]]] = [{} for _ in range(ranks)]
    running = {rank: rank_steps(rank, memory, sizes, rooms) for rank in range(ranks)}
    stuck: set[int] = set()
    while running:
        eager = chance.choice(list(running))
        for _ in range(chance.randint(1, 40)):  # one rank often runs far ahead
            got_on = next(running[eager], None)
            if got_on is None:
                del running[eager]
                stuck.clear()
                break
            if not got_on:
                stuck.add(eager)
                break
            stuck.clear()
        if running and stuck >= running.keys():
            return False
    return True


def test_two_rooms_are_enough() -> None:
    """Oracle: what each rank has sent, in 300 random orders of 2 to 4 ranks; one room is not enough."""
    assert all(run(2 + seed % 3, 6, seed, ROOMS) for seed in range(300))
    assert not all(run(2 + seed % 3, 6, seed, 1) for seed in range(300))


def make(max_bytes: int = 1024, ranks: int = 2) -> AllReduce:
    state = torch.zeros(2, dtype=torch.int32)
    return AllReduce(KernelLibrary(), [256 * (rank + 1) for rank in range(ranks)], 0, max_bytes, state)


def test_what_is_served() -> None:
    """Oracle: the contract."""
    reduce = make()
    assert reduce.serves(torch.zeros(8, 64, dtype=torch.float16))
    assert not reduce.serves(torch.zeros(9, 64, dtype=torch.float16))
    assert not reduce.serves(torch.zeros(3, 7, dtype=torch.float16))
    assert not reduce.serves(torch.zeros(0, 64, dtype=torch.float16))
    assert not reduce.serves(torch.zeros(8, 8, dtype=torch.float16).t()[:4])
    assert memory_bytes(1024, 4) == 4 * 4 * 1024 and memory_bytes(1000, 2) == 2 * 4 * 1008
    assert blocks(1) == 1 and blocks(257) == 2 and blocks(10**6) == 128
    assert sources("__half", 1) == () and sources("__half", 9) == ()


@pytest.mark.parametrize(
    ("x", "out", "says"),
    [
        (torch.zeros(600, dtype=torch.float16), torch.zeros(600, dtype=torch.float16), "x has 1200 bytes; accepted: mult"),
        (torch.zeros(8, dtype=torch.float16), torch.zeros(16, dtype=torch.float16), r"out is \[16\].*expected \[size_0=8\]"),
        (torch.zeros(8, dtype=torch.int64), torch.zeros(8, dtype=torch.int64), "dtype int64 is not supported"),
    ],
)  # fmt: skip
def test_contract_is_checked_before_anything_runs(x: torch.Tensor, out: torch.Tensor, says: str) -> None:
    """Oracle: the text; no GPU is touched."""
    with pytest.raises(KernelContractError, match=says):
        make()(x, out=out)


@pytest.mark.parametrize("ranks", [1, 9])
def test_numbers_of_ranks(ranks: int) -> None:
    with pytest.raises(KernelContractError, match=f"{ranks} ranks; accepted: 2 to 8"):
        make(ranks=ranks)
