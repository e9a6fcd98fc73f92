"""Embedding, norm and linear kernels on one GPU, beside torch: each checked against float64, then timed.

    python -m trtc.bench.kernels.dense [--sizes 125M 6.7B] [--rows 1 8] [--sweep [KERNEL ...]]

Writes $OUT/kernels-dense.json. Times are those of launches in a CUDA graph, dependent launch on, over more weights than
L2 holds. `--sweep` times every plan that could serve a linear layer instead of the chosen one.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from ...kernels.embedding import Embedding, Positions
from ...kernels.embedding.reference import embedding as reference_embedding
from ...kernels.layer_norm import LayerNorm
from ...kernels.layer_norm.reference import norm as reference_norm
from ...kernels.library import KernelLibrary
from ...kernels.linear import MAX_STREAM_ROWS, Linear, Norm, Plan, choose_plan, weight_sums
from ...kernels.linear.multicast_plan import MAX_NARROW_FEATURES, MulticastPlan, plan_multicast
from ...kernels.linear.plan import (
    BLOCK_BYTES,
    SHARED_LIMITS,
    SMALL_WEIGHT,
    AnyPlan,
    StreamPlan,
    TilePlan,
    plan_stream,
    plan_tile,
    plan_warpgroup,
)
from ...kernels.linear.quantized_warpgroup_plan import QuantizedWarpgroupPlan
from ...kernels.linear.reference import linear as reference_linear
from ...kernels.linear.stripe_plan import StripePlan
from .harness import (
    Row,
    WeightPool,
    median_row,
    out_dir,
    print_table,
    relative_error,
    time_launches,
    write_json,
)

HIDDEN = {"125M": 768, "1.3B": 2048, "2.7B": 2560, "6.7B": 4096}
VOCABULARY = 50272
MAX_POSITIONS = 2050
ROWS = (1, 8, 16, 32, 64)
TOLERANCE = 1e-3
"""Largest relative error in the 2-norm: one rounding to float16."""
MIN_LAUNCHES = 60
MULTICAST_WIDTHS = (*range(8, 129, 8), *range(144, 193, 16))
MULTICAST_RINGS = ((BLOCK_BYTES, 4), (BLOCK_BYTES, 8), (72 * 1024, 4), (2 * BLOCK_BYTES, 8))
"""(bytes of a block, stages of x at least), for two, three or one block on a multiprocessor."""
KINDS = ("stream", "tile", "warpgroup", "multicast")


def layers(size: str) -> Iterator[tuple[str, int, int]]:
    """(name, out_features, in_features) of the linear layers of an OPT decoder."""
    hidden = HIDDEN[size]
    yield "qkv", 3 * hidden, hidden
    yield "out", hidden, hidden
    yield "fc1", 4 * hidden, hidden
    yield "fc2", hidden, 4 * hidden
    yield "logits", VOCABULARY, hidden


def label(plan: AnyPlan) -> str:
    """A short name of a plan, for the table."""
    if isinstance(plan, StreamPlan):
        more = " held" * plan.held_x + " alone" * bool(plan.least_bytes)
        return f"stream blocks {plan.blocks} warps {plan.warps} tile {8 * plan.octets} stages {plan.stages}{more}"
    if isinstance(plan, MulticastPlan):
        stages = f"stages {plan.weight_stages}+{plan.row_stages}"
        return (
            f"multicast features {plan.features_per_block} copies {plan.copies} split {plan.split} {stages}"
        )
    if isinstance(plan, StripePlan):
        alone = " alone" * bool(plan.least_bytes)
        steps = f"steps {plan.steps}, {plan.early_steps} early{alone}"
        return f"stripe blocks {plan.blocks} warps {plan.warps} tiles {plan.tiles} {steps}"
    if isinstance(plan, QuantizedWarpgroupPlan):
        shape = f"features {plan.features_per_block} groups {plan.groups} split {plan.split}"
        return f"warpgroup {shape} stages {plan.stages}+{plan.row_stages}"
    kind = "tile" if isinstance(plan, TilePlan) else "warpgroup"
    return f"{kind} features {plan.features_per_block} cluster {plan.cluster} stages {plan.stages}"


def candidates(rows: int, features: int, columns: int, kinds: Collection[str]) -> list[Plan]:
    """The chosen plan and all others of `kinds` that are worth a try, without repetition."""
    makers = {
        "stream": _stream_candidates,
        "tile": _tile_candidates,
        "warpgroup": _warpgroup_candidates,
        "multicast": _multicast_candidates,
    }
    plans: dict[Plan, None] = {choose_plan(rows, features, columns): None}
    for kind in kinds:
        plans.update(dict.fromkeys(makers[kind](rows, features, columns)))
    return list(plans)


def _stream_candidates(rows: int, features: int, columns: int) -> Iterator[Plan]:
    if rows <= 16:
        for blocks, warps, held in itertools.product((66, 96, 132, 264), (8, 12, 16), (True, False)):
            yield plan_stream(rows, features, columns, blocks=blocks, warps=warps, held=held)


def _tile_candidates(rows: int, features: int, columns: int) -> Iterator[Plan]:
    if rows >= 8:
        for down, cluster in itertools.product((4, 8), (1, 4)):
            yield plan_tile(rows, features, columns, cluster=cluster, feature_tiles=2, warps_down=down)


def _warpgroup_candidates(rows: int, features: int, columns: int) -> Iterator[Plan]:
    if rows >= 8:
        for tiles, cluster, blocks, ring_bytes in itertools.product(
            (1, 2, 4), (1, 2, 3, 4, 6, 8), (132, 264), (BLOCK_BYTES - 4096, 2 * BLOCK_BYTES - 4096)
        ):
            yield plan_warpgroup(
                rows, features, columns, cluster=cluster, feature_tiles=tiles, blocks=blocks,
                ring_bytes=ring_bytes,
            )  # fmt: skip


def _multicast_candidates(rows: int, features: int, columns: int) -> Iterator[Plan]:
    """Widths that make a wave, or two where two blocks fit a multiprocessor, in clusters of up to 8 blocks."""
    small = features * columns < SMALL_WEIGHT
    if rows <= 8 or features > MAX_NARROW_FEATURES:
        return
    for split, copies in itertools.product((1, 2, 4, 8), (1, 2, 4, 8) if small else (1, 2)):
        for width, (block_bytes, row_stages) in itertools.product(MULTICAST_WIDTHS, MULTICAST_RINGS):
            blocks = -(-features // width) * split
            if copies * split > 8 or not 48 <= blocks <= 264:
                continue
            plan = plan_multicast(
                rows, features, columns, features_per_block=width, copies=copies, split=split,
                block_bytes=block_bytes, row_stages=row_stages,
            )  # fmt: skip
            limit = SHARED_LIMITS[90] - 1024 if blocks <= 132 else BLOCK_BYTES
            if plan.shared_bytes <= min(limit, block_bytes):
                yield plan


def median_us(launches: list[Callable[[], Any]]) -> float:
    return median_row("", "", time_launches(launches), 1).us


def take_turns(weights: list[torch.Tensor]) -> list[torch.Tensor]:
    """All weights, repeated until there are enough launches for a graph to be worth timing."""
    return list(itertools.islice(itertools.cycle(weights), max(MIN_LAUNCHES, len(weights))))


def time_linear(
    library: KernelLibrary, pool: WeightPool, size: str, rows: int, kinds: Collection[str]
) -> Iterator[Row]:
    """Linear layers of an OPT size with bias, beside torch's (cuBLASLt), which also adds the bias."""
    linear = Linear(library)
    for name, features, columns in layers(size):
        weights = pool.matrices(features, columns)
        x, bias, out = (
            torch.randn(*shape, device="cuda", dtype=torch.float16)
            for shape in ((rows, columns), (features,), (rows, features))
        )
        moved = 2 * (features * columns + rows * (features + columns))
        baseline = median_us([partial(functional.linear, x, weight, bias) for weight in take_turns(weights)])
        expected = reference_linear(x, weights[1], bias)
        found = []
        for plan in candidates(rows, features, columns, kinds):
            run = partial(linear, x, bias=bias, out=out.fill_(float("nan")), plan=plan)
            error = relative_error(run(weights[1]), expected)
            assert error < TOLERANCE, (size, name, rows, plan, error)
            samples = time_launches([partial(run, weight) for weight in take_turns(weights)])
            case = f"{size} {name} {features}x{columns} rows {rows}"
            found.append(median_row(case, label(plan), samples, moved, baseline_us=baseline, error=error))
        yield from sorted(found, key=lambda row: row.us)


def time_norm(library: KernelLibrary, pool: WeightPool, size: str, rows: int) -> Iterator[Row]:
    """The first linear layer with its norm fused, with a norm kernel before it, and without one; the norm alone."""
    linear, layer_norm, hidden = Linear(library), LayerNorm(library), HIDDEN[size]
    weights = pool.matrices(3 * hidden, hidden)
    norms = {weight.data_ptr(): Norm(weight_sums(weight)) for weight in weights}
    x = torch.randn(rows, hidden, device="cuda", dtype=torch.float16)
    normed, out = torch.empty_like(x), torch.empty(rows, 3 * hidden, device="cuda", dtype=torch.float16)

    def apart(weight: torch.Tensor) -> torch.Tensor:
        return linear(layer_norm(x, out=normed), weight, out=out)

    def fused(weight: torch.Tensor) -> torch.Tensor:
        return linear(x, weight, out=out, norm=norms[weight.data_ptr()])

    def bare(weight: torch.Tensor) -> torch.Tensor:
        return linear(x, weight, out=out)

    expected = reference_linear(x, weights[0], norm="layer")
    moved = 2 * (3 * hidden * hidden + rows * 4 * hidden)
    for name, run in (("fused", fused), ("norm kernel, then linear", apart), ("linear without norm", bare)):
        error = None if run is bare else relative_error(run(weights[0]), expected)
        assert error is None or error < TOLERANCE, (size, rows, name, error)
        samples = time_launches([partial(run, weight) for weight in take_turns(weights)])
        yield median_row(f"{size} norm + qkv rows {rows}", name, samples, moved, error=error)

    error = relative_error(layer_norm(x, out=normed), reference_norm(x))
    assert error < TOLERANCE, (size, rows, error)
    samples = time_launches([partial(layer_norm, x, out=normed)] * 100)
    baseline = median_us([partial(functional.layer_norm, x, (hidden,))] * 100)
    yield median_row(
        f"{size} norm rows {rows}", "", samples, 4 * rows * hidden, baseline_us=baseline, error=error
    )


def time_embedding(library: KernelLibrary, tokens: int) -> Row:
    """Token and position lookup of 4096 columns."""
    lookup, columns = Embedding(library), 4096
    table, places = (
        torch.randn(count, columns, device="cuda", dtype=torch.float16)
        for count in (VOCABULARY, MAX_POSITIONS)
    )
    ids, spots = (
        torch.randint(0, count, (tokens,), device="cuda", dtype=torch.int32)
        for count in (VOCABULARY, MAX_POSITIONS - 2)
    )
    out = torch.empty(tokens, columns, device="cuda", dtype=torch.float16)
    run = partial(lookup, ids, table, out=out, positions=Positions(spots, places, 2))
    expected = reference_embedding(ids, table, position_ids=spots, position_table=places, position_offset=2)
    assert torch.equal(run(), expected.half())

    def with_torch() -> torch.Tensor:
        return functional.embedding(ids, table) + functional.embedding(spots + 2, places)

    samples, baseline = time_launches([run] * 100), median_us([with_torch] * 100)
    return median_row(
        f"embedding tokens {tokens}", "", samples, 6 * columns * tokens, baseline_us=baseline, error=0.0
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="*", default=list(HIDDEN), choices=HIDDEN)
    parser.add_argument("--rows", type=int, nargs="*", default=list(ROWS))
    parser.add_argument(
        "--sweep", nargs="*", choices=KINDS, metavar="KERNEL",
        help=f"time all plans of the linear layers ({', '.join(KINDS)}; all without a name), and nothing else",
    )  # fmt: skip
    arguments = parser.parse_args()
    sweep = arguments.sweep is not None
    kinds = (arguments.sweep or KINDS) if sweep else ()
    library, pool = KernelLibrary(), WeightPool(torch.float16)
    rows: list[Row] = []
    for size, count in itertools.product(arguments.sizes, arguments.rows):
        rows += time_linear(library, pool, size, count, kinds)
        if not sweep and count <= MAX_STREAM_ROWS:
            rows += time_norm(library, pool, size, count)
    if not sweep:
        rows += [time_embedding(library, tokens) for tokens in (1, 64, 4096)]
    print_table(rows)
    write_json(out_dir() / "kernels-dense.json", rows, command=sys.argv[1:])


if __name__ == "__main__":
    main()
