"""e4m3 numbers on one GPU, beside float16: decode attention over a KV cache, and products of many rows. Checked, then timed.

    python -m trtc.bench.kernels.fp8 [--sequences 64] [--length 1024] [--rows 48 64 8192] [--sweep]

Writes $OUT/kernels-fp8.json. Of attention, bytes are those of the cache and of q, k, v and the output; launches take turns over
more layers than L2 holds; `--sweep` times other numbers of stages too. Of products, see `Product`; all have a bias.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...kernels.library import KernelLibrary
from ...kernels.linear import MAX_ROWS
from ...kernels.linear.quantized import Dequantize, QuantizedLinear
from ...kernels.paged import as_bytes
from ...kernels.paged_decode_attention import DecodePlan, PagedDecodeAttention
from ...kernels.quantize_rows import QuantizeRows
from ...kernels.quantize_rows.reference import quantize_rows as reference_rows
from ..markdown import table_of
from . import attention_checks
from .attention_cases import Model, PagedBatch, paged_batch
from .dense import layers
from .harness import (
    ROTATION_BYTES,
    Row,
    median_row,
    out_dir,
    print_table,
    relative_error,
    time_launches,
    write_json,
)

RESULTS = Path(__file__).parents[1] / "results" / "h100-kernels-fp8.json"
LAYERS = {"1.3B": Model(32, 32, 64), "2.7B": Model(32, 32, 80), "6.7B": Model(32, 32, 128)}
CACHES = {"float16": None, "fp8": torch.float8_e4m3fn}
FP8_STAGES = (2, 4, 6, 8)


def time_decode(
    library: KernelLibrary, size: str, cache: str, num_seqs: int, length: int, sweep: bool
) -> Iterator[Row]:
    """One new token after length - 1 cached ones, in every sequence."""
    model = dataclasses.replace(LAYERS[size], cache_dtype=CACHES[cache])
    first = paged_batch(model, [1] * num_seqs, [length - 1] * num_seqs, device="cuda")
    row_bytes = 2 * model.num_kv_heads * model.head_dim
    itemsize = first.k_cache.element_size()
    moved = num_seqs * row_bytes * (length * itemsize + 2 * 2)
    layers = [first, *(another_layer(first) for _ in range(max(1, min(32, ROTATION_BYTES // moved))))]
    attention = PagedDecodeAttention(library)
    for label, plan in plans(attention, first, length, sweep):
        workspace = torch.zeros(max(16, plan.workspace_bytes), dtype=torch.uint8, device="cuda")
        out = torch.empty(first.q.shape, dtype=model.dtype, device="cuda")
        launches = [
            partial(
                attention, b.q, b.k, b.v, b.k_cache, b.v_cache, b.page_table, b.kv_length, out=out, plan=plan,
                scale=model.scale, workspace=workspace, early=True,
            )
            for b in layers
        ]  # fmt: skip
        samples = time_launches(launches * -(-24 // len(launches)))
        config = f"{cache} w{plan.warps} s{plan.stages} x{plan.splits} {label}"
        yield median_row(f"decode {size} b{num_seqs} x {length}", config, samples, moved)


def plans(
    attention: PagedDecodeAttention, batch: PagedBatch, length: int, sweep: bool
) -> Iterator[tuple[str, DecodePlan]]:
    """The chosen plan, and with `sweep` those with other stages, by a label."""
    chosen = attention.plan(batch.q.shape[0], batch.q.shape[1], batch.k_cache, length)
    yield "chosen", chosen
    if sweep and chosen.fp8_cache:
        for stages in FP8_STAGES:
            yield "", dataclasses.replace(chosen, stages=stages)


def another_layer(batch: PagedBatch) -> PagedBatch:
    """The same sequences over other pages."""
    k_cache, v_cache = (as_bytes(cache).clone().view(cache.dtype) for cache in (batch.k_cache, batch.v_cache))
    return dataclasses.replace(batch, k_cache=k_cache, v_cache=v_cache)


@dataclass(frozen=True)
class Product:
    """Microseconds of one product and its parts, by what was launched; the error of that in e4m3.

    float16: cuBLASLt. dequantize: what makes float16 of the weight before it. ours: the decode kernel over e4m3 weights, up to
    64 rows. round: of the rows. product, fast: of e4m3 numbers, the latter with sums of fewer bits. both: round and fast.
    """

    case: str
    rows: int
    us: dict[str, float]
    tflop: float
    error: float
    fast_error: float | None = None


def time_product(library: KernelLibrary, name: str, features: int, columns: int, rows: int) -> Product:
    """x W^T + b of 6.7B's layer `name`, in float16. Launches take turns over weights that L2 does not hold."""
    generator = torch.Generator(device="cuda").manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", generator=generator)

    x, bias = random(rows, columns).half(), random(features).half()
    integers = (random(features, columns) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
    scale = (torch.rand(features, device="cuda", generator=generator) + 0.5).half() * 2e-4
    row_scales = scale.float()[None, :]
    count = max(1, ROTATION_BYTES // integers.nbytes) if rows <= MAX_ROWS else 1
    copies = [integers, *(as_bytes(integers).clone().view(integers.dtype) for _ in range(count - 1))]
    halves = [integers.half() * scale[:, None] for _ in range(-(-count // 2))]
    numbers = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device="cuda")
    x_scale = torch.empty(rows, device="cuda")
    out = torch.empty(rows, features, dtype=torch.float16, device="cuda")
    quantize, dequantize, linear = QuantizeRows(library), Dequantize(library), QuantizedLinear(library)

    def product(weight: torch.Tensor, fast: bool = False) -> torch.Tensor:
        return torch._scaled_mm(
            numbers,
            weight.t(),
            x_scale[:, None],
            row_scales,
            bias=bias,
            out_dtype=x.dtype,
            use_fast_accum=fast,
        )

    def rounding() -> None:
        quantize(x, out=numbers, scale=x_scale)

    def both(weight: torch.Tensor) -> None:
        rounding()
        product(weight, True)

    rounding()
    exact, exact_scale = reference_rows(x[:64])
    expected = (exact.double() * exact_scale.double()[:, None]) @ (
        integers.double() * scale.double()[:, None]
    ).T
    error, fast_error = (
        relative_error(product(integers, fast)[:64], expected + bias.double()) for fast in (False, True)
    )
    assert error < 5e-3, (name, rows, error)
    launches: dict[str, list[Callable[[], Any]]] = {
        "float16": [partial(torch.addmm, bias, x, half.t()) for half in halves],
        "dequantize": [partial(dequantize, copy, scale, out=halves[-1]) for copy in copies],
        "round": [rounding],
        "product": [partial(product, copy) for copy in copies],
        "fast": [partial(product, copy, True) for copy in copies],
        "both": [partial(both, copy) for copy in copies],
    }
    if rows <= MAX_ROWS:
        launches["ours"] = [partial(linear, x, copy, scale, bias, out=out) for copy in copies]
    us = {
        what: statistics.median(time_launches(runs * -(-6 // len(runs)), replays=5))
        for what, runs in launches.items()
    }
    case, tflop = f"6.7B {name} {features}x{columns}", 2e-12 * rows * features * columns
    return Product(case, rows, us, tflop, error, fast_error)


def print_products(products: list[Product]) -> None:
    columns = ("float16", "dequantize", "ours", "round", "product", "fast", "both")
    print(
        f"{'case, us':24} {'rows':>5} {' '.join(f'{name:>10}' for name in columns)} "
        f"{'PFLOP/s':>8} {'float16':>8} {'error':>8} {'fast':>8}"
    )
    for p in products:
        times = " ".join(f"{p.us[name]:10.1f}" if name in p.us else " " * 10 for name in columns)
        rates = [1e3 * p.tflop / p.us[name] for name in ("both", "float16")]
        print(
            f"{p.case:24} {p.rows:5} {times} {rates[0]:8.3f} {rates[1]:8.3f} {p.error:8.1e} {p.fast_error:8.1e}"
        )


def markdown(data: dict[str, Any]) -> str:
    """The tables of a results file, and the line below them that says what was measured."""
    attention = {
        tuple(row["case"].split(" ", 2)[1:]): {} for row in data["rows"] if row["config"].endswith("chosen")
    }  # (size, batch) -> cache -> row
    for row in data["rows"]:
        if row["config"].endswith("chosen"):
            _, size, batch = row["case"].split(" ", 2)
            attention[size, batch][row["config"].split()[0]] = row
    lines: list[tuple[str, ...]] = []
    for (size, batch), found in attention.items():
        cells = [f"{found[cache]['us']:.1f} us, {found[cache]['gbps']:.0f} GB/s" for cache in CACHES]
        ratio = found["float16"]["us"] / found["fp8"]["us"]
        lines.append((f"OPT-{size}, {batch.removeprefix('b')} tokens", *cells, f"{ratio:.2f}"))
    text = table_of(("decode attention", "cache of float16", "cache of fp8", "ratio"), lines) + "\n"
    header = ("product of OPT-6.7B", "rows", "float16", "decode kernel, fp8 weights", "fp8 x fp8, exact sums", "fast sums",
              "rounding", "exact, to float16")  # fmt: skip
    lines = []
    for one in data["products"]:
        us, layer = one["us"], " ".join(one["case"].split()[1:])
        times = [
            f"{us[name]:.0f} us" if name in us else ""
            for name in ("float16", "ours", "product", "fast", "round")
        ]
        lines.append(
            (layer, str(one["rows"]), *times, f"{us['float16'] / (us['product'] + us['round']):.2f}")
        )
    text += table_of(header, lines)
    where = data["environment"]
    note = f" {data['note']}." if "note" in data else ""
    exact, fast = (max(product[name] for product in data["products"]) for name in ("error", "fast_error"))
    return (
        f"{text}\n{where['device']}, driver {where['driver']}, torch {where['torch']}, trtc at {where['commit']} on "
        f"{data['date']}. Attention: one new token a sequence over so many cached ones, append included, launches in a CUDA "
        f"graph. Products: with a bias, rounding timed apart; the error of a product is at most {exact:.1e} of its norm, with "
        f"fast sums, which engines do not use, {fast:.1e}.{note} Samples: `bench/results/{RESULTS.name}`.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, nargs="*", default=[48, 64, 8192])
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--sweep", action="store_true", help="other numbers of stages, too")
    given = parser.parse_args()
    library = KernelLibrary()
    attention_checks.check_decode(library, attention_checks.FP8_MODELS[0], [1, 17, 1000], all_plans=False)
    rows = [
        row
        for size in LAYERS
        for cache in CACHES
        for row in time_decode(library, size, cache, given.sequences, given.length, given.sweep)
    ]
    print_table(rows)
    products = [
        time_product(library, name, features, columns, count)
        for count in given.rows
        for name, features, columns in list(layers("6.7B"))[:4]
    ]
    print_products(products)
    write_json(
        out_dir() / "kernels-fp8.json", rows, products=[asdict(product) for product in products],
        date=datetime.date.today().isoformat(),
    )  # fmt: skip


if __name__ == "__main__":
    main()
