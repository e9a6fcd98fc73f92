"""Which context attention kernel serves a batch, and with which grid. Plain arithmetic: no GPU, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import KernelContractError
from ..launch import LaunchShape
from ..nvrtc import KernelSource
from ..paged import FP8_ELEMENT, HEAD_DIMS

FOLDER = Path(__file__).parent
SIGNATURE = "PPPPPPPPPiiiiiiiiifi"
ACCUMULATIONS = ("float32", "float16")

WARPS = 4
"""Warps of a block of context_attention.cu, whatever its rows."""
LARGE_TILES = {64: (128, 64), 80: (128, 32), 96: (128, 32), 128: (128, 32)}
"""head_dim -> (query rows of a block, keys of a tile) of context_attention.cu: the largest without spills."""
SMALL_TILE = (64, 64)
"""The same when there are few query rows."""

HOPPER_CAPABILITY = 90
HOPPER_KEYS = 64
HOPPER_ROWS = {64: 128, 80: 64, 96: 64, 128: 128}
"""head_dim -> query rows of a block of hopper.cu, as measured for prompts of 512 tokens."""
HOPPER_LONG_ROWS = {64: 128, 80: 192, 96: 192, 128: 192}
"""The same for sequences of LONG_TOKENS and more."""
HOPPER_SMALL_ROWS = 64
LONG_TOKENS = 1024


@dataclass(frozen=True)
class ContextPlan:
    """A launch of context attention.

    rows:   query rows of one head that a block handles, a multiple of 64; keys: keys it takes at a time.
    hopper: hopper.cu (float32 sums, sm_90a only), else context_attention.cu.
    """

    num_tokens: int
    num_seqs: int
    num_heads: int
    head_dim: int
    rows: int
    keys: int
    accumulation: str
    hopper: bool

    def source(self, element: str, *, fp8_cache: bool = False) -> KernelSource:
        """The file and its one entry for CUDA type `element`."""
        cache = f", {FP8_ELEMENT}" if fp8_cache else ""
        if self.hopper:
            entry = f"trtc::context_attention_hopper<{element}, {self.head_dim}, {self.rows // 64}{cache}>"
            return KernelSource(FOLDER / "hopper.cu", (entry,))
        half = str(self.accumulation == "float16").lower()
        sizes = f"{self.head_dim}, {self.rows // 64}, {self.keys}, {half}{cache}"
        entry = f"trtc::context_attention<{element}, {sizes}>"
        return KernelSource(FOLDER / "context_attention.cu", (entry,))

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: the query rows, and the stages of k and v."""
        row_bytes, stages = (self.head_dim * 2, 3) if self.hopper else ((self.head_dim // 8 | 1) * 16, 2)
        return (self.rows + stages * 2 * self.keys) * row_bytes

    def launch_shape(self, dependent: bool) -> LaunchShape:
        threads = self.rows * 2 if self.hopper else WARPS * 32
        # Every sequence wastes less than one block, however the tokens are divided among them.
        slots = self.num_tokens // self.rows + self.num_seqs
        return LaunchShape((self.num_heads, slots), (threads,), self.shared_bytes, dependent=dependent)


def choose_plan(
    num_tokens: int,
    num_seqs: int,
    num_heads: int,
    head_dim: int,
    *,
    accumulation: str = "float32",
    capability: int = 90,
    multiprocessors: int = 132,
) -> ContextPlan:
    """The kernel with the most rows per block, unless that leaves multiprocessors without work."""
    if accumulation not in ACCUMULATIONS:
        accepted = ", ".join(ACCUMULATIONS)
        raise KernelContractError(
            f"context_attention: accumulation {accumulation!r} is unknown; accepted: {accepted}"
        )
    hopper = capability == HOPPER_CAPABILITY and accumulation == "float32"
    hopper_rows = HOPPER_LONG_ROWS if num_tokens >= LONG_TOKENS * num_seqs else HOPPER_ROWS
    rows, keys = (hopper_rows[head_dim], HOPPER_KEYS) if hopper else LARGE_TILES[head_dim]
    if num_tokens // rows * num_heads < 2 * multiprocessors:
        rows, keys = (HOPPER_SMALL_ROWS, HOPPER_KEYS) if hopper else SMALL_TILE
    return ContextPlan(num_tokens, num_seqs, num_heads, head_dim, rows, keys, accumulation, hopper)


def sources(
    element: str, head_dims: tuple[int, ...] = HEAD_DIMS, capability: int = 90, *, fp8_cache: bool = False
) -> tuple[KernelSource, ...]:
    """The files with every kernel that `choose_plan` can ask for, for CUDA type `element`."""
    batches = ((1, 1), (1 << 20, 1), (1 << 20, 1 << 20))  # few rows, long sequences, short ones
    plans = [
        choose_plan(*batch, 1, head_dim, accumulation=accumulation, capability=capability, multiprocessors=1)
        for head_dim in head_dims
        for batch in batches
        for accumulation in (ACCUMULATIONS if element == "__half" else ("float32",))
    ]
    by_file: dict[Path, dict[str, None]] = {}
    for plan in plans:
        source = plan.source(element, fp8_cache=fp8_cache)
        by_file.setdefault(source.path, {})[source.entries[0]] = None
    return tuple(KernelSource(path, tuple(entries)) for path, entries in by_file.items())
