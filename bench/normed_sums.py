"""Sums over the GPUs with the residual and the norm behind them, in one kernel and in two; a part of `bench/all_reduce.py`."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from ..kernels.all_reduce import AllReduce
from ..kernels.all_reduce.norm import BLOCK_VECTORS, AllReduceNorm
from ..kernels.all_reduce.reference import all_reduce_norm as reference
from ..kernels.all_reduce.reference import rounded_once
from ..kernels.all_reduce.two_shot import TwoShotAllReduce
from ..kernels.layer_norm import KINDS, LayerNorm
from ..runtime.distributed import RankGroup
from .kernels.harness import time_launches

SHAPES = tuple(itertools.product((1, 8, 17, 32, 64, 128), (2048, 4096, 5120, 9216)))
"""(rows, columns) of decode steps of 1.3B, 6.7B, 13B and 66B."""
CHECKED = ((1, 768), (3, 24), (17, 2048), (64, 4096), (33, 5120), (64, 9216), (300, 1024), (5, 12288))
RELATIVE_ERROR = {torch.float16: 1e-3, torch.bfloat16: 8e-3}
TWO, ONE, HALVES, TWO_SHOT = "sum, norm", "one kernel", "one kernel, smaller blocks", "one kernel, two-shot"
TWO_LINES, LINES = "sum in lines, norm", "one kernel, lines"
CHECKED_WAYS: tuple[str, ...] = (ONE, HALVES, TWO_SHOT, LINES)
LAUNCHES = 40
REPLAYS = 30


@dataclass(frozen=True)
class NormedRow:
    """us: median of `samples`, microseconds a residual sum with its norm, float16."""

    way: str
    rows: int
    columns: int
    us: float
    samples: list[float] = field(repr=False)


@dataclass(frozen=True)
class Case:
    """What all ranks bring, on this one's GPU, and where the result goes."""

    parts: list[torch.Tensor]
    residual: torch.Tensor | None
    scale: torch.Tensor | None
    shift: torch.Tensor | None
    kind: str
    total: torch.Tensor
    out: torch.Tensor


class NormedSums:
    """On one rank. reduce: its kernels of sums, with room for all of SHAPES and CHECKED."""

    def __init__(self, group: RankGroup, reduce: AllReduce, lines: TwoShotAllReduce) -> None:
        self._group, self._reduce, self._lines = group, reduce, lines
        self._normed, self._norm = AllReduceNorm(reduce), LayerNorm(reduce.library)
        self.ways: dict[str, Callable[[Case], None]] = {
            TWO: self._in_two_kernels,
            ONE: lambda case: self._in_one(case),
            HALVES: lambda case: self._in_one(case, block_vectors=BLOCK_VECTORS // 2),
            TWO_SHOT: lambda case: self._in_one(case, two_shot=True),
            TWO_LINES: lambda case: self._in_two_kernels(case, self._lines),
            LINES: self._in_lines,
        }

    def _in_one(self, case: Case, **options: Any) -> None:
        self._normed(
            case.parts[self._group.member], case.scale, case.shift, out=case.out, residual=case.residual,
            total=case.total, kind=case.kind, **options,
        )  # fmt: skip

    def _in_lines(self, case: Case) -> None:
        self._lines.norm(
            case.parts[self._group.member], case.scale, case.shift, out=case.out, residual=case.residual,
            total=case.total, kind=case.kind,
        )  # fmt: skip

    def _in_two_kernels(self, case: Case, reduce: Any = None) -> None:
        (reduce or self._reduce)(case.parts[self._group.member], out=case.total)
        added = {} if case.residual is None else {"residual": case.residual, "total": case.total}
        self._norm(case.total, case.scale, case.shift, out=case.out, kind=case.kind, **added)

    def case(
        self, rows: int, columns: int, kind: str = "layer", dtype: torch.dtype = torch.float16, *,
        adds: bool = True, affine: bool = False,
    ) -> Case:  # fmt: skip
        """Random, the same on every rank; the mean is a deviation; results are poisoned."""
        generator = torch.Generator(device="cuda").manual_seed(rows * columns)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device="cuda").to(dtype)

        parts = [random(rows, columns) + 1 for _ in range(self._group.size)]
        nothing = torch.full_like(parts[0], float("nan"))
        return Case(
            parts, random(rows, columns) if adds else None, random(columns) if affine else None,
            random(columns) if affine else None, kind, nothing, nothing.clone(),
        )  # fmt: skip

    def check(self) -> None:
        """The sum bit for bit; the norm against float64, the same bits on all ranks, and those of the kernel of norms where a
        row is one block's. Raises AssertionError."""
        for (rows, columns), kind, dtype in itertools.product(CHECKED, KINDS, RELATIVE_ERROR):
            for adds, affine, way in itertools.product((False, True), (False, True), CHECKED_WAYS):
                case = self.case(rows, columns, kind, dtype, adds=adds, affine=affine)
                if way == LINES and not self._lines.norms(case.out):
                    continue
                self.ways[way](case)
                what = f"{way}: {rows} x {columns} {kind} {dtype}, residual {adds}, affine {affine}"
                self._check_one(case, what, columns <= 8 * BLOCK_VECTORS and way not in (HALVES, LINES))
        self._check_in_place()
        self._check_sequences()

    def _check_one(self, case: Case, what: str, one_block: bool) -> None:
        total, normed = reference(case.parts, case.scale, case.shift, residual=case.residual, kind=case.kind)
        assert torch.equal(case.total, total), (
            f"{what}: other bits in {int((case.total != total).sum())} sums"
        )
        error = float((case.out.double() - normed).norm() / normed.norm())
        assert error <= RELATIVE_ERROR[case.out.dtype], f"{what}: the norm's error is {error}"
        if one_block:
            alone = self._norm(total, case.scale, case.shift, out=torch.empty_like(total), kind=case.kind)
            assert torch.equal(case.out, alone), f"{what}: not the bits of the kernel of norms"
        first = case.out.clone()
        dist.broadcast(first, 0, group=self._group.gpus)
        assert torch.equal(first, case.out), f"{what}: other bits than on rank 0"

    def _check_in_place(self) -> None:
        """The sum may take the place of the part, or of the residual, or be left out."""
        for (rows, columns), two_shot in itertools.product(
            ((17, 2048), (64, 9216), (300, 1024)), (False, True, None)
        ):
            for place in ("nowhere", "part", "residual"):
                case = self.case(rows, columns)
                total, _ = reference(case.parts, residual=case.residual)
                part, out = case.parts[self._group.member], case.out
                to = {"nowhere": None, "part": part, "residual": case.residual}[place]
                if two_shot is None:
                    self._lines.norm(part, out=out, residual=case.residual, total=to)
                else:
                    self._normed(part, out=out, residual=case.residual, total=to, two_shot=two_shot)
                what = f"{rows} x {columns}, sum to {place}, two-shot {two_shot}"
                alone = self._norm(total, out=torch.empty_like(total))
                error = float((out.double() - alone.double()).norm() / alone.double().norm())
                assert error <= RELATIVE_ERROR[out.dtype], f"{what}: the norm's error is {error}"
                assert to is None or torch.equal(to, total), f"{what}: other bits in the sum"

    def _check_sequences(self) -> None:
        """All kernels that share the rooms, in turn, captured and replayed: what is left over must not disturb another."""
        shapes = ((17, 2048), (64, 9216), (1, 768), (300, 1024))
        cases = [self.case(*shape) for shape in shapes]
        member = self._group.member
        sums = [rounded_once(case.parts) for case in cases]
        expected = [reference(case.parts, residual=case.residual)[0] for case in cases]
        wrong = torch.zeros(1, dtype=torch.int64, device="cuda")

        def run() -> None:
            for number in range(5 * len(cases) + 3):
                index = number * 3 % len(cases)
                case, two_shot = cases[index], number % 3 == 0
                if number % 7 < 4:
                    self._in_lines(case)
                else:
                    self._in_one(case, two_shot=two_shot)
                wrong.add_((case.total != expected[index]).sum())
                if number % 2:
                    plain = self._reduce(
                        case.parts[member], out=torch.empty_like(case.out), two_shot=number % 5 == 0
                    )
                    wrong.add_((plain != sums[index]).sum())
                if number % 3:
                    plain = self._lines(case.parts[member], out=torch.empty_like(case.out))
                    wrong.add_((plain != sums[index]).sum())

        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            run()
        for _ in range(50):
            graph.replay()
        assert int(wrong) == 0, f"{int(wrong)} elements are wrong in sequences of sums with norms"

    def time(self) -> Iterator[NormedRow]:
        for way, (rows, columns) in itertools.product(self.ways, SHAPES):
            case = self.case(rows, columns)
            self._group.least(0)  # all start together
            samples = time_launches([lambda c=case: self.ways[way](c)] * LAUNCHES, REPLAYS, "thread_local")
            yield NormedRow(way, rows, columns, statistics.median(samples), samples)


def table(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    """Header, and a line a shape, of NormedRow as dictionaries."""
    times = {(row["rows"], row["columns"], row["way"]): row["us"] for row in rows}
    ways = list(dict.fromkeys(row["way"] for row in rows))
    yield ("rows", "columns", "bytes of a part", *ways, "two kernels / one")
    for count, columns in dict.fromkeys((row["rows"], row["columns"]) for row in rows):
        cells = {way: us for way in ways if (us := times.get((count, columns, way)))}
        ratio = f"{cells[TWO] / cells[ONE]:.2f}" if TWO in cells and ONE in cells else ""
        shown = (f"{cells[way]:.2f} us" if way in cells else "" for way in ways)
        yield (str(count), str(columns), f"{count * columns * 2 >> 10} KB", *shown, ratio)
