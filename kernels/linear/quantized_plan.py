"""Which linear kernel serves a shape with integer weights. Plain arithmetic: no GPU, no torch."""

from __future__ import annotations

from .formats import WEIGHTS
from .plan import (
    BLOCK_BYTES,
    MAX_CLUSTER,
    MAX_STREAM_ROWS,
    MOMENTS_BYTES,
    RESERVED_BYTES,
    RING_BYTES,
    SHARED_LIMITS,
    SMALL_WEIGHT,
    SMALLEST_SHARED_LIMIT,
    WARPGROUP_CAPABILITY,
    StreamPlan,
    TilePlan,
    ceil_div,
    check_norm,
    plan_stream,
    plan_tile,
    tile_stage_bytes,
    tile_stage_columns,
)
from .quantized_warpgroup_plan import QuantizedWarpgroupPlan, choose_quantized_warpgroup
from .stripe_plan import StripePlan, choose_stripe

MAX_TILE_STAGES = 8
FEW_TILE_STAGES = 4
"""Of tiles for up to 8 rows: 31.6 us for int8, 4096 x 16384, on an H100, with 8 stages 37.8."""

WIDE_WARPS, WIDE_COLUMNS = 16, 4096
"""Warps for four-bit weights of at least so many columns: what dequantizing them waits for takes longer than their bytes. On an
H100, one row: 12288 x 4096 10.7 us, with 8 warps 13.2; 16384 x 4096 14.4 and 17.0; 4096 x 16384 14.8 and 15.9."""

QuantizedPlan = StreamPlan | TilePlan | StripePlan | QuantizedWarpgroupPlan


def choose_quantized(
    rows: int,
    features: int,
    columns: int,
    *,
    weight: str,
    norm: str = "none",
    capability: int = 90,
    multiprocessors: int = 132,
) -> QuantizedPlan:
    """A stream of W where the rows of x fit beside it or the norm asks for it, else tiles, of warpgroups on Hopper.

    weight: how W is stored, a key of `formats.WEIGHTS`. Raises KernelContractError as `choose_plan`.
    """
    check_norm(rows, norm)
    limit = SHARED_LIMITS.get(capability, SMALLEST_SHARED_LIMIT)
    clusters = capability >= 90
    four_bits = WEIGHTS[weight].bits == 4
    stripe = choose_stripe(
        rows, features, columns, weight=weight, norm=norm, capability=capability, shared_limit=limit
    )
    if stripe is not None:
        return stripe
    if rows <= MAX_STREAM_ROWS:
        warps = WIDE_WARPS if four_bits and columns >= WIDE_COLUMNS else 8
        stream = quantized_stream(
            rows, features, columns, weight=weight, norm=norm, blocks=multiprocessors, shared_limit=limit, warps=warps
        )  # fmt: skip
        # Reading x again for each of its blocks costs as much as W of eight bits: 48.7 us where tiles take 31.6.
        few = rows <= 8 and (four_bits or not clusters)
        if few or stream.held_x or norm != "none":
            return stream
    elif capability == WARPGROUP_CAPABILITY:
        return choose_quantized_warpgroup(
            rows, features, columns, weight=weight, multiprocessors=multiprocessors
        )
    stages = FEW_TILE_STAGES if rows <= 8 else MAX_TILE_STAGES
    return quantized_tile(
        rows, features, columns, weight=weight, blocks=multiprocessors, shared_limit=limit, clusters=clusters, stages=stages
    )  # fmt: skip


def norms_quantized_input(
    rows: int, features: int, columns: int, weight: str, capability: int, *, weighted: bool
) -> bool:
    """Whether the kernel for these sizes norms its input. weighted: whether the norm has weights of its own."""
    if not weighted:
        return rows <= MAX_STREAM_ROWS
    limit = SHARED_LIMITS.get(capability, SMALLEST_SHARED_LIMIT)
    return (
        choose_stripe(
            rows, features, columns, weight=weight, norm="layer", capability=capability, shared_limit=limit
        )
        is not None
    )


def quantized_stream(
    rows: int,
    features: int,
    columns: int,
    *,
    weight: str,
    norm: str = "none",
    blocks: int = 132,
    warps: int = 8,
    held: bool = True,
    ring_bytes: int = RING_BYTES,
    shared_limit: int = SHARED_LIMITS[90],
    alone: bool | None = None,
) -> StreamPlan:
    """A stream launch for integers: x is held if that fits, since their few bytes leave little time to read it again.

    warps: at most; a row must keep them busy. alone: one block on every SM, as of large float weights; None: by size.
    """
    if alone is None:
        alone = features * columns * WEIGHTS[weight].bits >= SMALL_WEIGHT * 16
    most = shared_limit if alone else min(BLOCK_BYTES, shared_limit)
    least_bytes = (shared_limit + RESERVED_BYTES) // 2 if alone else 0
    warps = min(warps, max(2, ceil_div(columns, WEIGHTS[weight].warp_columns)))
    while True:
        moments = MOMENTS_BYTES * max(warps, 8) // 8
        plan = plan_stream(
            rows, features, columns, norm=norm, blocks=blocks, warps=warps, held=held, weight=weight, ring_bytes=ring_bytes,
            block_bytes=most - moments, least_bytes=least_bytes,
        )  # fmt: skip
        if plan.shared_bytes + moments <= shared_limit or warps <= 2:
            return plan
        warps //= 2


def quantized_tile(
    rows: int,
    features: int,
    columns: int,
    *,
    weight: str,
    blocks: int = 132,
    shared_limit: int = SHARED_LIMITS[90],
    clusters: bool = True,
    cluster: int | None = None,
    stages: int = MAX_TILE_STAGES,
) -> TilePlan:
    """A tile launch for integers: as many stages as fit, K split over a cluster where there are few features.

    cluster: instead of what the features ask for; clusters: whether the GPU has them.
    """
    # Sums and dequantized weights of 64 rows and two tiles of features are more than a thread's registers.
    feature_tiles, warps_down = (1, 8) if rows > 32 else (2, 4)
    tile = 16 * feature_tiles * warps_down
    tokens = 16 if rows <= 16 else 32 if rows <= 32 else 64
    stored = WEIGHTS[weight]
    stage_columns = tile_stage_columns(warps_down, stored)
    if cluster is None:
        cluster = blocks // ceil_div(features, tile) if clusters else 1
    cluster = max(1, min(MAX_CLUSTER, cluster, columns // (2 * stage_columns)))
    room = shared_limit // tile_stage_bytes(tile, tokens, warps_down, stored)
    needed = ceil_div(ceil_div(columns, cluster), stage_columns) + 1
    return plan_tile(
        rows, features, columns, cluster=cluster, feature_tiles=feature_tiles, warps_down=warps_down,
        stages=max(2, min(stages, room, needed)), blocks=blocks, weight=weight,
    )  # fmt: skip
