"""What all plans of the linear kernels share: their folder, numbers that kernels know, and how to divide work."""

from __future__ import annotations

from pathlib import Path

from ..launch import SWIZZLED_COLUMNS

FOLDER = Path(__file__).parent

NORMS = {"none": 0, "layer": 1, "rms": 2}
"""Norm of the input fused into the product -> its number in stream.cu."""

BLOCK_BYTES = 112 * 1024
"""Most shared memory that a block needs: two then fit one SM."""

RESERVED_BYTES = 1024
"""Shared memory that the driver adds to each block; an SM has room for one block of the limit and this."""

SWIZZLED_ROW_BYTES = 2 * SWIZZLED_COLUMNS

RESIDENT_CLUSTERS = {1: 132, 2: 66, 3: 39, 4: 30, 8: 15}
"""Blocks of a cluster -> clusters that an H200 runs at once, of its 132 multiprocessors, a block on each."""


def resident_clusters(blocks: int, multiprocessors: int) -> int:
    """Clusters of so many blocks that run at once, a block on each multiprocessor: not every group of those is a multiple."""
    return RESIDENT_CLUSTERS[blocks] * multiprocessors // 132


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def round_up(a: int, multiple: int) -> int:
    return ceil_div(a, multiple) * multiple
