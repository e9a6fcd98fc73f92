"""What all plans of the linear kernels share: their folder, numbers that kernels know, and how to divide work."""

from __future__ import annotations

from pathlib import Path

from ..launch import RESERVED_BYTES as RESERVED_BYTES
from ..launch import SWIZZLED_COLUMNS

FOLDER = Path(__file__).parent

NORMS = {"none": 0, "layer": 1, "rms": 2}
"""Norm of the input fused into the product -> its number in stream.cu."""

BLOCK_BYTES = 112 * 1024
"""Most shared memory that a block needs: two then fit one SM."""

SWIZZLED_ROW_BYTES = 2 * SWIZZLED_COLUMNS


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def round_up(a: int, multiple: int) -> int:
    return ceil_div(a, multiple) * multiple
