"""Sum of a small tensor over the GPUs of one host, with a residual, and the norm of its rows, in one kernel."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ..contract import ALIGNMENT, addresses_and_key, element_type
from ..errors import KernelContractError
from ..launch import BoundKernel, LaunchShape
from ..layer_norm import KINDS, check_norm
from ..nvrtc import KernelSource
from . import MAX_RANKS, VECTOR_BYTES, AllReduce

if TYPE_CHECKING:
    import torch

OP = "all_reduce_norm"
SIGNATURE = "PPPPPP" + "P" * MAX_RANKS + "PPiiiiif"
MAX_THREADS = 512
MAX_ROW_BLOCKS = 8
"""Blocks that share a row: a cluster, which GPUs before sm_90 do not have."""
MAX_BLOCKS = 256
"""As many as are on a GPU at once, so that a row does not wait for its turn long."""
BLOCK_VECTORS = 512
"""Vectors of a row that one block takes, at most."""


def entry(element: str, ranks: int, kind: str, *, two_shot: bool = False) -> str:
    """Name expression of the kernel for a CUDA type, a number of ranks and a kind of norm."""
    flags = ", ".join("true" if flag else "false" for flag in (kind == "rms", two_shot))
    return f"trtc::all_reduce_norm<{element}, {ranks}, {flags}>"


def sources(element: str, ranks: int, kinds: Iterable[str] = KINDS) -> tuple[KernelSource, ...]:
    """The file with the kernels for CUDA type `element`; none for numbers of ranks that they do not serve, or no kinds."""
    entries = tuple(
        entry(element, ranks, kind, two_shot=two_shot) for kind in sorted(kinds) for two_shot in (False, True)
    )
    if not 2 <= ranks <= MAX_RANKS or not entries:
        return ()
    return (KernelSource(Path(__file__).parent / "all_reduce_norm.cu", entries),)


class AllReduceNorm:
    """Launcher of the kernels that sum over the ranks and norm the sum. They share what is lent with those of `reduce`."""

    def __init__(self, reduce: AllReduce) -> None:
        self._library, self._rooms = reduce.library, reduce.rooms
        self._bound: dict[tuple[object, ...], tuple[BoundKernel, tuple[int, ...]]] = {}

    def serves(self, x: torch.Tensor, *, two_shot: bool | None = None) -> bool:
        """Whether `x` is small enough, its rows whole vectors and not too long. two_shot: see `__call__`."""
        if x.dim() != 2 or not x.nbytes or not x.is_contiguous() or x.data_ptr() % ALIGNMENT:
            return False
        rows, row_bytes = x.shape[0], x.nbytes // x.shape[0]
        if row_bytes % VECTOR_BYTES or row_bytes > VECTOR_BYTES * self._row_vectors(row_bytes):
            return False
        two_shot = self._rooms.is_large(x) if two_shot is None else two_shot
        slots = -(-rows // self._rooms.ranks) if two_shot else rows
        return slots * row_bytes <= VECTOR_BYTES * self._rooms.room(two_shot)

    def _row_vectors(self, row_bytes: int) -> int:
        """Vectors of the longest row. Asks the GPU only where one block is not enough."""
        if row_bytes <= VECTOR_BYTES * MAX_THREADS or self._library.capability < 90:
            return MAX_THREADS
        return MAX_THREADS * MAX_ROW_BLOCKS

    def __call__(
        self,
        x: torch.Tensor,
        scale: torch.Tensor | None = None,
        shift: torch.Tensor | None = None,
        *,
        out: torch.Tensor,
        residual: torch.Tensor | None = None,
        total: torch.Tensor | None = None,
        kind: str = "layer",
        epsilon: float = 1e-5,
        dependent: bool = True,
        two_shot: bool | None = None,
        block_vectors: int = BLOCK_VECTORS,
    ) -> torch.Tensor:
        """`total`: the sum of `x` over all ranks, plus `residual`; `out`: its `norm * scale + shift`.

        x, residual:  [rows, columns]  float16, bfloat16 or float32, `serves(x)`; residual, or None, is the same on every rank
        scale, shift: [columns]        dtype of x, or None; the same on every rank
        out, total:   [rows, columns]  dtype of x; total may be x or residual, or None where nobody wants it
        kind:         "layer" or "rms".
        two_shot: in two steps (each rank sums some rows and gives the sums to the others, which norm them too), or not; None:
                  in one as far as `max_bytes` goes. The bits are the same.
        dependent: programmatic dependent launch; nothing is read before the predecessors have ended.
        block_vectors: of a row that one block takes, at most; for measurements.
        Sums are float32 in the order of ranks, the residual last, rounded once, and then normed as `LayerNorm` does: the same
        bits on every rank, in every run.
        Raises KernelContractError for tensors that do not fit; DeviceError without a GPU.
        """
        addresses, contract = addresses_and_key((out, total, x, residual, scale, shift))
        key = (contract, kind, dependent, two_shot, block_vectors)
        found = self._bound.get(key)
        if found is None:
            in_two = self._rooms.is_large(x) if two_shot is None else two_shot
            self._check(x, scale, shift, residual, total, out, kind, in_two)
            found = self._bound[key] = self._bind(x, kind, dependent, in_two, block_vectors)
        kernel, arguments = found
        kernel(*addresses, *arguments, epsilon)
        return out

    def _bind(
        self, x: torch.Tensor, kind: str, dependent: bool, two_shot: bool, block_vectors: int
    ) -> tuple[BoundKernel, tuple[int, ...]]:
        """The kernel, and what it takes between the addresses and epsilon."""
        rows, columns = x.shape
        block_columns = _block_columns(columns, VECTOR_BYTES // x.element_size(), block_vectors)
        element, ranks = element_type(OP, x), self._rooms.ranks
        (source,) = sources(element, ranks, (kind,))
        row_blocks = -(-columns // block_columns)
        threads = -(-block_columns * x.element_size() // (VECTOR_BYTES * 32)) * 32
        grid = row_blocks * min(rows, MAX_BLOCKS // row_blocks)
        cluster = (row_blocks,) if row_blocks > 1 else ()
        shape = LaunchShape((grid,), (threads,), cluster=cluster, dependent=dependent)
        kernel = self._library.bind(source, entry(element, ranks, kind, two_shot=two_shot), SIGNATURE, shape)
        sizes = (rows, columns, block_columns, self._rooms.room(two_shot))
        return kernel, (*self._rooms.arguments(two_shot), *sizes)

    def _check(
        self,
        x: torch.Tensor,
        scale: torch.Tensor | None,
        shift: torch.Tensor | None,
        residual: torch.Tensor | None,
        total: torch.Tensor | None,
        out: torch.Tensor,
        kind: str,
        two_shot: bool,
    ) -> None:
        check_norm(OP, x, scale, shift, residual, total, out, kind)
        rows, columns = x.shape
        if not self.serves(x, two_shot=two_shot):
            raise KernelContractError(
                f"{OP}: x is [{rows}, {columns}], {x.nbytes} bytes; accepted: up to {self._rooms.limit(two_shot)} in rows of "
                f"a multiple of {VECTOR_BYTES} bytes, up to {MAX_ROW_BLOCKS * MAX_THREADS * VECTOR_BYTES} (before sm_90 "
                f"{MAX_THREADS * VECTOR_BYTES})"
            )


def _block_columns(columns: int, vector: int, block_vectors: int) -> int:
    """Columns of each block of a row, as even as whole vectors allow."""
    vectors = -(-columns // vector)
    row_blocks = -(-vectors // min(block_vectors, MAX_THREADS))
    return -(-vectors // row_blocks) * vector
