"""Which decode attention kernel serves a batch, and with which grid. Plain arithmetic: no GPU, no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ..launch import LaunchShape
from ..nvrtc import KernelSource
from ..paged import FP8_ELEMENT, HEAD_DIMS

SOURCE = Path(__file__).parent / "paged_decode_attention.cu"
SIGNATURE = "PPPPPPPPPPiiiiiiiifi"

TILE = 16
"""Tokens a warp handles at a time (kTile)."""
HEADS_PER_BLOCK = 8
"""Query heads of one kv head that a block handles (kHeads)."""
MAX_CLUSTER = 8
"""Blocks per cluster that every GPU with clusters accepts."""
COUNTER_BYTES = 4
WARPS_PER_MULTIPROCESSOR = 8
"""Warps that keep a multiprocessor's share of the memory bandwidth busy."""
MANY_BLOCKS = 15
"""Blocks for each multiprocessor from which on a third stage pays: 64 sequences of 32 heads have more, 48 have less."""

WARPS_AND_STAGES = ((4, 2), (4, 3))
"""What `choose_plan` picks from."""
FP8_WARPS_AND_STAGES = ((4, 4), (4, 6))
"""The same for caches of e4m3 numbers: as many bytes on their way."""


@dataclass(frozen=True)
class DecodePlan:
    """A launch of paged_decode_attention for one batch shape.

    head_blocks: blocks per kv head, each for up to 8 query heads; heads: query heads of the first (fullest) of them.
    splits:      parts into which each sequence's context is divided.
    cluster:     splits combine through distributed shared memory, else through the workspace.
    fp8_cache:   the cache holds e4m3 numbers.
    """

    num_seqs: int
    num_kv_heads: int
    head_blocks: int
    heads: int
    head_dim: int
    warps: int
    stages: int
    splits: int
    cluster: bool
    fp8_cache: bool = False

    def entry(self, element: str) -> str:
        """Name expression of the kernel for CUDA type `element`."""
        return entry(element, self.head_dim, self.warps, self.stages, self.cluster, fp8_cache=self.fp8_cache)

    @property
    def part_bytes(self) -> int:
        """What one split hands over per block of heads: outputs, maxima and sums in float32."""
        return self.heads * (self.head_dim + 2) * 4

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory per block."""
        row_bytes = (self.head_dim // (16 if self.fp8_cache else 8) | 1) * 16
        stages = self.warps * self.stages * 2 * TILE * row_bytes
        return stages + (self.splits * self.part_bytes if self.cluster else 0)

    @property
    def counter_bytes(self) -> int:
        """The start of the workspace: one counter per (sequence, block of heads), padded to 16 bytes."""
        if self.cluster or self.splits == 1:
            return 0
        return _round_up(self.num_seqs * self.num_kv_heads * self.head_blocks * COUNTER_BYTES, 16)

    @property
    def workspace_bytes(self) -> int:
        """Global memory the launch needs, zero before the first use; launches leave the counters zero."""
        if self.cluster or self.splits == 1:
            return 0
        parts = self.num_seqs * self.num_kv_heads * self.head_blocks * self.splits
        return self.counter_bytes + parts * self.part_bytes

    def launch_shape(self, dependent: bool) -> LaunchShape:
        grid = (self.num_kv_heads * self.head_blocks, self.num_seqs, self.splits)
        cluster = (1, 1, self.splits) if self.cluster and self.splits > 1 else ()
        return LaunchShape(grid, (self.warps * 32,), self.shared_bytes, cluster, dependent=dependent)


def choose_plan(
    num_seqs: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    max_kv_length: int,
    *,
    fp8_cache: bool = False,
    capability: int = 90,
    multiprocessors: int = 132,
    shared_limit: int = 232_448,
) -> DecodePlan:
    """The plan for sequences of up to `max_kv_length` tokens; right for longer ones too, but then not fast.

    Splits are added until the blocks fill the GPU once, or until a warp has a single tile left.
    shared_limit: bytes of shared memory a block can have; every GPU from sm_80 on has the 99 KiB that suffice
    """
    group = num_heads // num_kv_heads
    head_blocks = -(-group // HEADS_PER_BLOCK)
    blocks = num_seqs * num_kv_heads * head_blocks
    tiles = -(-max_kv_length // TILE)
    # Measured on an H200: a third stage pays where blocks are too few to fill the GPU, unless a sequence's cluster of
    # blocks would then not fit beside others; and where they come in many waves, so that it does not matter how many blocks
    # of the last one find a place. Over e4m3 numbers it does matter: six stages leave room for too few.
    fills_partly = multiprocessors // 2 <= blocks < 4 * multiprocessors
    many_waves = blocks >= MANY_BLOCKS * multiprocessors and not fp8_cache
    few, many = FP8_WARPS_AND_STAGES if fp8_cache else WARPS_AND_STAGES
    warps, stages = many if fills_partly or many_waves else few
    wanted = max(1, min(WARPS_PER_MULTIPROCESSOR * multiprocessors // (warps * blocks), -(-tiles // warps)))
    # A cluster combines faster than the workspace, but with fewer splits: worth it unless most of the GPU stays idle.
    cluster = capability >= 90 and (wanted <= MAX_CLUSTER or 2 * blocks * MAX_CLUSTER >= multiprocessors)
    splits = min(wanted, MAX_CLUSTER) if cluster else wanted
    heads = min(group, HEADS_PER_BLOCK)
    plan = DecodePlan(
        num_seqs, num_kv_heads, head_blocks, heads, head_dim, warps, stages, splits, cluster, fp8_cache
    )
    fewer_stages = replace(plan, stages=few[1])
    without_cluster = replace(fewer_stages, cluster=False)
    return next(p for p in (plan, fewer_stages, without_cluster) if p.shared_bytes <= shared_limit)


def entry(
    element: str, head_dim: int, warps: int, stages: int, cluster: bool, *, fp8_cache: bool = False
) -> str:
    """Name expression of one kernel."""
    sizes = f"{head_dim}, {warps}, {stages}, {str(cluster).lower()}"
    return f"trtc::paged_decode_attention<{element}, {sizes}{f', {FP8_ELEMENT}' if fp8_cache else ''}>"


def sources(
    element: str, head_dims: tuple[int, ...] = HEAD_DIMS, capability: int = 90, *, fp8_cache: bool = False
) -> tuple[KernelSource, ...]:
    """The file with every kernel that `choose_plan` can ask for, for CUDA type `element`."""
    entries = tuple(
        entry(element, head_dim, warps, stages, cluster, fp8_cache=fp8_cache)
        for head_dim in head_dims
        for warps, stages in (FP8_WARPS_AND_STAGES if fp8_cache else WARPS_AND_STAGES)
        for cluster in ((True, False) if capability >= 90 else (False,))
    )
    return (KernelSource(SOURCE, entries),)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
