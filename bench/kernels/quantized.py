"""Linear layers with integer weights on one GPU, beside our float16 kernels and torch: checked against float64, then timed.

    python -m trtc.bench.kernels.quantized [--sizes 6.7B] [--rows 1 8 64] [--formats int8 fp8 int4/128] [--sweep]

Writes $OUT/kernels-quantized.json. Times are those of launches in a CUDA graph, dependent launch on, over more weights than L2
holds; bytes are those of integers, scales, x and y. `--sweep` times other plans too and prints which one won. The last table
adds up the layers of a decode step. Kernels are compiled side by side first.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from functools import partial

import torch
from torch.nn import functional

from ...core.quantize.integers import dequantize, pack_int4
from ...kernels.library import KernelLibrary
from ...kernels.linear import FLOAT, Linear, choose_plan
from ...kernels.linear.formats import WEIGHTS, StoredWeight
from ...kernels.linear.plan import AnyPlan
from ...kernels.linear.quantized import Dequantize, QuantizedLinear, for_kernels
from ...kernels.linear.quantized_plan import QuantizedPlan, choose_quantized, quantized_stream, quantized_tile
from ...kernels.linear.quantized_warpgroup_plan import (
    SPLITS,
    QuantizedWarpgroupPlan,
    most_groups,
    plan_quantized_warpgroup,
    resident_blocks,
    widths,
)
from ...kernels.linear.reference import linear as reference_linear
from ...kernels.linear.stripe_plan import fits_stripe, plan_stripe
from ...kernels.nvrtc import KernelSource
from .dense import HIDDEN, TOLERANCE, label, layers, median_us, take_turns
from .harness import (  # fmt: skip
    POOL_BYTES,
    ROTATION_BYTES,
    Row,
    WeightPool,
    compile_side_by_side,
    median_row,
    out_dir,
    print_table,
    relative_error,
    time_launches,
    write_json,
)

LAYERS = {"125M": 12, "1.3B": 24, "2.7B": 32, "6.7B": 32}
Weight = tuple[torch.Tensor, torch.Tensor]


class IntegerPool:
    """Random bytes that many weights share: every byte is a valid one or two integers."""

    def __init__(self) -> None:
        self._data = torch.randint(-127, 128, (POOL_BYTES,), dtype=torch.int8, device="cuda")
        self._numbers: torch.Tensor | None = None

    def _bytes(self, how: str) -> torch.Tensor:
        if how != "fp8":
            return self._data
        if self._numbers is None:  # no NaN
            bits = self._data.view(torch.uint8)
            self._numbers = torch.where(bits & 127 == 127, bits - 1, bits).view(torch.float8_e4m3fn)
        return self._numbers

    def weights(self, features: int, columns: int, stored: StoredWeight) -> list[Weight]:
        """Weights as kernels read them: at least two, up to ROTATION_BYTES and 128 of them, each with scales of its own."""
        width = stored.padded(columns) * stored.bits // 8
        size = -(-features * width // 128) * 128
        count = min(128, max(2, min(ROTATION_BYTES, POOL_BYTES) // size))
        shape = (features,) if stored.group is None else (features, stored.padded(columns) // stored.group)
        found = []
        for i in range(count):
            integers = self._bytes(stored.name)[i * size : i * size + features * width].view(features, width)
            if stored.bits == 4:
                integers = integers.view(torch.uint8)
            scale = torch.rand(shape, device="cuda").mul_(2e-4 if stored.bits == 8 else 4e-3).half()
            found.append((integers, scale))
        return found


def known_weight(features: int, columns: int, stored: StoredWeight) -> tuple[Weight, torch.Tensor]:
    """A weight as kernels read it, and its values in float64 by the engine's own layout."""
    limit = {"int8": 127, "fp8": 448}.get(stored.name, 8)
    shape = (features,) if stored.group is None else (features, columns // stored.group)
    scale = (torch.rand(shape, device="cuda") + 0.2).mul_(2 / limit * columns**-0.5).half()
    if stored.name == "fp8":
        packed = torch.empty(features, columns, device="cuda").uniform_(-limit, limit).to(torch.float8_e4m3fn)
    else:
        integers = torch.randint(-limit, limit, (features, columns), device="cuda", dtype=torch.int8)
        packed = integers if stored.bits == 8 else pack_int4(integers)
    exact = dequantize(packed, scale.double())
    return for_kernels(packed, scale), exact


def candidates(rows: int, features: int, columns: int, how: str, sweep: bool) -> list[QuantizedPlan]:
    """The chosen plan first; with `sweep` others worth a try, without repetition."""
    plans: dict[QuantizedPlan, None] = {choose_quantized(rows, features, columns, weight=how): None}
    if sweep and rows <= 16:
        for blocks, warps, alone, ring in ((132, 8, True, 80), (132, 8, True, 128), (132, 8, False, 80), (264, 8, False, 56),
                                           (132, 16, True, 80), (132, 16, True, 128), (132, 12, True, 96), (264, 12, False, 56),
                                           (264, 16, False, 64), (396, 8, False, 40), (198, 8, False, 64)):  # fmt: skip
            plan = quantized_stream(
                rows,
                features,
                columns,
                weight=how,
                blocks=blocks,
                warps=warps,
                alone=alone,
                ring_bytes=ring << 10,
            )
            plans[plan] = None
    if sweep and fits_stripe(rows, columns, WEIGHTS[how]):
        for blocks, warps, tiles, kib, early in (
            (132, 8, 4, 114, 1),
            (132, 16, 2, 114, 1),
            (132, 16, 2, 226, 2),
            (264, 8, 4, 112, 2),
        ):
            stripe = plan_stripe(
                rows, features, columns, weight=how, blocks=blocks, warps=warps, tiles=tiles, residents=blocks // 132,
                block_bytes=kib << 10, most_steps=3, early_steps=early,
            )  # fmt: skip
            if stripe is not None:
                plans[stripe] = None
    if sweep and rows >= 8:
        for cluster, stages in itertools.product((1, 2, 4), (4, 8)):
            plans[quantized_tile(rows, features, columns, weight=how, cluster=cluster, stages=stages)] = None
        plans.update(dict.fromkeys(warpgroup_candidates(rows, features, columns, how)))
    return list(plans)


def warpgroup_candidates(
    rows: int, features: int, columns: int, how: str
) -> Iterator[QuantizedWarpgroupPlan]:
    """Plans for more than 16 rows on Hopper that occupy most of its 132 multiprocessors once."""
    if rows <= 16:
        return
    for groups, split in itertools.product(range(1, most_groups(how) + 1), SPLITS):
        for width in sorted(widths(features, groups, split, 132)):
            if not 72 <= -(-features // width) * split <= resident_blocks(split, 132):
                continue
            for ring_bytes in (48 << 10, 64 << 10, 96 << 10):
                yield plan_quantized_warpgroup(
                    rows, features, columns, weight=how, groups=groups, split=split, features_per_block=width,
                    ring_bytes=ring_bytes,
                )  # fmt: skip


def time_floats(
    linear: Linear,
    pool: WeightPool,
    case: str,
    x: torch.Tensor,
    features: int,
    bias: torch.Tensor,
    out: torch.Tensor,
) -> tuple[Row, float]:
    """Our float16 kernel, and torch's time."""
    rows, columns = x.shape
    weights = pool.matrices(features, columns)
    baseline = median_us([partial(functional.linear, x, weight, bias) for weight in take_turns(weights)])
    run = partial(linear, x, bias=bias, out=out)
    error = relative_error(run(weights[1]), reference_linear(x, weights[1], bias))
    assert error < TOLERANCE, (case, error)
    samples = time_launches([partial(run, weight) for weight in take_turns(weights)])
    moved = 2 * (features * columns + rows * (features + columns))
    plan = choose_plan(rows, features, columns)
    return median_row(
        case, f"float16 {label(plan)}", samples, moved, baseline_us=baseline, error=error
    ), baseline


def time_layer(
    library: KernelLibrary, pools: tuple[WeightPool, IntegerPool], size: str, name: str, features: int, columns: int,
    rows: int, formats: list[str], sweep: bool,
) -> dict[str, list[Row]]:  # fmt: skip
    """Rows of one layer by format, the chosen plan's first. Baselines are torch's float16 product."""
    case = f"{size} {name} {features}x{columns} rows {rows}"
    x, bias, out = (
        torch.randn(*shape, device="cuda", dtype=torch.float16)
        for shape in ((rows, columns), (features,), (rows, features))
    )
    floats, baseline = time_floats(Linear(library), pools[0], case, x, features, bias, out)
    found, linear = {FLOAT: [floats]}, QuantizedLinear(library)
    for how in formats:
        stored = WEIGHTS[how]
        weights = pools[1].weights(features, columns, stored)
        known, exact = known_weight(features, columns, stored)
        expected = reference_linear(x, exact, bias)
        moved = sum(part.nbytes for part in weights[0]) + 2 * rows * (features + columns)
        found[how] = []
        for plan in candidates(rows, features, columns, how, sweep):
            run = partial(linear, x, bias=bias, out=out.fill_(float("nan")), plan=plan)
            error = relative_error(run(*known), expected)
            assert error < TOLERANCE, (case, plan, error)
            samples = time_launches([partial(run, *weight) for weight in take_turns(weights)])  # type: ignore[arg-type]
            found[how].append(
                median_row(case, f"{how} {label(plan)}", samples, moved, baseline_us=baseline, error=error)
            )
        del exact, expected
    return found


def time_dequantize(library: KernelLibrary, pool: IntegerPool, size: str, how: str) -> Row:
    """The kernel that makes float16 weights for prefill."""
    features, columns = 4 * HIDDEN[size], HIDDEN[size]
    known, exact = known_weight(features, columns, WEIGHTS[how])
    run = partial(Dequantize(library), out=torch.empty(features, columns, device="cuda", dtype=torch.float16))
    assert torch.equal(run(*known), exact.half()), how
    weights = pool.weights(features, columns, WEIGHTS[how])
    samples = time_launches([partial(run, *weight) for weight in take_turns(weights)])  # type: ignore[arg-type]
    moved = sum(part.nbytes for part in weights[0]) + 2 * features * columns
    return median_row(f"{size} dequantize {features}x{columns}", how, samples, moved, error=0.0)


def step_lines(size: str, rows: int, times: dict[str, dict[str, float]]) -> Iterator[str]:
    """What the products of a decode step take, with the head in float16. times: layer -> format -> us."""
    per_format = {
        how: LAYERS[size] * sum(times[name][how] for name in ("qkv", "out", "fc1", "fc2"))
        + times["logits"][FLOAT]
        for how in times["qkv"]
    }
    for how, us in per_format.items():
        yield f"{size} rows {rows}: products of a step {how:9} {us / 1000:7.3f} ms  {per_format[FLOAT] / us:5.2f}x float16"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="*", default=["6.7B"], choices=HIDDEN)
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 8, 64])
    parser.add_argument("--formats", nargs="*", default=["int8", "fp8", "int4/128"], choices=[*WEIGHTS][1:])
    parser.add_argument("--sweep", action="store_true", help="other plans, too")
    given = parser.parse_args()
    library, pools = KernelLibrary(), (WeightPool(torch.float16), IntegerPool())
    shapes = [
        (size, rows, name, features, columns)
        for size, rows in itertools.product(given.sizes, given.rows)
        for name, features, columns in layers(size)
    ]
    plans: list[AnyPlan] = []
    for _, rows, _, features, columns in shapes:
        plans.append(choose_plan(rows, features, columns))
        for how in given.formats:
            plans += candidates(rows, features, columns, how, given.sweep)
    compile_side_by_side(library, (KernelSource(plan.source.path, (plan.entry("__half"),)) for plan in plans))
    table: list[Row] = []
    lines: list[str] = []
    for (size, rows), group in itertools.groupby(shapes, key=lambda shape: shape[:2]):
        times: dict[str, dict[str, float]] = {}
        for _, _, name, features, columns in group:
            found = time_layer(
                library, pools, size, name, features, columns, rows, given.formats, given.sweep
            )
            times[name] = {how: min(row.us for row in rows_of) for how, rows_of in found.items()}
            for how, rows_of in found.items():
                table += sorted(rows_of, key=lambda row: row.us)
                if given.sweep and how != FLOAT:
                    best = min(rows_of, key=lambda row: row.us)
                    lines.append(
                        f"{best.case}: {rows_of[0].us:.2f} us chosen, {best.us:.2f} us best: {best.config}"
                    )
        lines += step_lines(size, rows, times)
    table += [time_dequantize(library, pools[1], size, how) for size in given.sizes for how in given.formats]
    print_table(table)
    print("\n".join(lines))
    write_json(out_dir() / "kernels-quantized.json", table, command=sys.argv[1:], summary=lines)


if __name__ == "__main__":
    main()
