"""Launches of the kernels of linear layers: what each is made of, and what it takes. Plain arithmetic: no GPU, no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..errors import KernelContractError
from ..launch import SHARED_LIMITS as SHARED_LIMITS
from ..launch import SMALLEST_SHARED_LIMIT as SMALLEST_SHARED_LIMIT
from ..launch import SWIZZLED_COLUMNS, LaunchShape
from ..nvrtc import KernelSource
from .formats import FLOAT, WEIGHTS, StoredWeight
from .multicast_plan import SMALL_WEIGHT as SMALL_WEIGHT
from .multicast_plan import MulticastPlan
from .quantized_warpgroup_plan import QuantizedWarpgroupPlan
from .sizes import BLOCK_BYTES as BLOCK_BYTES
from .sizes import FOLDER as FOLDER
from .sizes import NORMS as NORMS
from .sizes import RESERVED_BYTES as RESERVED_BYTES
from .sizes import SWIZZLED_ROW_BYTES, round_up
from .sizes import ceil_div as ceil_div
from .stripe_plan import StripePlan

LANE_COLUMNS = 8
LANE_BYTES = 16

ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}
"""Activation -> its number in common/activation.cuh."""

RING_BYTES = 80 * 1024
MIN_RING_BYTES = 48 * 1024
"""Bytes of W in flight: 64 KiB for each SM saturate an H200; under 48 KiB x is not held, to leave the ring its room."""

MAX_STAGES = 16
MAX_TILE_FEATURES = 32
WIDE_TILE_FEATURES = 40
"""Features of a tile at most, and of one of a block's only two at most: a tile more reads all of x again."""

STREAM_SIGNATURE = "PPPPPPPiiiif"
TILE_SIGNATURE = "PPPPPPiiiiii"
LEAST_STAGE_COLUMNS = 64

MAX_WARPGROUP_STAGES = 16
WARPGROUP_CAPABILITY = 90
MAX_CLUSTER = 8
MIN_BLOCK_COLUMNS = 128

WARPGROUP_SIGNATURE = "PPPTTiiiiiii"

MOMENTS_BYTES = 1024
"""Static shared memory of a stream kernel of 8 warps with a norm, at most."""

MAX_STREAM_ROWS = 16
MAX_ROWS = 64


@dataclass(frozen=True)
class StreamPlan:
    """A launch of `linear_stream`: each block owns a range of features and reads all of x.

    warps:       per block; they split the columns.
    octets:      a tile is 8 * octets features (1 to 5).
    token_tiles: groups of 8 rows of x (1 or 2).
    stages:      of the ring of W.
    held_x:      x is held in shared memory; else it comes through the ring, once a tile.
    least_bytes: shared memory that a block takes even when it needs less.
    weight:      how W is stored, a key of `formats.WEIGHTS`.
    """

    rows: int
    features: int
    columns: int
    norm: str
    blocks: int
    warps: int
    octets: int
    token_tiles: int
    stages: int
    held_x: bool
    least_bytes: int = 0
    weight: str = FLOAT

    @property
    def source(self) -> KernelSource:
        return KernelSource(FOLDER / "stream.cu", ())

    def entry(self, element: str) -> str:
        """Name expression of the kernel for CUDA type `element`."""
        held = "true" if self.held_x else "false"
        parameters = (element, self.warps, self.octets, self.token_tiles, self.stages, held, NORMS[self.norm])
        policy = WEIGHTS[self.weight].policy(element)
        return f"trtc::linear_stream<{', '.join(map(str, parameters))}{policy}>"

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory; the layout is that at the top of `linear_stream`."""
        x_slots = 0 if self.held_x else self.token_tiles * WEIGHTS[self.weight].pieces
        ring = self.stages * stage_bytes(self.warps, self.octets, x_slots)
        held = _held_bytes(self.rows, self.columns, self.weight) if self.held_x else 0
        turns = ceil_div(ceil_div(self.features, self.blocks), 8 * self.octets)
        buffers = 1 if turns == 1 and not self.held_x and self.weight == FLOAT else 2
        partial = _partial_bytes(self.rows, self.warps, self.octets, buffers)
        return max(self.least_bytes, ring + partial + held)

    def launch_shape(self, dependent: bool) -> LaunchShape:
        return LaunchShape((self.blocks,), (32 * self.warps,), self.shared_bytes, dependent=dependent)


@dataclass(frozen=True)
class TilePlan:
    """A launch of `linear_tile`: a cluster of blocks per range of features, which splits the columns.

    token_tiles:   groups of 8 rows of x (2, 4 or 8).
    feature_tiles: groups of 16 features per warp; warps_down: warps that own different features (4 or 8).
    weight:        how W is stored, a key of `formats.WEIGHTS`.
    """

    rows: int
    features: int
    columns: int
    token_tiles: int
    feature_tiles: int
    warps_down: int
    stages: int
    features_per_block: int
    cluster: int
    weight: str = FLOAT

    WARPS = 8

    @property
    def source(self) -> KernelSource:
        return KernelSource(FOLDER / "tile.cu", ())

    def entry(self, element: str) -> str:
        """Name expression of the kernel for CUDA type `element`."""
        parameters = f"{element}, {self.token_tiles}, {self.feature_tiles}, {self.warps_down}, {self.stages}"
        return f"trtc::linear_tile<{parameters}{WEIGHTS[self.weight].policy(element)}>"

    @property
    def stage_columns(self) -> int:
        """Columns of a stage: a step of the warps that split them."""
        return tile_stage_columns(self.warps_down, WEIGHTS[self.weight])

    @property
    def columns_per_block(self) -> int:
        return round_up(ceil_div(self.columns, self.cluster), self.stage_columns)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: the ring, or the sums that take its place, whichever is larger."""
        tile = 16 * self.feature_tiles * self.warps_down
        tokens = 8 * self.token_tiles
        ring = self.stages * tile_stage_bytes(tile, tokens, self.warps_down, WEIGHTS[self.weight])
        sums = self.WARPS // self.warps_down * tokens * (tile + 4) * 4
        return max(ring, sums)

    def launch_shape(self, dependent: bool) -> LaunchShape:
        blocks = ceil_div(self.features, self.features_per_block) * self.cluster
        cluster = (self.cluster,) if self.cluster > 1 else ()
        return LaunchShape((blocks,), (32 * self.WARPS,), self.shared_bytes, cluster, dependent=dependent)


@dataclass(frozen=True)
class WarpgroupPlan:
    """A launch of `linear_warpgroup` (sm_90a): a cluster of blocks per range of features, which splits the columns.

    tokens:             rows of x, padded (16, 32 or 64).
    feature_tiles:      groups of 64 features per block (1, 2 or 4).
    features_per_block: at most 64 * feature_tiles, a multiple of 8.
    """

    rows: int
    features: int
    columns: int
    tokens: int
    feature_tiles: int
    stages: int
    features_per_block: int
    cluster: int

    @property
    def source(self) -> KernelSource:
        return KernelSource(FOLDER / "warpgroup.cu", ())

    def entry(self, element: str) -> str:
        """Name expression of the kernel for CUDA type `element`."""
        return f"trtc::linear_warpgroup<{element}, {self.tokens}, {self.feature_tiles}>"

    @property
    def columns_per_block(self) -> int:
        return round_up(ceil_div(self.columns, self.cluster), SWIZZLED_COLUMNS)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: the ring, or the sums that take its place, whichever is larger."""
        beyond = 64 * self.feature_tiles - self.features_per_block  # wgmma reads whole tiles
        ring = SWIZZLED_ROW_BYTES * (self.stages * (self.features_per_block + self.tokens) + beyond)
        return max(ring, self.tokens * (64 * self.feature_tiles + 4) * 4)

    def launch_shape(self, dependent: bool) -> LaunchShape:
        blocks = ceil_div(self.features, self.features_per_block) * self.cluster
        cluster = (self.cluster,) if self.cluster > 1 else ()
        threads = 288 if self.feature_tiles > 2 else 160  # one or two warpgroups and the copying warp
        return LaunchShape((blocks,), (threads,), self.shared_bytes, cluster, dependent=dependent)


Plan = StreamPlan | TilePlan | WarpgroupPlan | MulticastPlan
AnyPlan = Plan | StripePlan | QuantizedWarpgroupPlan
"""Also those for integer weights alone."""


def plan_stream(
    rows: int,
    features: int,
    columns: int,
    *,
    norm: str = "none",
    blocks: int = 132,
    warps: int = 8,
    held: bool = True,
    block_bytes: int = BLOCK_BYTES,
    least_bytes: int = 0,
    weight: str = FLOAT,
    ring_bytes: int = RING_BYTES,
) -> StreamPlan:
    """A stream launch over `blocks` blocks (fewer for fewer features), in the smallest tile of the fewest turns.

    held: hold x where it fits. block_bytes, least_bytes: shared memory a block may take, and takes at least.
    ring_bytes: of W in flight.
    """
    pieces = WEIGHTS[weight].pieces
    blocks = min(blocks, features)
    per_block = ceil_div(features, blocks)
    token_tiles = ceil_div(rows, 8)
    widest = WIDE_TILE_FEATURES // 8
    fits = 2 * stage_bytes(warps, widest, token_tiles) + _partial_bytes(rows, warps, widest, 2) <= block_bytes
    wide = per_block <= 2 * WIDE_TILE_FEATURES and weight == FLOAT and fits
    turns = ceil_div(per_block, WIDE_TILE_FEATURES if wide else MAX_TILE_FEATURES)
    octets = ceil_div(ceil_div(per_block, turns), 8)
    needed = ceil_div(columns, WEIGHTS[weight].warp_columns * warps) * turns
    needed = min(MAX_STAGES, max(2, needed))

    free = block_bytes - _partial_bytes(rows, warps, octets, 2)
    room, stage = min(ring_bytes, free - _held_bytes(rows, columns, weight)), stage_bytes(warps, octets, 0)
    held = held and room >= min(MIN_RING_BYTES, needed * stage)
    if not held:
        # The ring also holds x, which must not take W's room. With more than 8 rows the room of a second buffer of sums is
        # better left free than in the ring: the block fits beside those of the kernel before (a layer with 8192 x 2048 after
        # 2048 x 2048, 16 rows: 55.6 us, 56.5 with a stage more). Integer weights keep the stages that were measured.
        spared = weight == FLOAT and turns == 1 and (rows <= 8 or 8 * octets > MAX_TILE_FEATURES)
        free = block_bytes - _partial_bytes(rows, warps, octets, 1 if spared else 2)
        stage = stage_bytes(warps, octets, token_tiles * pieces)
        room = min(ring_bytes * (octets + token_tiles * pieces) // octets, free)
    stages = max(2, min(needed, room // stage))
    return StreamPlan(
        rows, features, columns, norm, blocks, warps, octets, token_tiles, stages, held, least_bytes, weight
    )


def plan_tile(
    rows: int,
    features: int,
    columns: int,
    *,
    cluster: int,
    feature_tiles: int,
    warps_down: int,
    stages: int = 4,
    blocks: int = 132,
    weight: str = FLOAT,
) -> TilePlan:
    """A tile launch with `cluster` blocks per range, in as few whole waves of `blocks` blocks as the tile allows."""
    tile = 16 * feature_tiles * warps_down
    ranges_per_wave = max(1, blocks // cluster)
    waves = ceil_div(features, tile * ranges_per_wave)
    per_block = round_up(ceil_div(features, ranges_per_wave * waves), 4)
    token_tiles = 2 if rows <= 16 else 4 if rows <= 32 else 8
    return TilePlan(
        rows, features, columns, token_tiles, feature_tiles, warps_down, stages, per_block, cluster, weight
    )


def plan_warpgroup(
    rows: int,
    features: int,
    columns: int,
    *,
    cluster: int,
    feature_tiles: int,
    ring_bytes: int = 108 * 1024,
    blocks: int = 132,
) -> WarpgroupPlan:
    """A warpgroup launch with `cluster` blocks per range, in as few whole waves of `blocks` blocks as fit.

    ring_bytes: up to BLOCK_BYTES for two blocks per SM, so that the next kernel loads ahead; up to twice that for one.
    """
    ranges_per_wave = max(1, blocks // cluster)
    waves = ceil_div(features, 64 * feature_tiles * ranges_per_wave)
    per_block = min(64 * feature_tiles, round_up(ceil_div(features, ranges_per_wave * waves), 8))
    tokens = 16 if rows <= 16 else 32 if rows <= 32 else 64
    needed = ceil_div(ceil_div(columns, cluster), SWIZZLED_COLUMNS)
    room = ring_bytes // SWIZZLED_ROW_BYTES - (64 * feature_tiles - per_block)
    stages = max(2, min(MAX_WARPGROUP_STAGES, needed, room // (per_block + tokens)))
    return WarpgroupPlan(rows, features, columns, tokens, feature_tiles, stages, per_block, cluster)


def check_norm(rows: int, norm: str) -> None:
    """Raise KernelContractError for a norm in front of more rows than a kernel norms."""
    if norm != "none" and rows > MAX_STREAM_ROWS:
        raise KernelContractError(
            f"linear: a norm is fused for up to {MAX_STREAM_ROWS} rows, not {rows}; norm in a kernel of its own"
        )


def tile_stage_columns(warps_down: int, stored: StoredWeight) -> int:
    """Columns of a stage of a tile kernel; `TileLayout` in tile.cu."""
    return max(LEAST_STAGE_COLUMNS, stored.warp_columns * (TilePlan.WARPS // warps_down))


def tile_stage_bytes(tile: int, tokens: int, warps_down: int, stored: StoredWeight) -> int:
    """Bytes of a stage of a tile kernel's ring: `tile` features of W, `tokens` rows of x."""
    return tile_stage_columns(warps_down, stored) * (tile * stored.bits + tokens * 16) // 8


def sources(element: str, plans: Iterable[AnyPlan]) -> tuple[KernelSource, ...]:
    """The source files, each with the kernels that `plans` need, for CUDA type `element`."""
    entries: dict[Path, set[str]] = {}
    for plan in plans:
        entries.setdefault(plan.source.path, set()).add(plan.entry(element))
    return tuple(KernelSource(path, tuple(sorted(names))) for path, names in sorted(entries.items()))


def check_sizes(rows: int, columns: int, features: int) -> None:
    """Raise KernelContractError for sizes that no plan serves."""
    if not 1 <= rows <= MAX_ROWS:
        raise KernelContractError(
            f"linear: rows={rows} is not in 1 to {MAX_ROWS}; larger products belong to cuBLASLt"
        )
    if columns % LANE_COLUMNS:
        raise KernelContractError(f"linear: in_features={columns} is not a multiple of {LANE_COLUMNS}")
    if features * columns >= 2**32:
        raise KernelContractError(
            f"linear: weight of {features} x {columns} elements is not under 2**32 elements"
        )


def stage_bytes(warps: int, octets: int, x_slots: int) -> int:
    """Bytes of one stage of a stream kernel's ring: W, and x unless that is held."""
    return (octets + x_slots) * warps * 32 * LANE_BYTES


def _partial_bytes(rows: int, warps: int, octets: int, buffers: int) -> int:
    """Bytes of the buffers in which the sums of a stream kernel's warps meet: two, and held x behind both; one for the only
    turn of float weights. Launches of integers were measured with two."""
    return buffers * warps * rows * 8 * octets * 4


def _held_bytes(rows: int, columns: int, weight: str) -> int:
    """Bytes of x in shared memory; the stride is `held_stride` in stream.cu, or less."""
    return rows * (round_up(columns, max(64, WEIGHTS[weight].pad)) + 32) * 2
