"""all_reduce: the protocol, step by step in any order, and the contract. The kernels themselves need two GPUs: `tests/gpu`."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest
import torch
from trtc.kernels.all_reduce import AllReduce, blocks, memory_bytes, norm, sources, two_shot
from trtc.kernels.all_reduce.norm import AllReduceNorm
from trtc.kernels.all_reduce.reference import all_reduce, all_reduce_norm, rounded_once
from trtc.kernels.all_reduce.two_shot import Cut, TwoShotAllReduce, pieces, plain_cut
from trtc.kernels.errors import KernelContractError
from trtc.kernels.library import KernelLibrary

ROOMS = 2
"""As in all_reduce.cu."""


Memory = dict[tuple[str, int, int, int], tuple[int, int]]
"""Of a rank: (for what, room, from, index) -> (number, data)."""


WAYS = ("one step", "two steps", "rows", "rows in two steps")
Sum = tuple[int, str]
"""Vectors, or rows, and the way they are summed."""


def rank_steps(rank: int, memory: list[Memory], sums: list[Sum], rooms: int) -> Iterator[bool]:
    """What one rank does, a memory access a step, as the kernels have it; its blocks in a random order. Yields whether it
    got on; asserts that it sums what belongs together."""
    order = random.Random(rank)
    ranks = len(memory)
    peers = [peer for peer in range(ranks) if peer != rank]

    def give(what: str, peer: int, slot: int, data: int) -> None:
        memory[peer][what, room, rank, slot] = number, data

    def receive(what: str, peer: int, slot: int, expected: int) -> Iterator[bool]:
        while memory[rank].get((what, room, peer, slot), (0, 0))[0] != number:
            yield False
        assert memory[rank][what, room, peer, slot][1] == expected
        yield True

    def row_block(first: int, step: int, in_two: bool) -> Iterator[bool]:
        """A block of all_reduce_norm.cu: rows `first`, `first + step`, ... In two steps, row r belongs to rank r % ranks."""

        def give_part(row: int) -> Iterator[bool]:
            if row < size:
                for peer in [row % ranks] if in_two else peers:
                    if peer != rank:
                        give("piece" if in_two else "part", peer, slot(row), value(rank, number, row))
                        yield True

        def slot(row: int) -> int:
            return row // ranks if in_two else row

        yield from give_part(first)
        for row in range(first, size, step):
            yield from give_part(row + step)
            owner = row % ranks
            if in_two and owner != rank:
                yield from receive("sum", owner, slot(row), total(ranks, number, row))
                continue
            for peer in peers:
                yield from receive("piece" if in_two else "part", peer, slot(row), value(peer, number, row))
            for peer in peers if in_two else ():
                give("sum", peer, slot(row), total(ranks, number, row))
                yield True

    for number, (size, way) in enumerate(sums, start=1):
        room = number % rooms
        if way.startswith("rows"):
            count = 1 + rank % 3  # GPUs need not have as many blocks as each other
            yield from side_by_side([row_block(i, count, way != "rows") for i in range(count)], order)
            continue
        if way == "one step":
            for index in shuffled(range(size), order):
                for peer in peers:
                    give("part", peer, index, value(rank, number, index))
                    yield True
            for index in shuffled(range(size), order):
                for peer in peers:
                    yield from receive("part", peer, index, value(peer, number, index))
            continue
        piece = -(-size // ranks)
        for index in shuffled(range(piece), order):
            for peer in peers:
                if (at := peer * piece + index) < size:
                    give("piece", peer, index, value(rank, number, at))
                    yield True
        for index in shuffled(range(min(piece, size - rank * piece)), order):
            at = rank * piece + index
            for peer in peers:
                yield from receive("piece", peer, index, value(peer, number, at))
            for peer in peers:
                give("sum", peer, index, total(ranks, number, at))
                yield True
        for index in shuffled(range(piece), order):
            for peer in peers:
                if (at := peer * piece + index) < size:
                    yield from receive("sum", peer, index, total(ranks, number, at))


def side_by_side(blocks: list[Iterator[bool]], order: random.Random) -> Iterator[bool]:
    """A step of every block in turn; whether any of them got on."""
    while blocks:
        order.shuffle(blocks)
        steps = [(block, next(block, None)) for block in blocks]
        blocks = [block for block, got_on in steps if got_on is not None]
        yield any(got_on is not False for _, got_on in steps)


def shuffled(indices: range, order: random.Random) -> list[int]:
    found = list(indices)
    order.shuffle(found)
    return found


def total(ranks: int, number: int, index: int) -> int:
    return sum(value(rank, number, index) for rank in range(ranks))


def value(rank: int, number: int, index: int) -> int:
    return (rank * 1000 + number) * 1000 + index


def run(ranks: int, count: int, seed: int, rooms: int, ways: tuple[str, ...]) -> bool:
    """Whether all ranks come to the end, in one random order of their steps."""
    chance = random.Random(seed)
    sums = [(chance.randint(1, 5 + ranks), chance.choice(ways)) for _ in range(count)]
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


@pytest.mark.parametrize("ways", [WAYS[:1], WAYS[1:2], WAYS[:2], WAYS[2:3], WAYS[3:], WAYS], ids=str)
def test_two_rooms_are_enough(ways: tuple[str, ...]) -> None:
    """Oracle: what each rank has sent, in 300 random orders of 2 to 4 ranks, also where there is no piece for every rank. One
    room is enough in two steps alone, after which a rank knows that all have read what it gave them first."""
    assert all(run(2 + seed % 3, 6, seed, ROOMS, ways) for seed in range(300))
    in_two = all(way.endswith("two steps") for way in ways)
    assert all(run(2 + seed % 3, 6, seed, 1, ways) for seed in range(300)) == in_two


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


def test_reference_of_the_sum_and_its_norm() -> None:
    """Oracle: by hand. In float16, 2048 + 1 is 2048 where it is rounded, and the residual comes last."""
    parts = [
        torch.tensor([[2048.0, -1.0]], dtype=torch.float16),
        torch.tensor([[1.0, -1.0]], dtype=torch.float16),
    ]
    residual = torch.tensor([[1.0, 0.0]], dtype=torch.float16)
    assert all_reduce(parts).tolist() == [[2049.0, -2.0]]
    assert rounded_once(parts).tolist() == [[2048.0, -2.0]]
    total, normed = all_reduce_norm(parts, residual=residual, epsilon=0.0)
    assert total.tolist() == [[2050.0, -2.0]] and normed.tolist() == [[1.0, -1.0]]
    _, normed = all_reduce_norm(parts, residual, kind="rms", epsilon=0.0)
    assert torch.allclose(normed, torch.tensor([[2**0.5, 0.0]], dtype=torch.float64), atol=1e-5)


def test_which_rows_are_normed_as_well() -> None:
    """Oracle: the contract. In two steps a rank has room for its rows, which come whole."""
    normed = AllReduceNorm(make(1024, 3, 6000))
    assert normed.serves(torch.zeros(8, 64, dtype=torch.float16))
    assert not normed.serves(torch.zeros(512, dtype=torch.float16))
    assert not normed.serves(torch.zeros(2, 12, dtype=torch.float16))
    assert not normed.serves(torch.zeros(8, 64, dtype=torch.float16).t())
    assert not normed.serves(torch.zeros(0, 64, dtype=torch.float16))
    assert not normed.serves(torch.zeros(9, 64, dtype=torch.float16), two_shot=False)
    assert normed.serves(
        torch.zeros(45, 64, dtype=torch.float16)
    )  # 15 rows of 8 vectors each; there is room for 125
    assert not normed.serves(torch.zeros(46, 64, dtype=torch.float16))
    assert normed.serves(torch.zeros(2, 64, dtype=torch.float16), two_shot=True)
    assert norm.sources("__half", 1) == norm.sources("__half", 9) == norm.sources("__half", 2, ()) == ()


@pytest.mark.parametrize(
    ("columns", "blocks_of"), [(768, [768]), (4096, [4096]), (5120, [2560] * 2), (9216, [3072] * 3)]
)
def test_blocks_share_long_rows(columns: int, blocks_of: list[int]) -> None:
    assert norm._block_columns(columns, 8, norm.BLOCK_VECTORS) * len(blocks_of) >= columns
    assert norm._block_columns(columns, 8, norm.BLOCK_VECTORS) == blocks_of[0]


def make_two_shot(max_bytes: int = 1024, ranks: int = 2, first: int = 256) -> TwoShotAllReduce:
    memory = [first * (rank + 1) for rank in range(ranks)]
    return TwoShotAllReduce(KernelLibrary(), memory, 0, max_bytes, torch.zeros(2, dtype=torch.int32))


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_how_a_sum_in_two_steps_is_cut(ranks: int) -> None:
    """Every vector of a row is in a piece, in lines of seven; what is lent has room for every rank's lines, and for no more
    vectors than 4 % beyond."""
    rows = Cut(64 * 1152, 1152, ranks)
    assert rows.rows == 64 and rows.piece_lines * 7 * pieces(ranks) >= 1152 > (
        rows.piece_lines - 1
    ) * 7 * pieces(ranks)
    assert rows.lines == 64 * rows.piece_lines * pieces(ranks) // ranks
    assert rows.threads % 32 == 0 and 0 <= rows.threads - 8 * rows.piece_lines < 32
    assert plain_cut(16, ranks).threads == plain_cut(1 << 20, ranks).threads == two_shot.THREADS
    whole = plain_cut(1 << 20, ranks)
    assert 1 << 16 <= whole.lines * 7 * ranks <= 1.04 * (1 << 16)
    assert two_shot.memory_bytes(1 << 20, ranks) == whole.lines * 128 * ranks * 2 * 2
    assert two_shot.memory_bytes(0, ranks) == 0 and two_shot.sources("__half", 9) == ()


def test_what_is_summed_in_two_steps() -> None:
    """Oracle: the contract. 30000 bytes in rows of 3 x 224 vectors are 3 times 32 lines of each rank."""
    reduce = make_two_shot(30000, 3)
    assert reduce.serves(torch.zeros(3 * 672, 8, dtype=torch.float16))
    assert not reduce.serves(torch.zeros(3 * 672 + 1, 8, dtype=torch.float16))
    assert not reduce.serves(torch.zeros(0, 8, dtype=torch.float16))
    assert not reduce.serves(torch.zeros(3, 7, dtype=torch.float16))
    with pytest.raises(KernelContractError, match="all_reduce_two_shot: memory is not 128-byte aligned"):
        make_two_shot(first=64)


def test_which_rows_are_normed_in_lines() -> None:
    """Oracle: the contract. There are 96 lines of each rank; a row of 8 vectors takes one of each, one of 169 takes nine."""
    reduce = make_two_shot(30000, 3)
    assert reduce.norms(torch.zeros(96, 64, dtype=torch.float16))
    assert not reduce.norms(torch.zeros(97, 64, dtype=torch.float16))
    assert reduce.norms(torch.zeros(10, 8 * 169, dtype=torch.float16))
    assert not reduce.norms(torch.zeros(11, 8 * 169, dtype=torch.float16))
    assert reduce.norms(torch.zeros(1, 8 * 1344, dtype=torch.float16))
    assert not reduce.norms(torch.zeros(1, 8 * 1345, dtype=torch.float16))
    assert not reduce.norms(torch.zeros(512, dtype=torch.float16))
    assert not reduce.norms(torch.zeros(2, 12, dtype=torch.float16))
    assert not reduce.norms(torch.zeros(8, 64, dtype=torch.float16).t())
    assert not reduce.norms(torch.zeros(0, 64, dtype=torch.float16))


NORMS: dict[str, tuple[Callable[..., object], str]] = {
    "all_reduce_norm": (
        AllReduceNorm(make()), r", 1280 bytes; accepted: up to 0 in rows of a multiple of 16 bytes, up to 65536 \(before "
    ),
    "all_reduce_two_shot": (
        make_two_shot(0).norm, "; accepted: rows of a multiple of 16 bytes up to 28672, of which each rank's pieces fit 0 lines"
    ),
}  # fmt: skip
"""What norms the sums too, and what it says of one that is too large."""


@pytest.mark.parametrize("op", NORMS)
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kind": "batch"}, "kind 'batch' is unknown; accepted: layer, rms"),
        ({"out": torch.zeros(2, 8, dtype=torch.float16)}, r"out is \[2, 8\].*expected \[rows=40, columns=16\]"),
        ({"residual": torch.zeros(40, 16)}, "residual is .* float32 on cpu; expected"),
        ({"scale": torch.zeros(2, 16, dtype=torch.float16)}, r"scale is .*expected \[columns=16\]"),
        ({}, r"x is \[40, 16\]"),
    ],
)  # fmt: skip
def test_contract_of_the_norm(op: str, change: dict[str, object], says: str) -> None:
    """Oracle: the text; no GPU is touched."""
    launch, limits = NORMS[op]
    like = torch.zeros(40, 16, dtype=torch.float16)
    with pytest.raises(KernelContractError, match=f"{op}: {says}{'' if change else limits}"):
        launch(**{"x": like, "out": like, **change})


@pytest.mark.parametrize("ranks", [1, 9])
def test_numbers_of_ranks(ranks: int) -> None:
    with pytest.raises(KernelContractError, match=f"{ranks} ranks; accepted: 2 to 8"):
        make(ranks=ranks)
