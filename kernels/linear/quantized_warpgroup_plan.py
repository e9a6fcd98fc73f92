"""Launches of quantized_warpgroup.cu: how features and K are divided among blocks. Plain arithmetic."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from ..launch import LaunchShape
from ..nvrtc import KernelSource
from .formats import WEIGHTS
from .sizes import FOLDER, SWIZZLED_ROW_BYTES, ceil_div, round_up

QUANTIZED_WARPGROUP_SIGNATURE = "PPPPPTiiiiiii"

GROUP_FEATURES = 64
"""Features of a warpgroup: rows of a wgmma."""

MAX_GROUPS = 4
SPLITS = (1, 2, 3, 4, 8)
"""Parts of K; of clusters of 5, 6 and 7 blocks fewer fit the GPU."""

UNIT_COLUMNS = 128
"""K is divided into whole units of so many columns."""

GROUP_BYTES = 128 * 16
"""16 bytes for each thread of a warpgroup. A stage of W is twice that: of two rows."""

STAGE_COLUMNS = {8: 64, 4: 128}
"""Columns of W in a stage, by the bits of a weight."""

MAX_ROW_STAGES = 8
LEAST_ROW_STAGES = 3
"""Stages of x, where K has as many. A stage is given back when the next one is being multiplied: one is not enough for two."""

MAX_WEIGHT_STAGES = 24
WEIGHT_RING_BYTES = {8: 64 * 1024, 4: 48 * 1024}
"""Bytes of W in flight, at most, by the bits of a weight; more would take the room of x."""

WAVE_CLOCKS = 8000
"""Of a wave of blocks, whatever they do."""

TILE_CLOCKS, TOKEN_CLOCKS, LEAST_TILES = 180, 3, 1.5
"""For each unit of columns of a warpgroup, and for each row of x besides; one warpgroup alone waits for itself."""

WEIGHT_BYTES, ALL_BYTES, SUM_BYTES, ROW_BYTES = 17, 36, 32, 128
"""That a multiprocessor gets a clock: of W, of W and x, of the sums of other parts, and of x, beside all that."""

RESIDENT_CLUSTERS = {1: 132, 2: 66, 3: 39, 4: 30, 8: 15}
"""Blocks of a cluster -> clusters that an H200 runs at once, of its 132 multiprocessors, a block on each."""

BLOCK_LIMIT = 226 * 1024
"""Most dynamic shared memory of a block on Hopper: its 227 KiB without the barriers."""


@dataclass(frozen=True)
class QuantizedWarpgroupPlan:
    """A launch of `linear_quantized_warpgroup` (sm_90a): a cluster of blocks per range of features, which split the columns.

    groups:             warpgroups of a block, each with 64 features (1 to 4).
    features_per_block: a multiple of 8, at most 64 * groups.
    split:              blocks of a cluster, parts of K (1 to 8).
    stages:             in the ring of W, of 2 * GROUP_BYTES for each group.
    row_stages:         in the ring of x, of 128 columns; at least 2, or all.
    weight:             how W is stored, a key of `formats.WEIGHTS`.
    """

    rows: int
    features: int
    columns: int
    groups: int
    features_per_block: int
    split: int
    stages: int
    row_stages: int
    weight: str

    @property
    def source(self) -> KernelSource:
        return KernelSource(FOLDER / "quantized_warpgroup.cu", ())

    def entry(self, element: str) -> str:
        """Name expression of the kernel for CUDA type `element`."""
        parameters = f"{element}, {self.tokens}, {self.groups}, {self.split}, {self.stages}"
        return f"trtc::linear_quantized_warpgroup<{parameters}{WEIGHTS[self.weight].policy(element)}>"

    @property
    def tokens(self) -> int:
        """Rows of x, padded to what a wgmma multiplies."""
        return padded_rows(self.rows)

    @property
    def columns_per_block(self) -> int:
        return columns_per_block(self.columns, self.split)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory; the layout is that at the top of the kernel."""
        rows = self.row_stages * row_stage_bytes(self.tokens)
        weights = self.stages * 2 * self.groups * GROUP_BYTES
        return rows + weights + behind_rings_bytes(self.tokens, self.groups, self.split)

    def launch_shape(self, dependent: bool) -> LaunchShape:
        blocks = ceil_div(self.features, self.features_per_block) * self.split
        cluster = (self.split,) if self.split > 1 else ()
        threads = 128 * (self.groups + 1)
        return LaunchShape((blocks,), (threads,), self.shared_bytes, cluster, dependent=dependent)


def plan_quantized_warpgroup(
    rows: int,
    features: int,
    columns: int,
    *,
    weight: str,
    groups: int,
    split: int = 1,
    features_per_block: int | None = None,
    ring_bytes: int | None = None,
    row_stages: int = MAX_ROW_STAGES,
) -> QuantizedWarpgroupPlan:
    """A launch with as many stages as K has or fit: of x at least LEAST_ROW_STAGES, of W up to `ring_bytes`, then more of x."""
    bits = WEIGHTS[weight].bits
    ring_bytes = ring_bytes or WEIGHT_RING_BYTES[bits]
    tokens, width = padded_rows(rows), groups * GROUP_FEATURES
    units = columns_per_block(columns, split) // UNIT_COLUMNS
    stage, row_stage = 2 * groups * GROUP_BYTES, row_stage_bytes(tokens)
    room = BLOCK_LIMIT - behind_rings_bytes(tokens, groups, split)
    needed = units * (UNIT_COLUMNS // STAGE_COLUMNS[bits]) + 1
    most = min(ring_bytes, room - min(units, LEAST_ROW_STAGES) * row_stage) // stage
    least = max(2, ceil_div(part_octets(tokens, split), 2))  # activations need so much room
    stages = max(least, min(needed, most, MAX_WEIGHT_STAGES))
    row_stages = min(units, row_stages, (room - stages * stage) // row_stage, MAX_ROW_STAGES)
    per_block = features_per_block or width
    return QuantizedWarpgroupPlan(
        rows, features, columns, groups, per_block, split, stages, row_stages, weight
    )


def choose_quantized_warpgroup(
    rows: int, features: int, columns: int, *, weight: str, multiprocessors: int = 132
) -> QuantizedWarpgroupPlan:
    """The plan that should take the fewest clocks, by what was measured on an H200 (bench/notes/kernels_linear.md)."""
    plans = [
        plan_quantized_warpgroup(
            rows, features, columns, weight=weight, groups=groups, split=split, features_per_block=width
        )
        for groups, split in itertools.product(range(1, most_groups(weight) + 1), SPLITS)
        for width in sorted(widths(features, groups, split, multiprocessors), reverse=True)
        if columns > (split - 1) * columns_per_block(columns, split)
    ]
    return min(plans, key=lambda plan: clocks(plan, multiprocessors))


def clocks(plan: QuantizedWarpgroupPlan, multiprocessors: int) -> float:
    """About as many clocks as a launch takes: it multiplies while it reads; the waves of blocks follow each other."""
    blocks, depth = plan.launch_shape(dependent=True).grid[0], plan.columns_per_block
    waves = ceil_div(blocks, resident_blocks(plan.split, multiprocessors))
    weights = plan.features_per_block * depth * WEIGHTS[plan.weight].bits / 8
    x_bytes = plan.tokens * 2 * depth
    share = blocks / waves / multiprocessors  # that is busy; the others leave it their bandwidth
    reading = share * max(weights / WEIGHT_BYTES, (weights + x_bytes) / ALL_BYTES)
    products = (
        max(plan.groups, LEAST_TILES) * (depth // UNIT_COLUMNS) * (TILE_CLOCKS + TOKEN_CLOCKS * plan.tokens)
    )
    sums = plan.tokens * plan.groups * GROUP_FEATURES * 4 * (plan.split - 1) / plan.split
    return waves * (WAVE_CLOCKS + max(products, reading) + x_bytes / ROW_BYTES + sums / SUM_BYTES)


def resident_blocks(split: int, multiprocessors: int) -> int:
    """Blocks that run at once: not every group of multiprocessors is a multiple of a cluster."""
    return RESIDENT_CLUSTERS[split] * multiprocessors // 132 * split


def widths(features: int, groups: int, split: int, multiprocessors: int) -> set[int]:
    """Features of a block of so many warpgroups: all it can have, and as many as make every block's share the same."""
    full = groups * GROUP_FEATURES
    ranges = max(1, resident_blocks(split, multiprocessors) // split)
    waves = ceil_div(features, full * ranges)
    even = round_up(ceil_div(features, ranges * waves), 8)
    return {full, even} if even > full - GROUP_FEATURES else {full}


def most_groups(weight: str) -> int:
    """Warpgroups that have registers enough: four have 104 each, which the scales and zeros of small groups exceed."""
    stored = WEIGHTS[weight]
    values = 0 if stored.group is None else UNIT_COLUMNS // stored.group * (2 if stored.zeros else 1)
    return MAX_GROUPS if values <= 2 else MAX_GROUPS - 1


def padded_rows(rows: int) -> int:
    """Rows that a wgmma multiplies: 32, 48 or 64."""
    return 32 if rows <= 32 else 48 if rows <= 48 else 64


def part_octets(tokens: int, split: int) -> int:
    """Groups of 8 rows of x that a part of K finishes."""
    return ceil_div(tokens // 8, split)


def columns_per_block(columns: int, split: int) -> int:
    """Columns of K that a part takes, whole units."""
    return round_up(ceil_div(columns, split), UNIT_COLUMNS)


def row_stage_bytes(tokens: int) -> int:
    """Bytes of a unit of x."""
    return UNIT_COLUMNS // 64 * tokens * SWIZZLED_ROW_BYTES


def behind_rings_bytes(tokens: int, groups: int, split: int) -> int:
    """Bytes of bias and scales of the threads, and of the sums that parts of K send to the one that finishes their rows."""
    sums = 0 if split == 1 else split * part_octets(tokens, split) * 8 * groups * GROUP_FEATURES * 4
    return groups * GROUP_BYTES + sums
