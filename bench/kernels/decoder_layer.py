"""Decoder layers one after another, as a decode step has them, on one GPU: checked against float64, then timed.

    python -m trtc.bench.kernels.decoder_layer [--sizes 2.7B] [--rows 1 8] [--tokens 576] [--search SECONDS] [--json FILE]

One CUDA graph with programmatic dependent launch holds the layers: queries, keys and values with the norm in front, attention
over a paged cache, output product with the residual, fc1 with norm and ReLU, fc2 with the residual. More than 16 rows are
normed by a kernel of their own. Several layers' weights and caches take turns, so that none is found in L2. What a layer takes
is that of the replayed graph over its layers; bytes are those of weights, biases, keys and values.

Plans that are the best alone (bench/kernels/dense.py, attention.py) are not the best here, where a kernel asks for its weights
while the one before it still runs: it depends on the neighbours' plans how early it can, and how much of its multiprocessors
it has. So those of `choose_plan` were chosen by hand with what this measures. `--search` looks for better ones in the layer:
for so many seconds for each size and number of rows it changes one kernel's plan at a time, or takes another kernel for its
work, and keeps what makes a layer faster. In the end it says what each change is worth.

What is reported has passed a second check: the graph's layers end with the bits that the same launches give one by one.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...kernels.errors import DeviceError
from ...kernels.library import KernelLibrary
from ...kernels.linear import MAX_ROWS, Plan
from ...kernels.paged_decode_attention import DecodePlan
from .decoder_layer_chain import Chain
from .decoder_layer_plans import (
    MOVES,
    NAMES,
    SIZES,
    Gpu,
    Layer,
    LayerPlans,
    by_other_kernels,
    candidates,
    choose_plans,
)
from .dense import label
from .harness import OneLineParser, Row, compile_side_by_side, median_row, out_dir, print_table, write_json

MAX_TOKENS = 2048
"""Positions of the models."""
REPLAYS, QUICK_REPLAYS = 31, 5
"""Samples of what is reported or accepted, and of a candidate."""
BATCH = 16
"""Candidates whose graphs are timed in turns."""
LEAST_GAIN_US = 0.05
"""Of a layer, for a plan to be better."""


@dataclass(frozen=True)
class Found:
    """What a search found. worth_us: kernel whose plan changed -> what a layer takes more with the chosen one."""

    case: str
    chosen: LayerPlans
    best: LayerPlans
    chosen_us: float
    best_us: float
    tried: int
    worth_us: dict[str, float]

    def __str__(self) -> str:
        lines = [
            f"{self.case}: {self.chosen_us:.2f} us chosen, {self.best_us:.2f} found, {self.tried} plans tried"
        ]
        for name, worth in self.worth_us.items():
            lines.append(
                f"    {name}: {name_of(self.chosen[name])} -> {name_of(self.best[name])}: {worth:.2f} us"
            )
        return "\n".join(lines)


class Search:
    """Of better plans in `chain`, from `chosen` on, for `seconds` or until no change of one plan makes a layer faster."""

    def __init__(self, chain: Chain, gpu: Gpu, chosen: LayerPlans, seconds: float) -> None:
        self._chain, self._gpu, self._chosen, self._best = chain, gpu, chosen, chosen
        self._tried = {chosen}
        self._end = time.monotonic() + seconds

    def run(self) -> Found:
        improving = True
        while improving:
            improving = False
            for name in NAMES:
                for move in MOVES[type(self._best[name])]:
                    improving |= self._improve(name, candidates(self._best[name], move, self._gpu))
            for name in NAMES:
                improving |= self._improve(name, by_other_kernels(self._best[name], self._gpu))
        return self._found()

    def _improve(self, name: str, plans: Sequence[Any]) -> bool:
        """Whether one of `plans` for that kernel made a layer faster, twice."""
        rivals = [self._best.changed(name, plan) for plan in plans]
        rivals = [rival for rival in rivals if rival not in self._tried]
        gains: dict[LayerPlans, float] = {}
        for start in range(0, len(rivals), BATCH):
            if time.monotonic() < self._end:
                gains |= self._gains(rivals[start : start + BATCH], QUICK_REPLAYS)
        if not gains:
            return False
        winner = max(gains, key=gains.__getitem__)
        if gains[winner] < LEAST_GAIN_US or self._gains([winner], REPLAYS)[winner] < LEAST_GAIN_US:
            return False
        self._chain.check(winner)
        self._best = winner
        return True

    def _gains(self, rivals: Sequence[LayerPlans], replays: int) -> dict[LayerPlans, float]:
        """What each of `rivals` takes less than the best plans so far, in microseconds a layer; each is checked first."""
        compile_side_by_side(self._chain.library, (source for plans in rivals for source in plans.sources()))
        for plans in rivals:
            self._chain.check_kernels(plans)
        self._tried.update(rivals)
        best, *others = map(statistics.median, self._chain.time([self._best, *rivals], replays))
        return {plans: best - us for plans, us in zip(rivals, others, strict=True)}

    def _found(self) -> Found:
        chosen, best = self._chosen, self._best
        undone = {name: best.changed(name, chosen[name]) for name in NAMES if best[name] != chosen[name]}
        for plans in (chosen, best, *undone.values()):
            self._chain.check(plans)
        samples = self._chain.time([chosen, best, *undone.values()], REPLAYS)
        chosen_us, best_us, *undone_us = map(statistics.median, samples)
        worth = {name: us - best_us for name, us in zip(undone, undone_us, strict=True)}
        return Found(self._chain.layer.case, chosen, best, chosen_us, best_us, len(self._tried), worth)


def name_of(plan: Plan | DecodePlan) -> str:
    """A short name of a plan."""
    if isinstance(plan, DecodePlan):
        cluster = " cluster" * (plan.cluster and plan.splits > 1)
        return f"warps {plan.warps} stages {plan.stages} splits {plan.splits}{cluster}"
    return label(plan)


def whole(least: int, most: int) -> Callable[[str], int]:
    """What argparse reads a number from `least` to `most` with."""

    def read(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from {least} to {most}")
        return int(text)

    return read


def seconds(text: str) -> float:
    """What argparse reads a time with."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds; accepted: more than 0")
    return value


def parser() -> OneLineParser:
    found = OneLineParser(
        prog="decoder_layer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    found.add_argument("--sizes", nargs="+", default=["125M", "1.3B", "2.7B", "6.7B"], choices=SIZES)
    found.add_argument("--rows", type=whole(1, MAX_ROWS), nargs="+", default=[1, 8, 64], help="sequences")
    found.add_argument(
        "--tokens", type=whole(1, MAX_TOKENS), default=576, help="of each sequence, the new one included"
    )
    found.add_argument(
        "--search",
        type=seconds,
        metavar="SECONDS",
        help="look for better plans for so long, for each size and rows",
    )
    found.add_argument("--json", type=Path, help="default: $OUT/kernels-decoder-layer.json")
    return found


def main() -> None:
    command = parser()
    given = command.parse_args()
    try:
        library = KernelLibrary()
        gpu = Gpu(library.capability, library.multiprocessors, library.shared_limit)
    except DeviceError as missing:
        command.error(str(missing))
    layers = [Layer(size, rows, given.tokens) for size in given.sizes for rows in given.rows]
    chosen = {layer: choose_plans(layer, gpu) for layer in layers}
    compile_side_by_side(library, (source for plans in chosen.values() for source in plans.sources()))
    rows: list[Row] = []
    searches: list[Found] = []
    for layer, plans in chosen.items():
        chain = Chain(library, layer)
        error = chain.check(plans)
        (samples,) = chain.time([plans], REPLAYS)
        config = f"as chosen, {layer.moved_bytes / 1e6:.1f} MB"
        rows.append(median_row(layer.case, config, samples, layer.moved_bytes, error=error))
        if given.search:
            searches.append(Search(chain, gpu, plans, given.search).run())
            print(searches[-1], flush=True)
        write_json(  # after each, so that a plan that is found wrong takes only its own search with it
            given.json or out_dir() / "kernels-decoder-layer.json", rows, command=sys.argv[1:],
            plans={layer.case: asdict(plans) for layer, plans in chosen.items()},
            searches=[asdict(found) for found in searches],
        )  # fmt: skip
    print_table(rows)


if __name__ == "__main__":
    main()
