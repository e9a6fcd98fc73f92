"""Launches of multicast.cu: how features, K and copies of x are divided among blocks. Plain arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from ..launch import SWIZZLED_COLUMNS, LaunchShape
from ..nvrtc import KernelSource
from .sizes import BLOCK_BYTES, FOLDER, SWIZZLED_ROW_BYTES, ceil_div, round_up

MULTICAST_SIGNATURE = "PPPTTiiiiiiii"
MAX_WEIGHT_STAGES = 32
MAX_ROW_STAGES = 16
TOKENS = 64
"""Rows of a wgmma; what it reads behind the rows of x there are must be shared memory of the block."""

LEAST_ROWS, LEAST_ROWS_OF_LARGE = 33, 17
"""Rows from which the kernel was measured to be the fastest of ours; those of weights of LARGE_WEIGHT elements."""

LARGE_WEIGHT = 20_000_000

MAX_NARROW_FEATURES = 32_768
"""More features are logits."""

SMALL_WEIGHT = 3_500_000
"""Elements of a weight under which a kernel's time is latency (3072 x 768 is under it)."""

MOST_FEATURES = 128

SUM_STAGES = 2
"""Stages of W that the sums of parts of K take the room of."""

MAX_SPLIT = 8
LEAST_PART_COLUMNS = 256
"""Columns of a part of K of a large weight, at least: fewer are not worth the exchange of sums."""

LEAST_WIDTH, LEAST_WHOLE_WIDTH = 64, 72
"""Features of a block of a large weight, at least, while K can be split instead: it reads as many bytes of x as of W then. For
the first split they are more: a layer with 16384 x 4096 takes up to 0.8% less in two parts of 128 features than whole in 64."""

CLUSTERS_IN_PAIRS = {1: 264, 2: 132, 4: 60, 8: 25}
"""Blocks of a cluster -> clusters that an H200 runs at once, of its 132 multiprocessors, two blocks on each. 30 of eight also
fit, but not beside other kernels' blocks: with 29 and 30 a launch took 2 us more than with 26 and 27, and a layer takes 0.4 to
1.5% less with 25 than with 27."""

SHORT_COLUMNS, SHORT_ROW_STAGES = 2560, 8
"""Columns up to which K is split once, not twice, for blocks of three quarters of LEAST_WIDTH, and more stages of x are in
flight for these two parts: a layer with 6144 and 8192 x 2048 takes 1.7% less (64 rows), with 7680 x 2560 0.8% (33 and 40)."""

MOST_ROWS_OF_ONE_COPY = 48
"""Rows up to which each block of an unsplit K loads all of x: a layer with 16384 x 4096 takes 0.1 to 0.3% less with two copies
of 64 rows, 0.4% more with two of 33 to 48."""

ROW_STAGES = 6
"""Stages of x in flight before W gets the rest of a block's shared memory."""


@dataclass(frozen=True)
class MulticastPlan:
    """A launch of `linear_multicast` (sm_90a): clusters of `copies` blocks that share x times `split` parts of K.

    features_per_block:        a multiple of 8 up to 128, or of 16 up to 256; of 16 above 64, two warpgroups share them.
    copies:                    blocks that each load a share of the rows of x for all (1, 2, 4 or 8); times split at most 8.
    split:                     parts of K (1, 2, 4 or 8).
    weight_stages, row_stages: of 64 columns, in the rings of W and x.
    """

    rows: int
    features: int
    columns: int
    features_per_block: int
    copies: int
    split: int
    weight_stages: int
    row_stages: int

    @property
    def source(self) -> KernelSource:
        return KernelSource(FOLDER / "multicast.cu", ())

    def entry(self, element: str) -> str:
        """Name expression of the kernel for CUDA type `element`."""
        parameters = f"{element}, {self.features_per_block}, {self.split}"
        return f"trtc::linear_multicast<{parameters}>"

    @property
    def columns_per_block(self) -> int:
        return columns_per_block(self.columns, self.split)

    @property
    def tile_rows(self) -> int:
        """Rows of x in a stage: as many for each copy, in whole groups of 8."""
        return round_up(self.rows, 8 * self.copies)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory; the layout is that at the top of `linear_multicast`."""
        row_ring = self.row_stages * self.tile_rows * SWIZZLED_ROW_BYTES
        weight_ring = self.weight_stages * self.features_per_block * SWIZZLED_ROW_BYTES
        read_beyond = (TOKENS - self.tile_rows) * SWIZZLED_ROW_BYTES
        return row_ring + max(weight_ring, read_beyond)

    def launch_shape(self, dependent: bool) -> LaunchShape:
        ranges = round_up(ceil_div(self.features, self.features_per_block), self.copies)
        threads = 288 if self.features_per_block > 64 and self.features_per_block % 16 == 0 else 160
        size = self.copies * self.split
        cluster = (size,) if size > 1 else ()
        return LaunchShape(
            (ranges * self.split,), (threads,), self.shared_bytes, cluster, dependent=dependent
        )


def plan_multicast(
    rows: int,
    features: int,
    columns: int,
    *,
    features_per_block: int,
    copies: int,
    split: int = 1,
    block_bytes: int = BLOCK_BYTES,
    row_stages: int = ROW_STAGES,
) -> MulticastPlan:
    """A launch with rings as large as fit `block_bytes`: x at least `row_stages` or all, then W, then x again.

    copies is lowered where there are fewer rows than 8 for each.
    """
    copies = min(copies, 1 << (ceil_div(rows, 8).bit_length() - 1))
    needed = ceil_div(columns_per_block(columns, split), SWIZZLED_COLUMNS)
    row_bytes = round_up(rows, 8 * copies) * SWIZZLED_ROW_BYTES
    weight_bytes = features_per_block * SWIZZLED_ROW_BYTES
    row_stages = min(row_stages, needed, MAX_ROW_STAGES)
    most = needed + SUM_STAGES if split > 1 else needed
    fitting = (block_bytes - row_stages * row_bytes) // weight_bytes
    weight_stages = max(SUM_STAGES, min(most, MAX_WEIGHT_STAGES, fitting))
    more = (block_bytes - weight_stages * weight_bytes) // row_bytes
    row_stages = max(row_stages, min(needed, MAX_ROW_STAGES, more))
    return MulticastPlan(
        rows, features, columns, features_per_block, copies, split, weight_stages, row_stages
    )


def takes_multicast(rows: int, features: int, columns: int) -> bool:
    """Whether multicast.cu is the kernel for more than 16 rows of these sizes on Hopper, as measured."""
    least = LEAST_ROWS_OF_LARGE if features * columns >= LARGE_WEIGHT else LEAST_ROWS
    return rows >= least and features <= MAX_NARROW_FEATURES


def choose_multicast(rows: int, features: int, columns: int, multiprocessors: int) -> MulticastPlan | None:
    """The plan for a shape, or None where another kernel is faster. Whether there is one depends on the sizes alone.

    What a block reads is x over its part of K and as much of W: wide blocks over parts of K read less, and parts have sums to
    send. A multiprocessor has room for two blocks: of this kernel, or one of it and one of the next.
    """
    if not takes_multicast(rows, features, columns):
        return None
    if features * columns < SMALL_WEIGHT:
        return _choose_small(rows, features, columns, multiprocessors)
    split = 1
    width = even_width(features, 2 * multiprocessors)
    while (
        width < (LEAST_WIDTH if split > 1 else LEAST_WHOLE_WIDTH)
        and split < MAX_SPLIT
        and columns >= 2 * split * LEAST_PART_COLUMNS
    ):
        split *= 2
        width = even_width(features, CLUSTERS_IN_PAIRS[split] * multiprocessors // 132)
        if split == 2 and columns <= SHORT_COLUMNS and width >= LEAST_WIDTH * 3 // 4:
            width = max(width, LEAST_WIDTH)
    row_stages = SHORT_ROW_STAGES if split == 2 and columns <= SHORT_COLUMNS else ROW_STAGES
    copies = 2 if split == 1 and rows > MOST_ROWS_OF_ONE_COPY else 1
    return plan_multicast(
        rows, features, columns, features_per_block=width, copies=copies, split=split, row_stages=row_stages
    )


def even_width(features: int, ranges: int) -> int:
    """Features of a block, at most MOST_FEATURES, that are as many for each of so many ranges, or of whole waves of them."""
    ranges = max(1, ranges)
    waves = ceil_div(features, MOST_FEATURES * ranges)
    return round_up(ceil_div(features, ranges * waves), 8)


def _choose_small(rows: int, features: int, columns: int, multiprocessors: int) -> MulticastPlan:
    """Weights that are read in a few microseconds: blocks that share x, fewer than there are multiprocessors."""
    split = 2 if features >= 2 * columns else 4
    blocks = (
        multiprocessors
        if split == 2
        else multiprocessors * 3 // 4
        if columns <= 2048
        else multiprocessors * 2 // 3
    )
    width = even_width(features, blocks // split)
    width = round_up(width, 16) if width > 64 else width
    return plan_multicast(
        rows,
        features,
        columns,
        features_per_block=width,
        copies=8 // split,
        split=split,
        row_stages=8,
    )


def columns_per_block(columns: int, split: int) -> int:
    """Columns of K that a part takes, whole stages."""
    return round_up(ceil_div(columns, split), SWIZZLED_COLUMNS)
