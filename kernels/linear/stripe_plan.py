"""The plan of `linear_stripe`: products of up to 8 rows with integer weights. Plain arithmetic: no GPU, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from ..launch import LaunchShape
from ..nvrtc import KernelSource
from .formats import WEIGHTS, StoredWeight
from .multicast_plan import SMALL_WEIGHT
from .sizes import FOLDER, NORMS, RESERVED_BYTES, ceil_div, round_up

STRIPE_SIGNATURE = "PPPPPPPPiiiiif"
MAX_STRIPE_ROWS = 8
TILE_FEATURES = 16

STRIPE_CAPABILITY, MULTIPROCESSORS = 90, 132
MOST_ROWS, MOST_NORMED_ROWS = 4, 1
"""Rows up to which these launches were faster than others; with a norm inside, than with the norm in front."""
WIDE_COLUMNS = 4096
"""More columns than these keep 16 warps busy."""
FEW_FEATURES = 40
"""Of a multiprocessor: fewer are not divided among two blocks, nor multiplied by more than two rows."""
PAIRED_FEATURES = 28, 48
"""Of a block of two on a multiprocessor, for four bits: two or three tiles that are nearly full."""
LEAST_SIDE = 4096
"""Features and columns of weights of eight bits, at least: 24 layers 2,048 wide took 0.744 ms, 0.685 with stream.cu."""
MAX_NORM_PIECES = 3
"""Pieces of eight elements that a thread norms of a row, at most."""
LANE_BYTES = 16
MAX_OUTPUTS = 4
"""Of a thread."""


@dataclass(frozen=True)
class StripePlan:
    """A launch of `linear_stripe`: each block owns a range of features and holds all of x.

    warps:       per block; they split the columns.
    tiles:       groups of 16 features whose sums a warp holds at once.
    steps:       of the columns that the ring of W holds, each of `tiles` stages of 16 features.
    residents:   blocks that one multiprocessor has registers for.
    least_bytes: shared memory that a block takes even when it needs less.
    early_steps: of the ring, asked for before the kernel waits for its predecessors.
    weight:      how W is stored, a key of `formats.WEIGHTS`.
    """

    rows: int
    features: int
    columns: int
    norm: str
    blocks: int
    warps: int
    tiles: int
    steps: int
    residents: int
    least_bytes: int
    early_steps: int
    weight: str

    @property
    def source(self) -> KernelSource:
        return KernelSource(FOLDER / "stripe.cu", ())

    def entry(self, element: str) -> str:
        """Name expression of the kernel for CUDA type `element`."""
        norm = (NORMS[self.norm], self.norm_pieces)
        parameters = (element, self.warps, self.tiles, self.steps, self.residents, self.outputs, *norm)
        return f"trtc::linear_stripe<{', '.join(map(str, parameters))}{WEIGHTS[self.weight].policy(element)}>"

    @property
    def outputs(self) -> int:
        """Of a thread."""
        turns = ceil_div(ceil_div(self.features, self.blocks), TILE_FEATURES * self.tiles)
        return ceil_div(turns * self.rows * TILE_FEATURES * self.tiles, 32 * self.warps)

    @property
    def norm_pieces(self) -> int:
        """Pieces of a row that a thread norms; 1 where it norms none."""
        return 1 if self.norm == "none" else norm_pieces(self.columns, self.warps)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory; the layout is that at the top of `linear_stripe`."""
        ring = self.steps * self.tiles * stage_bytes(self.warps)
        return max(self.least_bytes, ring + self._bytes_beside_ring())

    def _bytes_beside_ring(self) -> int:
        features = ceil_div(self.features, self.blocks)
        return bytes_beside_ring(
            self.rows, self.columns, features, self.warps, self.tiles, WEIGHTS[self.weight]
        )

    def launch_shape(self, dependent: bool) -> LaunchShape:
        return LaunchShape((self.blocks,), (32 * self.warps,), self.shared_bytes, dependent=dependent)


def norm_pieces(columns: int, warps: int) -> int:
    """Pieces of eight elements of a row that a thread norms."""
    return ceil_div(columns, 32 * warps * 8)


def stage_bytes(warps: int) -> int:
    """Bytes of a stage of the ring: 16 features, a step of the warps."""
    return 2 * LANE_BYTES * 32 * warps


def bytes_beside_ring(
    rows: int, columns: int, block_features: int, warps: int, tiles: int, stored: StoredWeight
) -> int:
    """Shared memory of a block for x, the scales, and where the sums of the warps meet."""
    x = rows * (round_up(columns, max(64, stored.pad)) + 32) * 2
    turns = ceil_div(block_features, TILE_FEATURES * tiles)
    partial = turns * warps * rows * TILE_FEATURES * tiles * 4
    if stored.group is None:
        return x + partial
    groups = stored.padded(columns) // stored.group
    words = groups * (2 if stored.zeros else 1) // 2 | 1
    whole_tiles = (
        turns * tiles * TILE_FEATURES
    )  # what lies behind the last feature's scales is read, and not used
    return x + partial + whole_tiles * words * 4


def choose_stripe(
    rows: int,
    features: int,
    columns: int,
    *,
    weight: str,
    norm: str = "none",
    capability: int = 90,
    shared_limit: int,
) -> StripePlan | None:
    """The launch for few rows on Hopper, where it was measured (bench/notes/kernels_linear.md); None where there is none.

    For the multiprocessors of an H100 or H200, whatever the GPU has: graphs have norms inside by it, before there is a GPU.
    """
    stored = WEIGHTS[weight]
    if capability != STRIPE_CAPABILITY or not fits_stripe(rows, columns, stored):
        return None
    if rows > (MOST_NORMED_ROWS if norm != "none" else MOST_ROWS):
        return None
    plan = partial(plan_stripe, rows, features, columns, weight=weight, norm=norm)
    half = (shared_limit + RESERVED_BYTES) // 2  # as much as this, and a multiprocessor has one block
    per_multiprocessor = ceil_div(features, MULTIPROCESSORS)
    paired = partial(
        plan, blocks=2 * MULTIPROCESSORS, warps=8, tiles=4, residents=2, block_bytes=half - RESERVED_BYTES
    )
    if stored.bits == 8:
        if rows > 1 or min(features, columns) < LEAST_SIDE:
            return None
        if per_multiprocessor >= FEW_FEATURES:
            return paired(early_steps=2)
        return plan(
            blocks=MULTIPROCESSORS, warps=16, tiles=2, block_bytes=shared_limit, most_steps=3, early_steps=2
        )
    if features * columns < SMALL_WEIGHT:
        blocks = max(1, min(MULTIPROCESSORS, features // TILE_FEATURES))
        return plan(blocks=blocks, warps=8, tiles=2, block_bytes=half - RESERVED_BYTES) if rows == 1 else None
    least, most = PAIRED_FEATURES
    full = least <= features / (2 * MULTIPROCESSORS) <= most
    if (
        rows == 1 and columns <= WIDE_COLUMNS and full and stored.group == 128
    ):  # with more scales, registers run out
        return paired(most_steps=2, early_steps=1)
    few = per_multiprocessor < FEW_FEATURES
    if norm != "none" or (rows > 2 and few):
        return None
    wide = rows > 2 or columns > WIDE_COLUMNS
    for block_bytes in (half, shared_limit):
        found = plan(
            blocks=MULTIPROCESSORS, warps=16 if wide else 8, tiles=2 if wide else 4, block_bytes=block_bytes, least_bytes=half,
            most_steps=2 if wide else 3, early_steps=2 if few and not wide else 1,
        )  # fmt: skip
        if found is not None:
            return found
    return None


def fits_stripe(rows: int, columns: int, stored: StoredWeight) -> bool:
    """Whether the kernel takes such a product at all: it copies scales of a row in words of two."""
    if rows > MAX_STRIPE_ROWS or stored.pieces == 1:
        return False
    groups = 0 if stored.group is None else stored.padded(columns) // stored.group
    return stored.zeros or groups % 2 == 0


def plan_stripe(
    rows: int,
    features: int,
    columns: int,
    *,
    weight: str,
    norm: str = "none",
    blocks: int,
    warps: int,
    tiles: int,
    residents: int = 1,
    block_bytes: int,
    least_bytes: int = 0,
    most_steps: int = 16,
    early_steps: int = 16,
) -> StripePlan | None:
    """A launch over `blocks` blocks, which take up to `tiles` tiles of features at once.

    None where not even two steps fit into `block_bytes` of shared memory, or where a thread had too many outputs, or too much
    of a row to norm.
    """
    stored = WEIGHTS[weight]
    blocks = min(blocks, features)
    warps = min(warps, max(2, ceil_div(columns, stored.warp_columns)))
    block_features = ceil_div(features, blocks)
    block_tiles = ceil_div(block_features, TILE_FEATURES)
    tiles = ceil_div(block_tiles, ceil_div(block_tiles, tiles))  # as many in each turn
    room = block_bytes - bytes_beside_ring(rows, columns, block_features, warps, tiles, stored)
    turns = ceil_div(block_features, TILE_FEATURES * tiles)
    needed = turns * ceil_div(columns, stored.warp_columns * warps)
    steps = min(most_steps, needed, room // (tiles * stage_bytes(warps)))
    plan = StripePlan(
        rows,
        features,
        columns,
        norm,
        blocks,
        warps,
        tiles,
        steps,
        residents,
        least_bytes,
        min(early_steps, steps),
        weight,
    )
    fits = steps >= min(2, needed) and plan.norm_pieces <= MAX_NORM_PIECES and plan.outputs <= MAX_OUTPUTS
    return plan if fits else None
