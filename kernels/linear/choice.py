"""Rules that choose a float product's kernel and grid, as measured (bench/notes/kernels_linear.md). Plain arithmetic."""

from __future__ import annotations

from typing import NamedTuple

from ..launch import SHARED_LIMITS, SMALLEST_SHARED_LIMIT
from .formats import FLOAT, WEIGHTS
from .multicast_plan import MAX_NARROW_FEATURES, SMALL_WEIGHT, choose_multicast
from .plan import (
    MAX_CLUSTER,
    MAX_ROWS,
    MAX_STREAM_ROWS,
    MAX_TILE_FEATURES,
    MIN_BLOCK_COLUMNS,
    MOMENTS_BYTES,
    RING_BYTES,
    WARPGROUP_CAPABILITY,
    WIDE_TILE_FEATURES,
    Plan,
    StreamPlan,
    WarpgroupPlan,
    check_norm,
    plan_stream,
    plan_tile,
    plan_warpgroup,
)
from .sizes import BLOCK_BYTES, RESERVED_BYTES, ceil_div

LARGE_RING_BYTES = 176 * 1024
LONG_RING_BYTES = 144 * 1024
SMALL_RING_BYTES = 96 * 1024
"""Bytes of W in flight where a block is alone on its SM: what it has asked for before its predecessor ends is what DRAM does
meanwhile. Of blocks of few features and many columns, and of small weights, less is enough."""

LEAST_LONG_COLUMNS = 2560
"""Columns from which a block of up to 24 features has 16 warps."""

MOST_WHOLE_TILES = 4
"""Up to so many tiles a block has whole ones only, where nearly as many blocks can: 0.3 to 0.6% of a layer with 16384 x 4096.
An incomplete fifth or later one costs less than the blocks do."""

HELD_ELEMENTS = 16 * 1024
"""Elements of x under which a block holds them: more take too much of the ring's room."""


def choose_plan(
    rows: int,
    features: int,
    columns: int,
    *,
    norm: str = "none",
    capability: int = 90,
    multiprocessors: int = 132,
) -> Plan:
    """The plan for a shape, by rules that follow the measured best on an H200 (bench/notes/kernels_linear.md).

    For float weights; `quantized_plan` chooses for others. capability: 90 for sm_90. multiprocessors: of the GPU.
    Raises KernelContractError for a norm in front of more than MAX_STREAM_ROWS rows.
    """
    if rows > 8 and norm == "none" and capability == WARPGROUP_CAPABILITY and _is_wide(features, columns):
        return plan_warpgroup(rows, features, columns, cluster=1, feature_tiles=2, blocks=multiprocessors)
    if rows <= MAX_STREAM_ROWS:
        shared_limit = SHARED_LIMITS.get(capability, SMALLEST_SHARED_LIMIT)
        return _choose_stream(rows, features, columns, norm, multiprocessors, shared_limit)
    check_norm(rows, norm)
    if capability == WARPGROUP_CAPABILITY:
        multicast = choose_multicast(rows, features, columns, multiprocessors)
        return multicast or _choose_warpgroup(rows, features, columns, multiprocessors)
    cluster = 4 if capability >= 90 and columns >= 4 * MIN_BLOCK_COLUMNS else 1
    return plan_tile(
        rows, features, columns, cluster=cluster, feature_tiles=2, warps_down=4, blocks=multiprocessors
    )


def outruns_cublas(rows: int, features: int) -> bool:
    """Whether these kernels are worth it against cuBLASLt; measured on an H200 (bench/notes/kernels_linear.md).

    They are for few rows, and for more rows where K is split or an epilogue saves a kernel, but not for the logits of
    more than 16 rows.
    """
    return rows <= MAX_STREAM_ROWS or (rows <= MAX_ROWS and features <= MAX_NARROW_FEATURES)


def _is_wide(features: int, columns: int) -> bool:
    """A vocabulary's worth of features over a K that keeps the tensor copy engine busy."""
    return features > MAX_NARROW_FEATURES and columns >= 2048


class _Shape(NamedTuple):
    """What a stream launch is asked for. alone: a block takes more than half of its SM's shared memory."""

    blocks: int
    warps: int
    ring_bytes: int
    held: bool
    alone: bool = False


def _choose_stream(
    rows: int, features: int, columns: int, norm: str, multiprocessors: int, shared_limit: int
) -> StreamPlan:
    """Small weights are bound by latency: fewer and larger blocks; others by bandwidth: every SM equally busy.

    As measured in a chain of decoder layers, where plans that are best alone are not the best (bench/notes/kernels_linear.md).
    """
    held = rows * columns < HELD_ELEMENTS
    if features * columns < SMALL_WEIGHT:
        shape = _small_shape(rows, features, columns, multiprocessors, held)
    elif columns <= 1024 and features > 80 * multiprocessors:
        # Many turns of little K: x is held, and a second block covers the ends of the turns of the first.
        shape = _Shape(2 * multiprocessors, 8, RING_BYTES, True)
    elif 20 <= features // (2 * multiprocessors) <= 40 and columns <= 4096:
        # Both blocks of an SM are done in one or two turns. 10 warps where they take K in whole stages, which saves 0.8% of a
        # layer with 7680 and 10240 x 2560 (8 rows).
        warps = 10 if rows <= 8 and columns % (10 * WEIGHTS[FLOAT].warp_columns) == 0 else 8
        blocks = _even_blocks(features, 2 * multiprocessors)
        shape = _Shape(blocks, warps, RING_BYTES, held and rows > 1)
    else:
        shape = _large_shape(features, columns, multiprocessors, shared_limit)
    blocks, warps, ring_bytes, held, alone = shape
    room = shared_limit - MOMENTS_BYTES * warps // 8
    return plan_stream(
        rows, features, columns, norm=norm, blocks=blocks, warps=warps, held=held, ring_bytes=ring_bytes,
        block_bytes=room if alone else min(BLOCK_BYTES, room),
        least_bytes=(shared_limit + RESERVED_BYTES) // 2 if alone else 0,
    )  # fmt: skip


def _small_shape(rows: int, features: int, columns: int, multiprocessors: int, held: bool) -> _Shape:
    """Weights that are read in a few microseconds: whole tiles, all of K on its way at once."""
    warps = 12 if rows <= 8 else 8
    if features > columns:
        return _Shape(min(multiprocessors, ceil_div(features, 24)), warps, RING_BYTES, False)
    # Alone on its SM: with 768 x 3072 a layer then takes 1.0 us less of 16.7 (8 rows), with 768 x 768 too 0.1 to 0.6.
    return _Shape(min(multiprocessors, ceil_div(features, 16)), warps, SMALL_RING_BYTES, held, alone=True)


def _large_shape(features: int, columns: int, multiprocessors: int, shared_limit: int) -> _Shape:
    """One block on every SM: with room for two, some SMs get two when another kernel (attention, say) holds others as this one
    starts. Measured with a norm kernel in between: 34 us instead of 26 us for 12288 x 4096."""
    tiles = ceil_div(features, 24)
    # A square weight is the one behind attention, most likely, whose last blocks keep some SMs: whole tiles on the others
    # take 1.3 us less of a layer's 46.3 (2560 x 2560).
    square = features == columns and multiprocessors * 3 // 4 <= tiles <= multiprocessors
    each = ceil_div(features, multiprocessors)
    if square:
        blocks = tiles
    elif each <= WIDE_TILE_FEATURES:
        blocks = _even_blocks(features, multiprocessors)
    elif each <= MOST_WHOLE_TILES * MAX_TILE_FEATURES:
        blocks = _even_blocks(features, multiprocessors, MAX_TILE_FEATURES)
    else:
        blocks = multiprocessors
    if columns >= LEAST_LONG_COLUMNS and each <= 24 and shared_limit > LONG_RING_BYTES:
        return _Shape(blocks, 16, LONG_RING_BYTES, False, alone=True)
    return _Shape(blocks, 8, LARGE_RING_BYTES, False, alone=True)


def _even_blocks(features: int, blocks: int, tile: int = 1) -> int:
    """As many blocks as have equally many features, whole tiles; `blocks` where those are less than 19 of 20 of them."""
    fewer = range(blocks, blocks * 19 // 20, -1)
    return next((count for count in fewer if features % (tile * count) == 0), blocks)


def _choose_warpgroup(rows: int, features: int, columns: int, multiprocessors: int) -> WarpgroupPlan:
    """Tiles of 64 features; as many blocks per cluster as it takes to give every SM one or two blocks."""
    tiles = ceil_div(features, 64)
    if features > MAX_NARROW_FEATURES:
        return plan_warpgroup(rows, features, columns, cluster=1, feature_tiles=4, blocks=multiprocessors)
    if 2 * tiles <= multiprocessors:
        cluster = multiprocessors // tiles
        if cluster == 3 and columns >= 4096:
            cluster = 2
    else:
        cluster = 2 if tiles <= multiprocessors else 1
    cluster = max(1, min(MAX_CLUSTER, cluster, columns // MIN_BLOCK_COLUMNS))
    # With one block per SM and a long K, bytes in flight are worth more than a start under the predecessor's tail.
    deep = cluster == 2 and 2 * tiles <= multiprocessors and columns >= 4096
    ring_bytes = 2 * BLOCK_BYTES - 4096 if deep else BLOCK_BYTES - 4096
    return plan_warpgroup(
        rows,
        features,
        columns,
        cluster=cluster,
        feature_tiles=1,
        blocks=multiprocessors,
        ring_bytes=ring_bytes,
    )
