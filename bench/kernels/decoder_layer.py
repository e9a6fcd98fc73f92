"""Decoder layers one after another, as a decode step has them, on one GPU: checked against float64, then timed.

    python -m trtc.bench.kernels.decoder_layer [--sizes 2.7B] [--rows 1 8] [--tokens 576] [--search SECONDS] [--json FILE]

One CUDA graph with programmatic dependent launch holds the layers: queries, keys and values with the norm in front, attention
over a paged cache, output product with the residual, fc1 with norm and ReLU, fc2 with the residual. More than 16 rows are
normed by a kernel of their own. Several layers' weights and caches take turns, so that none is found in L2. What a layer takes
is that of the replayed graph over its layers; bytes are those of weights, biases, keys and values.

Plans that are the best alone (bench/kernels/dense.py, attention.py) are not the best here, where a kernel asks for its weights
while the one before it still runs: it depends on the neighbours' plans how early it can, and how much of its multiprocessors
it has. So those of `choose_plan` were chosen by hand with what this measures. `--search` looks for better ones in the layer:
for so many seconds for each size and number of rows it changes one kernel's plan at a time and keeps what makes a layer
faster. In the end it says what each change is worth.
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

import torch

from ...kernels.errors import DeviceError
from ...kernels.layer_norm import LayerNorm
from ...kernels.library import KernelLibrary
from ...kernels.linear import MAX_ROWS, Linear, Norm, Plan, weight_sums
from ...kernels.linear.reference import linear as reference_linear
from ...kernels.paged_decode_attention import DecodePlan, PagedDecodeAttention
from ...kernels.paged_decode_attention.reference import paged_decode_attention as reference_attention
from .attention_cases import Model, paged_batch, row_error
from .attention_checks import TOLERANCE as ATTENTION_TOLERANCE
from .decoder_layer_plans import MOVES, NAMES, SIZES, Gpu, Layer, LayerPlans, candidates, choose_plans
from .dense import TOLERANCE, label
from .harness import (
    ROTATION_BYTES,
    OneLineParser,
    Row,
    compile_side_by_side,
    median_row,
    out_dir,
    print_table,
    relative_error,
    write_json,
)

MAX_TOKENS = 2048
"""Positions of the models."""
LEAST_LAYERS = 24
"""Layers of a graph, at least: what its launch takes is then little beside them."""
REPLAYS, QUICK_REPLAYS = 31, 5
"""Samples of what is reported or accepted, and of a candidate."""
BATCH = 16
"""Candidates whose graphs are timed in turns."""
LEAST_GAIN_US = 0.05
"""Of a layer, for a plan to be better."""


@dataclass(frozen=True)
class Case:
    """A kernel with inputs of its own. launch: takes a plan and the tensor for the result."""

    launch: Callable[[Any, torch.Tensor], None]
    expected: torch.Tensor
    error: Callable[[torch.Tensor, torch.Tensor], float]
    tolerance: float


class Weights:
    """Random weights of a layer's products, by name."""

    def __init__(self, layer: Layer) -> None:
        products = layer.products.items()
        self.matrix = {name: _normal(one.features, one.columns, std=0.02) for name, one in products}
        self.bias = {name: _normal(one.features, std=0.02) for name, one in products}
        self.norm = {name: Norm(weight_sums(self.matrix[name])) for name, one in products if one.norm}


class Chain:
    """Layers on the GPU, what flows through them, and the launches that make it."""

    def __init__(self, library: KernelLibrary, layer: Layer) -> None:
        torch.manual_seed(0)
        self.library, self.layer = library, layer
        self._linear, self._norm = Linear(library), LayerNorm(library)
        self._attention = PagedDecodeAttention(library)
        count = max(2, ROTATION_BYTES // layer.moved_bytes)
        self._graph_layers = -(-LEAST_LAYERS // count) * count
        self._weights = [Weights(layer) for _ in range(count)]
        model = Model(layer.heads, layer.heads, layer.head_dim)
        self._batch = paged_batch(model, [1] * layer.rows, [layer.tokens - 1] * layer.rows, device="cuda")
        first = self._batch.k_cache, self._batch.v_cache
        others = ((torch.randn_like(first[0]), torch.randn_like(first[1])) for _ in range(count - 1))
        self._caches = [first, *others]
        self._start = _normal(layer.rows, layer.hidden)
        self._hidden, self._normed, self._mixed = (self._start.clone() for _ in range(3))
        self._fused = _normal(layer.rows, 3 * layer.hidden)
        self._wide = _normal(layer.rows, 4 * layer.hidden)
        self._workspaces: dict[DecodePlan, torch.Tensor] = {}
        self._cases: dict[str, Case] = {}
        self._errors: dict[tuple[str, Plan | DecodePlan], float] = {}
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()

    def check(self, plans: LayerPlans) -> float:
        """The largest relative error of a kernel. Raises AssertionError for a wrong result, or one that changes."""
        return max(self._check(name, plans[name]) for name in NAMES)

    def time(self, contenders: Sequence[LayerPlans], replays: int) -> list[list[float]]:
        """Microseconds a layer: `replays` samples of each of `contenders`, whose graphs take turns."""
        graphs = [self._capture(plans) for plans in contenders]
        spans = []
        with torch.cuda.stream(self._stream):
            for graph in graphs * (replays + 1):
                begin, end = (
                    torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
                    for _ in range(2)
                )
                self._hidden.copy_(self._start)  # it grows from layer to layer
                begin.record()
                graph.replay()
                end.record()
                spans.append((begin, end))
        self._stream.synchronize()
        us = [1000 * begin.elapsed_time(end) / self._graph_layers for begin, end in spans]
        warm = us[len(graphs) :]
        return [warm[index :: len(graphs)] for index in range(len(graphs))]

    def _capture(self, plans: LayerPlans) -> torch.cuda.CUDAGraph:
        with torch.cuda.stream(self._stream):
            self._launch_layer(0, plans)  # loads the kernels
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            for index in range(self._graph_layers):
                self._launch_layer(index % len(self._weights), plans)
        return graph

    def _launch_layer(self, index: int, plans: LayerPlans) -> None:
        hidden, heads = self._hidden, (self.layer.rows, self.layer.heads, self.layer.head_dim)
        self._launch_product("qkv", index, plans.qkv, hidden, self._fused)
        q, k, v = (part.view(heads) for part in torch.split(self._fused, self.layer.hidden, dim=1))
        self._launch_attention(index, plans.attention, (q, k, v), self._mixed.view(heads))
        self._launch_product("out", index, plans.out, self._mixed, hidden, hidden)
        self._launch_product("fc1", index, plans.fc1, hidden, self._wide)
        self._launch_product("fc2", index, plans.fc2, self._wide, hidden, hidden)

    def _launch_product(
        self, name: str, index: int, plan: Plan, x: torch.Tensor, out: torch.Tensor,
        residual: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        weights = self._weights[index]
        norm = weights.norm.get(name)
        if norm is not None and not self.layer.fuses_norms:
            x, norm = self._norm(x, out=self._normed), None
        self._linear(
            x, weights.matrix[name], weights.bias[name], out=out, residual=residual, norm=norm, plan=plan,
            activation=self.layer.products[name].activation,
        )  # fmt: skip

    def _launch_attention(
        self, index: int, plan: DecodePlan, qkv: tuple[torch.Tensor, ...], out: torch.Tensor
    ) -> None:
        if plan not in self._workspaces:
            size = max(16, plan.workspace_bytes)
            self._workspaces[plan] = torch.zeros(size, dtype=torch.uint8, device="cuda")
        q, k, v = qkv
        self._attention(
            q, k, v, *self._caches[index], self._batch.page_table, self._batch.kv_length, out=out, plan=plan,
            scale=self.layer.head_dim**-0.5, workspace=self._workspaces[plan], early=True,
        )  # fmt: skip

    def _check(self, name: str, plan: Plan | DecodePlan) -> float:
        if (name, plan) in self._errors:
            return self._errors[name, plan]
        if name not in self._cases:
            self._cases[name] = self._attention_case() if name == "attention" else self._product_case(name)
        case = self._cases[name]
        outs = []
        for _ in range(2):  # what fills a tensor lies between the launches, which must not overlap
            outs.append(torch.full_like(case.expected, math.nan, dtype=torch.float16))
            case.launch(plan, outs[-1])
        error = case.error(outs[0], case.expected)
        assert error < case.tolerance, f"{self.layer.case} {name}: error {error:.1e} with {plan}"
        assert torch.equal(*outs), f"{self.layer.case} {name}: a second launch differs with {plan}"
        self._errors[name, plan] = error
        return error

    def _product_case(self, name: str) -> Case:
        one, weights = self.layer.products[name], self._weights[0]
        x = _normal(self.layer.rows, one.columns)
        residual = _normal(self.layer.rows, one.features) if one.residual else None
        expected = reference_linear(
            x, weights.matrix[name], weights.bias[name], residual=residual, activation=one.activation,
            norm="layer" if one.norm else "none",
        )  # fmt: skip

        def launch(plan: Plan, out: torch.Tensor) -> None:
            self._launch_product(name, 0, plan, x, out, residual)

        return Case(launch, expected, relative_error, TOLERANCE)

    def _attention_case(self) -> Case:
        b = self._batch
        scale = self.layer.head_dim**-0.5
        expected = reference_attention(
            b.q, b.k, b.v, b.k_cache, b.v_cache, b.page_table, b.kv_length, scale=scale
        )

        def launch(plan: DecodePlan, out: torch.Tensor) -> None:
            self._launch_attention(0, plan, (b.q, b.k, b.v), out)

        return Case(launch, expected, row_error, ATTENTION_TOLERANCE[torch.float16])


def _normal(*shape: int, std: float = 1.0) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.float16, device="cuda").normal_(std=std)


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
        moves = [(name, move) for name in NAMES for move in MOVES.get(type(self._chosen[name]), ())]
        improving = True
        while improving:
            improving = False
            for name, move in moves:
                improving |= self._improve(name, move)
        return self._found()

    def _improve(self, name: str, move: Sequence[str]) -> bool:
        """Whether a change of that kernel's plan made a layer faster, twice."""
        plans = candidates(self._best[name], move, self._gpu)
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
        self._best = winner
        return True

    def _gains(self, rivals: Sequence[LayerPlans], replays: int) -> dict[LayerPlans, float]:
        """What each of `rivals` takes less than the best plans so far, in microseconds a layer; each is checked first."""
        compile_side_by_side(self._chain.library, (source for plans in rivals for source in plans.sources()))
        for plans in rivals:
            self._chain.check(plans)
        self._tried.update(rivals)
        best, *others = map(statistics.median, self._chain.time([self._best, *rivals], replays))
        return {plans: best - us for plans, us in zip(rivals, others, strict=True)}

    def _found(self) -> Found:
        chosen, best = self._chosen, self._best
        undone = {name: best.changed(name, chosen[name]) for name in NAMES if best[name] != chosen[name]}
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
    print_table(rows)
    write_json(
        given.json or out_dir() / "kernels-decoder-layer.json", rows, command=sys.argv[1:],
        plans={layer.case: asdict(plans) for layer, plans in chosen.items()},
        searches=[asdict(found) for found in searches],
    )  # fmt: skip


if __name__ == "__main__":
    main()
