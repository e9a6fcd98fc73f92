"""Sums of 8 KB to 4 MB over the GPUs of this machine, in CUDA graphs: our kernels beside NCCL and torch's symmetric memory.

    python -m trtc.bench.all_reduce --nproc 2 --json out/all-reduce.json

Checks come first: every way gives the float64 sum within the type's error; our kernels, also in sequences of different sizes,
the float32 sum in the order of ranks, rounded once, bit for bit. Then sums with a residual and a norm, in one kernel and in
two (`normed_sums.py`). torch's own kernels know no float16 and run in bfloat16, as
many bytes. A time is that of one of LAUNCHES sums in a graph; the samples are replays of it. Rank 0 reports. A rank that is
not done after LIMIT_S seconds says where it is and ends.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..core.errors import TrtcError
from ..kernels.all_reduce import AllReduce, memory_bytes
from ..kernels.all_reduce.reference import all_reduce as reference
from ..kernels.all_reduce.reference import rounded_once
from ..kernels.all_reduce.two_shot import TwoShotAllReduce
from ..kernels.all_reduce.two_shot import memory_bytes as line_bytes
from ..kernels.library import KernelLibrary
from ..runtime.distributed import RankGroup, join
from ..runtime.gpus import choose_device
from ..runtime.launcher import launch_ranks
from ..runtime.peer_memory import are_linked, lend_memory
from ..runtime.placement import placement
from .kernels.harness import environment, time_launches
from .normed_sums import NormedRow, NormedSums
from .normed_sums import table as normed_table

RESULTS = Path(__file__).parent / "results" / "gpus-all-reduce.json"
ON_FOUR = RESULTS.with_name("gpus-4-all-reduce.json")
SIZES = tuple(1 << power for power in range(13, 23))
"""Bytes of one rank's part: 8 KB to 4 MB."""
OURS = ("trtc", "trtc two-shot", "trtc lines")
MOST = 8 << 20
LIMIT_S = 110
LAUNCHES = 40
REPLAYS = 30
TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Absolute, for each standard normal part of a sum: a unit in the last place of the sums there are."""


@dataclass(frozen=True)
class Row:
    """us: median of `samples`, microseconds a sum; None with an `error` where a way does not work here."""

    way: str
    bytes: int
    dtype: str
    us: float | None
    samples: list[float] = field(repr=False)
    error: str = ""


class Rank:
    """One rank of the benchmark."""

    def __init__(self, group: RankGroup) -> None:
        ordinal = choose_device(group.rank, group.local_rank, torch.cuda.device_count())
        self.device = torch.device("cuda", ordinal)
        torch.cuda.set_device(self.device)
        group.connect_gpus(self.device)
        self.group = group
        self.kernel = self._kernel(ordinal)
        self.ways: dict[str, tuple[torch.dtype, Callable[[torch.Tensor], torch.Tensor]]] = {
            "nccl": (torch.float16, self._nccl),
            "torch one-shot": (torch.bfloat16, self._torch_one_shot),
            "torch two-shot": (torch.bfloat16, self._torch_two_shot),
        }
        if self.kernel is not None:
            ours = {
                "trtc": (torch.float16, self._ours),
                "trtc two-shot": (torch.float16, self._ours_two_shot),
            }
            ours["trtc lines"] = (torch.float16, lambda x: self.lines(x, out=torch.empty_like(x)))
            self.ways = ours | self.ways

    def _kernel(self, ordinal: int) -> AllReduce | None:
        lines = line_bytes(MOST, self.group.size)
        lent = memory_bytes(SIZES[-1], self.group.size, SIZES[-1])
        if not self.group.least(are_linked(self.device)):
            return None
        memory = lend_memory(self.group, self.device, lines + lent)
        if memory is None:
            return None
        self._memory = memory
        state = torch.zeros(2, dtype=torch.int32, device=self.device)
        library = KernelLibrary(ordinal)
        self.lines = TwoShotAllReduce(library, memory.addresses, self.group.rank, MOST, state)
        addresses = [address + lines for address in memory.addresses]
        return AllReduce(library, addresses, self.group.rank, SIZES[-1], state, SIZES[-1])

    def parts(self, size: int, dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
        """What all ranks bring; the same on every rank."""
        generator = torch.Generator().manual_seed(seed)
        count = size // dtype.itemsize
        return [torch.randn(count, generator=generator).to(dtype) for _ in range(self.group.size)]

    def _ours(self, x: torch.Tensor) -> torch.Tensor:
        assert self.kernel is not None
        return self.kernel(x, out=torch.empty_like(x))

    def _ours_two_shot(self, x: torch.Tensor) -> torch.Tensor:
        assert self.kernel is not None
        return self.kernel(x, out=torch.empty_like(x), two_shot=True)

    def _nccl(self, x: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(x, group=self.group.gpus)
        return x

    def _shared(self, x: torch.Tensor) -> torch.Tensor:
        """A copy of `x` in memory that torch's kernels can use."""
        from torch.distributed import _symmetric_memory

        shared = _symmetric_memory.empty(x.numel(), dtype=x.dtype, device=self.device)
        _symmetric_memory.rendezvous(shared, self.group.gpus)
        return shared.copy_(x)

    def _torch_one_shot(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.ops.symm_mem.one_shot_all_reduce(x, "sum", self.group.gpus.group_name)
        return result

    def _torch_two_shot(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.ops.symm_mem.two_shot_all_reduce_(x, "sum", self.group.gpus.group_name)
        return result

    def input(self, way: str, size: int, seed: int) -> torch.Tensor:
        dtype = self.ways[way][0]
        x = self.parts(size, dtype, seed)[self.group.rank].to(self.device)
        return self._shared(x) if way.startswith("torch") else x

    def check(self, way: str, size: int) -> None:
        dtype, run = self.ways[way]
        found = run(self.input(way, size, size)).cpu()
        parts = self.parts(size, dtype, size)
        error = float((found.double() - reference(parts)).abs().max())
        assert error <= TOLERANCE[dtype] * self.group.size, f"{way}: {size} bytes: error {error}"
        if way in OURS:
            assert torch.equal(found, rounded_once(parts)), f"{way}: {size} bytes: other bits"

    def check_sequences(self) -> None:
        """Our kernels, sizes and ways in turn, captured and replayed, in place too: whatever is left over from one sum must
        not disturb another."""
        inputs = {
            size: self.input("trtc", size, size)
            for size in (SIZES[-1], SIZES[0], 16, SIZES[3], SIZES[3] + 48)
        }
        order = [size for _ in range(5) for size in inputs] + [16, 16, SIZES[-1], 16]
        expected = {
            size: rounded_once(self.parts(size, torch.float16, size)).to(self.device) for size in inputs
        }
        wrong = torch.zeros(1, dtype=torch.int64, device=self.device)

        def run() -> None:
            for number, size in enumerate(order):
                x = inputs[size].clone()
                assert self.kernel is not None
                if number % 5 in (1, 2, 4):
                    found = self.lines(x, out=x)
                else:
                    found = self.kernel(x, out=x, two_shot=size > 16 and number % 3 != 0)
                wrong.add_((found != expected[size]).sum())

        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            run()
        for _ in range(50):
            graph.replay()
        assert int(wrong) == 0, f"{int(wrong)} elements are wrong in sequences of sums"

    def time(self, way: str, size: int) -> Row:
        dtype, run = self.ways[way]
        x = self.input(way, size, size)
        self.group.least(0)  # all start together
        samples = time_launches([lambda: run(x)] * LAUNCHES, REPLAYS, "thread_local")
        return Row(way, size, str(dtype).removeprefix("torch."), statistics.median(samples), samples)

    def measure(self, way: str, size: int) -> Row:
        """Checked, then timed. What does not work here is said in the row: all ranks find the same."""
        try:
            self.check(way, size)
            return self.time(way, size)
        except (
            RuntimeError,
            AttributeError,
            TypeError,
            ValueError,
        ) as error:  # torch's are not in every build
            if not way.startswith("torch"):
                raise
            return Row(way, size, "", None, [], str(error).partition("\n")[0][:200])


def run_rank(path: Path | None, commit: str | None, checks_only: bool) -> None:
    faulthandler.dump_traceback_later(LIMIT_S, exit=True)
    group = join(placement())
    with group.failing_together():
        rank = Rank(group)
        normed = None if rank.kernel is None else NormedSums(group, rank.kernel, rank.lines)
        if normed is not None:
            rank.check_sequences()
            normed.check()
        if checks_only:
            assert rank.kernel is not None, "our kernel cannot be checked"
            for size in SIZES:
                for way in (*OURS, "nccl"):
                    rank.check(way, size)
            group.close()
            return
        rows: list[Row] = []
        normed_rows: list[NormedRow] = []

        def keep() -> None:
            if group.rank == 0 and path is not None:
                write(path, rows, normed_rows, group.size, commit)

        try:
            for way in rank.ways:
                rows += [rank.measure(way, size) for size in SIZES]
                keep()
            for row in normed.time() if normed is not None else ():
                normed_rows.append(row)
            keep()
        finally:
            if group.rank == 0:
                show(rows, group.size)
                for cells in normed_table([asdict(row) for row in normed_rows]):
                    print("".join(f"{cell:>27}" for cell in cells))
    group.close()


def show(rows: list[Row], ranks: int) -> None:
    ways = list(dict.fromkeys(row.way for row in rows))
    times = {(row.way, row.bytes): row.us for row in rows}
    print(
        f"{ranks} x {torch.cuda.get_device_name()}, us a sum in a CUDA graph; float16, torch's own in bfloat16"
    )
    print(f"{'KB':>6}" + "".join(f"{way:>16}" for way in ways) + f"{'nccl / best':>16}")
    for size in SIZES:
        cells = [times.get((way, size)) for way in ways]
        ours, theirs = fastest(times, size), times.get(("nccl", size))
        ratio = f"{theirs / ours:>16.2f}" if ours and theirs else ""
        print(
            f"{size >> 10:>6}" + "".join(f"{cell:>16.2f}" if cell else f"{'-':>16}" for cell in cells) + ratio
        )
    for error in dict.fromkeys(f"{row.way}: {row.error}" for row in rows if row.error):
        print(error)


def fastest(times: Mapping[tuple[str, int], float | None], size: int) -> float | None:
    """The least that one of our ways takes, which is the one that an engine takes, or near it."""
    return min((us for way in OURS if (us := times.get((way, size)))), default=None)


def markdown(data: dict[str, Any], name: str = RESULTS.name) -> str:
    """The table of the results file `name`, and the line below it that says what was measured."""
    times = {(row["way"], row["bytes"]): row["us"] for row in data["rows"]}
    ways = [
        way for way in dict.fromkeys(way for way, _ in times) if any(times.get((way, size)) for size in SIZES)
    ]
    lines: list[tuple[str, ...]] = [
        ("a rank's part", *ways, "NCCL / best of trtc"),
        ("---",) * (len(ways) + 2),
    ]
    for size in sorted({size for _, size in times}):
        cells = [times.get((way, size)) for way in ways]
        ours, theirs = fastest(times, size), times.get(("nccl", size))
        ratio = f"{theirs / ours:.2f}" if ours and theirs else ""
        lines.append((f"{size >> 10} KB", *(f"{cell:.1f} us" if cell else "" for cell in cells), ratio))
    where = data["environment"]
    normed = list(normed_table(data.get("normed", ())))
    normed[1:1] = [("---",) * len(normed[0])]
    normed_text = (
        "\nWith a residual added and the norm of the sum, float16:\n\n"
        + "".join(f"| {' | '.join(cells)} |\n" for cells in normed)
        if len(normed) > 2
        else ""
    )
    return (
        "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
        + normed_text
        + f"\n{data['ranks']} x {where['device']}, driver {where['driver']}, torch {where['torch']}, NCCL {where['nccl']}, "
        f"trtc at {where['commit'][:12]}; float16, torch's own kernels bfloat16; the median of replays of a CUDA graph of "
        f"{data['launches']} sums. Samples: `bench/results/{name}`.\n"
    )


def write(path: Path, rows: list[Row], normed: list[NormedRow], ranks: int, commit: str | None) -> None:
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    variables = {name: value for name, value in os.environ.items() if name.startswith(("NCCL_", "TORCH_"))}
    known = {} if commit is None else {"commit": commit, "dirty": False}
    record: dict[str, Any] = {
        "ranks": ranks,
        "launches": LAUNCHES,
        "environment": {**environment(), **known, "nccl": nccl, "variables": variables},
        "rows": [asdict(row) for row in rows],
        "normed": [asdict(row) for row in normed],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nproc", type=int, required=True, metavar="N", help="GPUs, 2 to 8")
    parser.add_argument("--check", action="store_true", help="check our kernel and NCCL, time nothing")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--commit", help="what is measured, where there is no git")
    args = parser.parse_args()
    if placement().size > 1:
        run_rank(args.json, args.commit, args.check)
        return 0
    return launch_ranks([sys.executable, "-m", "trtc.bench.all_reduce", *sys.argv[1:]], args.nproc)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except TrtcError as error:
        sys.exit(f"error: {error}")
