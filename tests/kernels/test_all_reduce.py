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


Memory = dict[tuple[str, int, int, int], tuple[int, int]]
"""Of a rank: (for what, room, from, index) -> (number, data)."""


def rank_steps(rank: int, memory: list[Memory], sums: list[tuple[int, bool]], rooms: int) -> Iterator[bool]:
    """What one rank does, a memory access a step, as all_reduce.cu has it; its blocks in a random order. Yields whether it
    got on; asserts that it sums what belongs together. sums: (size, whether in two steps)."""
    order = random.Random(rank)
    ranks = len(memory)
    peers = [peer for peer in range(ranks) if peer != rank]

    def receive(what: str, peer: int, index: int, expected: int) -> Iterator[bool]:
        while memory[rank].get((what, room, peer, index), (0, 0))[0] != number:
            yield False
        assert memory[rank][what, room, peer, index][1] == expected
        yield True

    for number, (size, two_shot) in enumerate(sums, start=1):
        room = number % rooms
        if not two_shot:
            for index in shuffled(range(size), order):
                for peer in peers:
                    memory[peer]["part", room, rank, index] = number, value(rank, number, index)
                    yield True
            for index in shuffled(range(size), order):
                for peer in peers:
                    yield from receive("part", peer, index, value(peer, number, index))
            continue
        piece = -(-size // ranks)
        for index in shuffled(range(piece), order):
            for peer in peers:
                if (at := peer * piece + index) < size:
                    memory[peer]["piece", room, rank, index] = number, value(rank, number, at)
                    yield True
        for index in shuffled(range(min(piece, size - rank * piece)), order):
            at = rank * piece + index
            for peer in peers:
                yield from receive("piece", peer, index, value(peer, number, at))
            for peer in peers:
                memory[peer]["sum", room, rank, index] = number, total(ranks, number, at)
                yield True
        for index in shuffled(range(piece), order):
            for peer in peers:
                if (at := peer * piece + index) < size:
                    yield from receive("sum", peer, index, total(ranks, number, at))


def shuffled(indices: range, order: random.Random) -> list[int]:
    found = list(indices)
    order.shuffle(found)
    return found


def total(ranks: int, number: int, index: int) -> int:
    return sum(value(rank, number, index) for rank in range(ranks))


def value(rank: int, number: int, index: int) -> int:
    return (rank * 1000 + number) * 1000 + index


def run(ranks: int, count: int, seed: int, rooms: int, two_shot: float = 0.0) -> bool:
    """Whether all ranks come to the end, in one random order of their steps. two_shot: the share of sums in two steps."""
    chance = random.Random(seed)
    sums = [(chance.randint(1, 5 + ranks), chance.random() < two_shot) for _ in range(count)]
    memory: list[Memory] = [{} for _ in range(ranks)]
    running = {rank: rank_steps(rank, memory, sums, rooms) for rank in range(ranks)}
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


def test_two_rooms_are_enough_for_sums_in_two_steps_too() -> None:
    """Alone and among the others, also where there is no piece for every rank."""
    for share in (1.0, 0.5):
        assert all(run(2 + seed % 3, 6, seed, ROOMS, share) for seed in range(300))
    assert not all(run(2 + seed % 3, 6, seed, 1, 0.5) for seed in range(300))


def make(max_bytes: int = 1024, ranks: int = 2, two_shot_bytes: int = 0) -> AllReduce:
    state = torch.zeros(2, dtype=torch.int32)
    memory = [256 * (rank + 1) for rank in range(ranks)]
    return AllReduce(KernelLibrary(), memory, 0, max_bytes, state, two_shot_bytes)


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


def test_larger_sums_are_made_in_two_steps() -> None:
    reduce = make(1024, 3, 6000)
    one, two, more = (torch.zeros(size // 2, dtype=torch.float16) for size in (1024, 6000, 6032))
    assert [reduce.serves(x) for x in (one, two, more)] == [True, True, False]
    assert reduce.serves(one, two_shot=True) and not reduce.serves(two, two_shot=False)
    assert memory_bytes(1024, 3, 6000) == 3 * 4 * 16 * (64 + 2 * 125)


@pytest.mark.parametrize(
    ("x", "out", "says"),
    [
        (torch.zeros(600, dtype=torch.float16), torch.zeros(600, dtype=torch.float16), "x has 1200 bytes; .* up to 0"),
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
