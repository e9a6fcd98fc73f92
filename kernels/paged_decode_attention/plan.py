"""Which decode attention kernel serves a batch, and with which grid. Plain arithmetic: no GPU, no torch."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from ..launch import RESERVED_BYTES, SHARED_LIMITS, SMALLEST_SHARED_LIMIT, LaunchShape
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
WARPS_AND_STAGES = ((8, 3), (4, 4), (4, 3), (4, 2))
"""What a block can have where all blocks run at once, the first of which as many fit a multiprocessor as there are for each:
the cache is read while the predecessor still runs, so that as much of it as possible should be on its way."""
ONE_WAVE = 3
"""Blocks for each multiprocessor up to which it is worth it to let all of them run at once."""
MANY_BLOCKS = 21
"""Blocks for each multiprocessor from which on it does not matter how many of the last wave find a place."""
CROWD_SHAPES = {
    64: ((4, 3, 1), (4, 4, 1), (4, 3, 1), (4, 3, 1)),
    80: ((4, 4, 1), (2, 2, 4), (2, 2, 4), (4, 3, 1)),
    96: ((4, 2, 1), (4, 2, 1), (4, 2, 1), (4, 3, 1)),
    128: ((2, 3, 1), (2, 2, 4), (2, 2, 4), (4, 3, 1)),
}
"""head_dim -> warps, stages and splits where there are more of them: up to four for each multiprocessor, up to six, fewer than
MANY_BLOCKS, more. The fastest of what was measured; 96 by analogy."""

FP8_WARPS_PER_MULTIPROCESSOR = 8
"""Warps that keep a multiprocessor's share of the memory bandwidth busy, over e4m3 numbers."""
FP8_WARPS_AND_STAGES = ((4, 4), (4, 6))
"""What caches of e4m3 numbers have: the second where blocks fill the GPU partly."""

SMALLEST = (4, 2)
"""Warps and stages that every GPU from sm_80 on has the shared memory for."""


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
        ring = _ring_bytes(self.warps, self.stages, _row_bytes(self.head_dim, fp8_cache=self.fp8_cache))
        return ring + (self.splits * self.part_bytes if self.cluster else 0)

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

    shared_limit: bytes of shared memory a block can have; every GPU from sm_80 on has the 99 KiB that suffice
    """
    group = num_heads // num_kv_heads
    head_blocks = -(-group // HEADS_PER_BLOCK)
    blocks = num_seqs * num_kv_heads * head_blocks
    tiles = -(-max_kv_length // TILE)
    if fp8_cache:
        # Six stages leave room for too few blocks where there are many.
        fills_partly = multiprocessors // 2 <= blocks < 4 * multiprocessors
        warps, stages = FP8_WARPS_AND_STAGES[fills_partly]
        wanted = FP8_WARPS_PER_MULTIPROCESSOR * multiprocessors // (warps * blocks)
        wanted = max(1, min(wanted, -(-tiles // warps)))
    else:
        # As measured in a chain of decoder layers on an H200 (bench/notes/kernels_attention.md); other GPUs follow by analogy.
        clusters = capability >= 90
        warps, stages, wanted = _shape(blocks, head_dim, multiprocessors, shared_limit, clusters=clusters)
        wanted = max(1, min(wanted, -(-2 * tiles // (warps * stages))))
    # A cluster combines faster than the workspace, but with fewer splits: worth it unless most of the GPU stays idle.
    cluster = capability >= 90 and (wanted <= MAX_CLUSTER or 2 * blocks * MAX_CLUSTER >= multiprocessors)
    splits = min(wanted, MAX_CLUSTER) if cluster else wanted
    heads = min(group, HEADS_PER_BLOCK)
    plan = DecodePlan(
        num_seqs, num_kv_heads, head_blocks, heads, head_dim, warps, stages, splits, cluster, fp8_cache
    )
    least_warps, least_stages = FP8_WARPS_AND_STAGES[0] if fp8_cache else SMALLEST
    smaller = replace(plan, warps=least_warps, stages=least_stages)
    without_cluster = replace(smaller, cluster=False)
    return next(p for p in (plan, smaller, without_cluster) if p.shared_bytes <= shared_limit)


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
        for warps, stages in _warps_and_stages(head_dim, capability, fp8_cache)
        for cluster in ((True, False) if capability >= 90 else (False,))
    )
    return (KernelSource(SOURCE, entries),)


def _shape(
    blocks: int, head_dim: int, multiprocessors: int, shared_limit: int, *, clusters: bool
) -> tuple[int, int, int]:
    """Warps, stages and splits of blocks, of which there are `blocks` where nothing is split."""
    # As few splits as give each multiprocessor a block: the rest of its shared memory is for the next kernel's weights.
    splits = -(-multiprocessors // blocks)
    crowd = -(-blocks * splits // multiprocessors)
    if crowd <= ONE_WAVE:
        shapes, fitting = [(*shape, splits) for shape in WARPS_AND_STAGES], max(2, crowd)
    else:
        kind = bisect_left((4, 6, MANY_BLOCKS - 1), crowd)
        warps, stages, parts = CROWD_SHAPES[head_dim][kind]
        shapes, fitting = [(warps, stages, parts if clusters else 1)], 2
    for warps, stages, parts in shapes:
        if _fit(fitting, warps, stages, head_dim, shared_limit):
            return warps, stages, parts
    return (*SMALLEST, splits)


def _fit(blocks: int, warps: int, stages: int, head_dim: int, shared_limit: int) -> bool:
    """Whether so many blocks fit a multiprocessor."""
    ring = _ring_bytes(warps, stages, _row_bytes(head_dim, fp8_cache=False))
    return blocks * (ring + RESERVED_BYTES) <= shared_limit


def _row_bytes(head_dim: int, *, fp8_cache: bool) -> int:
    """Bytes of a row of k or v in shared memory, padded so that rows start in different banks."""
    return (head_dim // (16 if fp8_cache else 8) | 1) * 16


def _ring_bytes(warps: int, stages: int, row_bytes: int) -> int:
    return warps * stages * 2 * TILE * row_bytes


def _warps_and_stages(head_dim: int, capability: int, fp8_cache: bool) -> Iterable[tuple[int, int]]:
    """What `choose_plan` picks from."""
    if fp8_cache:
        return FP8_WARPS_AND_STAGES
    limit = SHARED_LIMITS.get(capability, SMALLEST_SHARED_LIMIT)
    shapes = {*WARPS_AND_STAGES, *((warps, stages) for warps, stages, _ in CROWD_SHAPES[head_dim])}
    return sorted({SMALLEST, *(shape for shape in shapes if _fit(2, *shape, head_dim, limit))})


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
