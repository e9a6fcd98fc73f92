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

PERSISTENT_TILES = {64: (128, 128), 80: (192, 64), 96: (128, 128), 128: (128, 128)}
"""head_dim -> (query rows of a block, keys of a tile) of persistent.cu, one block a multiprocessor."""
PERSISTENT_TOKENS = {64: 384, 80: 1024, 96: 384, 128: 384}
"""head_dim -> new tokens of a sequence, on average, from which on these are fastest."""
PERSISTENT_SMALL_TILES = {64: (64, 64), 96: (64, 64), 128: (64, 64)}
"""As PERSISTENT_TILES, two blocks a multiprocessor: for shorter sequences, and for few. Without one, hopper.cu is faster."""
PERSISTENT_SHARED = 226 * 1024
PERSISTENT_SMALL_SHARED = 112 * 1024
"""Bytes of dynamic shared memory that a block of it takes, at most: of 64 rows two share a multiprocessor."""
PERSISTENT_STAGES, LEAST_STAGES = 8, 3
"""Tiles that it has at most, and at least."""


def persistent_tiles(head_dim: int) -> tuple[tuple[int, int], ...]:
    """(query rows, keys) that persistent.cu is used with."""
    small = PERSISTENT_SMALL_TILES.get(head_dim)
    return (PERSISTENT_TILES[head_dim], *([small] if small else []))


@dataclass(frozen=True)
class ContextPlan:
    """A launch of context attention.

    rows:   query rows of one head that a block handles, a multiple of 64; keys: keys it takes at a time.
    hopper: hopper.cu (float32 sums, sm_90a only), else context_attention.cu.
    blocks: persistent.cu (as hopper.cu, but for a cache of e4m3 numbers) with so many blocks, where it is not 0.
    """

    num_tokens: int
    num_seqs: int
    num_heads: int
    head_dim: int
    rows: int
    keys: int
    accumulation: str
    hopper: bool
    blocks: int = 0

    def source(self, element: str, *, fp8_cache: bool = False) -> KernelSource:
        """The file and its one entry for CUDA type `element`."""
        if self.blocks:
            assert not fp8_cache, "persistent.cu copies pages as they are"
            sizes = f"{self.head_dim}, {self.rows // 64}, {self.keys}, {self.stages}, {self.query_buffers}"
            entry = f"trtc::context_attention_persistent<{element}, {sizes}>"
            return KernelSource(FOLDER / "persistent.cu", (entry,))
        cache = f", {FP8_ELEMENT}" if fp8_cache else ""
        if self.hopper:
            entry = f"trtc::context_attention_hopper<{element}, {self.head_dim}, {self.rows // 64}{cache}>"
            return KernelSource(FOLDER / "hopper.cu", (entry,))
        half = str(self.accumulation == "float16").lower()
        sizes = f"{self.head_dim}, {self.rows // 64}, {self.keys}, {half}{cache}"
        entry = f"trtc::context_attention<{element}, {sizes}>"
        return KernelSource(FOLDER / "context_attention.cu", (entry,))

    @property
    def row_bytes(self) -> int:
        """Of shared memory, for a row of q, k or v."""
        return self.head_dim * 2 if self.hopper else (self.head_dim // 8 | 1) * 16

    @property
    def query_buffers(self) -> int:
        """Blocks of query rows in shared memory: of persistent.cu those of the next piece of work too, where there is room."""
        return 2 if self.blocks and self._fitting_stages(2) >= LEAST_STAGES else 1

    @property
    def stages(self) -> int:
        """Tiles of k and v in shared memory."""
        if self.blocks:
            return min(PERSISTENT_STAGES, self._fitting_stages(self.query_buffers))
        return 3 if self.hopper else 2

    def _fitting_stages(self, query_buffers: int) -> int:
        limit = PERSISTENT_SMALL_SHARED if self.rows == 64 else PERSISTENT_SHARED
        return (limit // self.row_bytes - query_buffers * self.rows) // (2 * self.keys)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: the query rows, and the stages of k and v."""
        return (self.query_buffers * self.rows + self.stages * 2 * self.keys) * self.row_bytes

    @property
    def slots(self) -> int:
        """Of `rows` query rows. Every sequence wastes less than one, however the tokens are divided among them."""
        return self.num_tokens // self.rows + self.num_seqs

    @property
    def pieces(self) -> int:
        """Blocks' worth of work: slots of every head."""
        return self.slots * self.num_heads

    @property
    def signature(self) -> str:
        """Of the kernel's arguments; persistent.cu has counters after `out`, and the number of pieces last."""
        return SIGNATURE.replace("i", "Pi", 1) + "i" if self.blocks else SIGNATURE

    def launch_shape(self, dependent: bool) -> LaunchShape:
        if self.blocks:
            threads, grid = self.rows * 2 + 128, (min(self.blocks, self.pieces),)
            return LaunchShape(grid, (threads,), self.shared_bytes, dependent=dependent)
        threads = self.rows * 2 if self.hopper else WARPS * 32
        return LaunchShape((self.num_heads, self.slots), (threads,), self.shared_bytes, dependent=dependent)


def choose_plan(
    num_tokens: int,
    num_seqs: int,
    num_heads: int,
    head_dim: int,
    *,
    accumulation: str = "float32",
    capability: int = 90,
    multiprocessors: int = 132,
    fp8_cache: bool = False,
) -> ContextPlan:
    """The kernel with the most rows per block, unless that leaves multiprocessors without work.

    On Hopper persistent.cu wherever it has been measured to be faster; hopper.cu for caches of e4m3 numbers.
    """
    if accumulation not in ACCUMULATIONS:
        accepted = ", ".join(ACCUMULATIONS)
        raise KernelContractError(
            f"context_attention: accumulation {accumulation!r} is unknown; accepted: {accepted}"
        )
    hopper = capability == HOPPER_CAPABILITY and accumulation == "float32"
    sizes = (num_tokens, num_seqs, num_heads, head_dim)
    if hopper and not fp8_cache:
        tile, blocks = PERSISTENT_TILES[head_dim], multiprocessors
        few = num_tokens // tile[0] * num_heads < 2 * blocks
        if few or num_tokens < PERSISTENT_TOKENS[head_dim] * num_seqs:
            tile, blocks = PERSISTENT_SMALL_TILES.get(head_dim, (0, 0)), 2 * multiprocessors
        if tile[0]:
            return ContextPlan(*sizes, *tile, accumulation, hopper, blocks)
    hopper_rows = HOPPER_LONG_ROWS if num_tokens >= LONG_TOKENS * num_seqs else HOPPER_ROWS
    rows, keys = (hopper_rows[head_dim], HOPPER_KEYS) if hopper else LARGE_TILES[head_dim]
    if num_tokens // rows * num_heads < 2 * multiprocessors:
        rows, keys = (HOPPER_SMALL_ROWS, HOPPER_KEYS) if hopper else SMALL_TILE
    return ContextPlan(*sizes, rows, keys, accumulation, hopper)


def sources(
    element: str, head_dims: tuple[int, ...] = HEAD_DIMS, capability: int = 90, *, fp8_cache: bool = False
) -> tuple[KernelSource, ...]:
    """The files with every kernel that `choose_plan` can ask for, for CUDA type `element`."""
    batches = ((1, 1), (1 << 20, 1), (1 << 20, 1 << 20))  # few rows, long sequences, short ones
    plans = [
        choose_plan(
            *batch,
            1,
            head_dim,
            accumulation=accumulation,
            capability=capability,
            multiprocessors=1,
            fp8_cache=fp8_cache,
        )
        for head_dim in head_dims
        for batch in batches
        for accumulation in (ACCUMULATIONS if element == "__half" else ("float32",))
    ]
    by_file: dict[Path, dict[str, None]] = {}
    for plan in plans:
        source = plan.source(element, fp8_cache=fp8_cache)
        by_file.setdefault(source.path, {})[source.entries[0]] = None
    return tuple(KernelSource(path, tuple(entries)) for path, entries in by_file.items())
