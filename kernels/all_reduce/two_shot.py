"""Sum of a tensor over the GPUs of one host in two steps, alone or with a residual and the norm of its rows, over NVLink."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..contract import addresses_and_key, element_type
from ..errors import KernelContractError
from ..launch import BoundKernel, LaunchShape
from ..layer_norm import KINDS, check_norm
from ..library import KernelLibrary
from ..nvrtc import KernelSource
from . import MAX_RANKS, VECTOR_BYTES, addresses_on, check_memory, check_sum, is_whole_vectors

if TYPE_CHECKING:
    import torch

OP = "all_reduce_two_shot"
SIGNATURE = "PPPPPP" + "P" * MAX_RANKS + "PPiiiif"
LINE_BYTES, LINE_VECTORS, LINE_THREADS = 128, 7, 8
THREADS = 256
"""Of a block of a plain sum."""
MAX_THREADS = 512
MAX_BLOCKS = 256
"""As many as are on a GPU at once, so that a row does not wait for its turn long."""


def entry(element: str, ranks: int, kind: str | None) -> str:
    """Name expression of the kernel for a CUDA type, a number of ranks and a kind of norm, None for a plain sum."""
    flags = ", ".join("true" if flag else "false" for flag in (kind is not None, kind == "rms"))
    return f"trtc::all_reduce_two_shot<{element}, {ranks}, {flags}>"


def sources(element: str, ranks: int, kinds: Iterable[str] = KINDS) -> tuple[KernelSource, ...]:
    """The file with the kernels for CUDA type `element`; none for numbers of ranks that they do not serve."""
    if not 2 <= ranks <= MAX_RANKS:
        return ()
    entries = tuple(entry(element, ranks, kind) for kind in (None, *sorted(kinds)))
    return (KernelSource(Path(__file__).parent / "two_shot.cu", entries),)


@dataclass(frozen=True)
class Cut:
    """How `vectors` in rows of `row_vectors` are cut."""

    vectors: int
    row_vectors: int
    ranks: int

    @property
    def rows(self) -> int:
        return -(-self.vectors // self.row_vectors)

    @property
    def piece_lines(self) -> int:
        """Lines of one piece of a row."""
        piece = -(-self.row_vectors // pieces(self.ranks))
        return -(-piece // LINE_VECTORS)

    @property
    def lines(self) -> int:
        """Lines of all pieces of one rank."""
        return self.rows * pieces(self.ranks) // self.ranks * self.piece_lines

    @property
    def threads(self) -> int:
        return -(-self.piece_lines * LINE_THREADS // 32) * 32


def pieces(ranks: int) -> int:
    """Of a row: vectors of a thread."""
    return 4 if ranks == 2 else ranks


def plain_cut(size: int, ranks: int) -> Cut:
    """Of a plain sum of `size` bytes."""
    return Cut(-(-size // VECTOR_BYTES), pieces(ranks) * THREADS // LINE_THREADS * LINE_VECTORS, ranks)


def memory_bytes(max_bytes: int, ranks: int) -> int:
    """What each rank lends to the others, for sums of up to `max_bytes`: lines of parts and of sums, of two sums in turn."""
    return plain_cut(max_bytes, ranks).lines * LINE_BYTES * 2 * 2 * ranks


class TwoShotAllReduce:
    """Launcher of the kernels on one rank. All ranks make the same launches in the same order.

    memory: for each rank the address, on this GPU, of what it lends: `memory_bytes`, zeros before the first launch of any
            rank, which only these kernels write. All GPUs are connected by NVLink.
    rank:   this one among them.
    max_bytes: of a plain sum; the same on every rank.
    state:  [2] int32 on this GPU, zeros; `AllReduce` may share it.
    Raises KernelContractError for what the kernel does not serve.
    """

    def __init__(
        self, library: KernelLibrary, memory: Sequence[int], rank: int, max_bytes: int, state: torch.Tensor
    ) -> None:
        check_memory(OP, memory, state, LINE_BYTES)
        self._library, self._state, self._rank, self._ranks = library, state, rank, len(memory)
        self._memory = addresses_on(rank, memory)
        self._capacity = plain_cut(max_bytes, self._ranks).lines
        self._bound: dict[tuple[object, ...], tuple[BoundKernel, tuple[int, ...]]] = {}

    def serves(self, x: torch.Tensor) -> bool:
        """Whether a plain sum of `x` is made: it is small enough, and whole vectors."""
        lines = plain_cut(x.nbytes, self._ranks).lines
        return 0 < lines <= self._capacity and is_whole_vectors(x)

    def norms(self, x: torch.Tensor) -> bool:
        """Whether a sum of `x` is made with the norm of its rows: they are whole vectors, too, and not too long."""
        if x.dim() != 2 or not x.nbytes or x.nbytes // x.shape[0] % VECTOR_BYTES or not is_whole_vectors(x):
            return False
        cut = self._row_cut(x)
        return cut.lines <= self._capacity and cut.threads <= MAX_THREADS

    def _row_cut(self, x: torch.Tensor) -> Cut:
        vectors = x.nbytes // VECTOR_BYTES
        return Cut(vectors, vectors // x.shape[0], self._ranks)

    def __call__(self, x: torch.Tensor, *, out: torch.Tensor, dependent: bool = True) -> torch.Tensor:
        """The sum of `x` over all ranks, written to `out`, on torch's current stream.

        x:   float16, bfloat16 or float32, contiguous, `serves(x)`
        out: like x; may be x
        dependent: programmatic dependent launch; nothing is read before the predecessors have ended.
        Sums are float32 in the order of ranks and rounded once: the same bits on every rank, in every run, and as `AllReduce`.
        Raises KernelContractError for tensors that do not fit; DeviceError without a GPU.
        """
        addresses, contract = addresses_and_key((None, out, x, None, None, None))
        key = (contract, dependent)
        found = self._bound.get(key)
        if found is None:
            check_sum(OP, x, out)
            if not self.serves(x):
                raise KernelContractError(
                    f"{OP}: x has {x.nbytes} bytes; accepted: multiples of {VECTOR_BYTES} up to {self._capacity} lines of "
                    f"{LINE_VECTORS * VECTOR_BYTES} a rank"
                )
            found = self._bound[key] = self._bind(x, plain_cut(x.nbytes, self._ranks), None, dependent)
        kernel, arguments = found
        kernel(*addresses, *arguments, 0.0)
        return out

    def norm(
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
    ) -> torch.Tensor:
        """`total`: the sum of `x` over all ranks, plus `residual`; `out`: its `norm * scale + shift`.

        x, residual:  [rows, columns]  float16, bfloat16 or float32, `norms(x)`; residual, or None, is the same on every rank
        scale, shift: [columns]        dtype of x, or None; the same on every rank
        out, total:   [rows, columns]  dtype of x; total may be x or residual, or None where nobody wants it
        kind:         "layer" or "rms".
        dependent: programmatic dependent launch; nothing is read before the predecessors have ended.
        Sums are float32 in the order of ranks, the residual last, rounded once, and then normed as `LayerNorm` does, but for
        the order in which a row's moments are added up: the same bits on every rank, in every run.
        Raises KernelContractError for tensors that do not fit; DeviceError without a GPU.
        """
        addresses, contract = addresses_and_key((out, total, x, residual, scale, shift))
        key = (contract, kind, dependent)
        found = self._bound.get(key)
        if found is None:
            self._check(x, scale, shift, residual, total, out, kind)
            found = self._bound[key] = self._bind(x, self._row_cut(x), kind, dependent)
        kernel, arguments = found
        kernel(*addresses, *arguments, epsilon)
        return out

    def _bind(
        self, x: torch.Tensor, cut: Cut, kind: str | None, dependent: bool
    ) -> tuple[BoundKernel, tuple[int, ...]]:
        """The kernel, and what it takes between the addresses and epsilon."""
        element = element_type(OP, x)
        (source,) = sources(element, self._ranks, () if kind is None else (kind,))
        shape = LaunchShape((min(cut.rows, MAX_BLOCKS),), (cut.threads,), dependent=dependent)
        kernel = self._library.bind(source, entry(element, self._ranks, kind), SIGNATURE, shape)
        sizes = (cut.vectors, cut.row_vectors, self._capacity)
        return kernel, (*self._memory, self._state.data_ptr(), self._rank, *sizes)

    def _check(
        self,
        x: torch.Tensor,
        scale: torch.Tensor | None,
        shift: torch.Tensor | None,
        residual: torch.Tensor | None,
        total: torch.Tensor | None,
        out: torch.Tensor,
        kind: str,
    ) -> None:
        check_norm(OP, x, scale, shift, residual, total, out, kind)
        rows, columns = x.shape
        if not self.norms(x):
            row_bytes = MAX_THREADS // LINE_THREADS * LINE_VECTORS * pieces(self._ranks) * VECTOR_BYTES
            raise KernelContractError(
                f"{OP}: x is [{rows}, {columns}]; accepted: rows of a multiple of {VECTOR_BYTES} bytes up to {row_bytes}, "
                f"of which each rank's pieces fit {self._capacity} lines"
            )
