"""Sum of a small tensor over the GPUs of one host, through memory that they all can write."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..contract import ALIGNMENT, check_tensor, element_type, pointer
from ..errors import KernelContractError
from ..launch import BoundKernel, LaunchShape
from ..library import KernelLibrary
from ..nvrtc import KernelSource

if TYPE_CHECKING:
    import torch

OP = "all_reduce"
MAX_RANKS = 8
SIGNATURE = "PP" + "P" * MAX_RANKS + "PPiii"
THREADS = 256
MAX_BLOCKS = 128
VECTOR_BYTES = 16
_PACKETS = 2 * 2
"""Packets for a vector of each rank: two halves, two sums in turn. A packet is as large as a vector."""


def entry(element: str, ranks: int, *, two_shot: bool = False) -> str:
    """Name expression of the kernel for a CUDA type and a number of ranks."""
    return f"trtc::all_reduce{'_two_shot' if two_shot else ''}<{element}, {ranks}>"


def sources(element: str, ranks: int) -> tuple[KernelSource, ...]:
    """The file with the kernels for CUDA type `element`; none for numbers of ranks that they do not serve."""
    if not 2 <= ranks <= MAX_RANKS:
        return ()
    entries = tuple(entry(element, ranks, two_shot=two_shot) for two_shot in (False, True))
    return (KernelSource(Path(__file__).parent / "all_reduce.cu", entries),)


def memory_bytes(max_bytes: int, ranks: int, two_shot_bytes: int = 0) -> int:
    """What each rank lends to the others, for sums of up to `max_bytes` in one step and `two_shot_bytes` in two."""
    vectors = _vectors(max_bytes) + 2 * _piece(_vectors(two_shot_bytes), ranks)
    return vectors * VECTOR_BYTES * _PACKETS * ranks


def _vectors(size: int) -> int:
    return -(-size // VECTOR_BYTES)


def _piece(vectors: int, ranks: int) -> int:
    """Vectors that one rank adds of a sum in two steps."""
    return -(-vectors // ranks)


def blocks(vectors: int) -> int:
    return min(MAX_BLOCKS, -(-vectors // THREADS))


class AllReduce:
    """Launcher of the all-reduce kernels on one rank. All ranks make the same launches in the same order.

    memory: for each rank the address, on this GPU, of what it lends: `memory_bytes`, zeros before the first launch of any
            rank.
    rank:   this one among them.
    max_bytes: of the sums that are made in one step; the same on every rank.
    two_shot_bytes: of the larger ones that are made in two; the same on every rank.
    state:  [2] int32 on this GPU, zeros.
    Raises KernelContractError for what the kernel does not serve.
    """

    def __init__(
        self,
        library: KernelLibrary,
        memory: Sequence[int],
        rank: int,
        max_bytes: int,
        state: torch.Tensor,
        two_shot_bytes: int = 0,
    ) -> None:
        import torch

        if not 2 <= len(memory) <= MAX_RANKS:
            raise KernelContractError(f"{OP}: {len(memory)} ranks; accepted: 2 to {MAX_RANKS}")
        if any(address % VECTOR_BYTES for address in memory):
            raise KernelContractError(f"{OP}: memory is not {VECTOR_BYTES}-byte aligned")
        check_tensor(OP, "state", state, torch.int32, {"state": 2}, state)
        self._library, self._rank, self._state = library, rank, state
        self._ranks = len(memory)
        self._capacity = _vectors(max_bytes)
        self._pieces = _piece(_vectors(two_shot_bytes), len(memory))
        behind = memory_bytes(max_bytes, len(memory))
        self._memory = [_addresses(memory, rank, offset) for offset in (0, behind)]
        """Of sums in one step, and in two."""
        self._bound: dict[tuple[object, ...], BoundKernel] = {}

    def serves(self, x: torch.Tensor, *, two_shot: bool | None = None) -> bool:
        """Whether `x` is small enough, and whole vectors. two_shot: see `__call__`."""
        limit = self._limit(self._is_large(x) if two_shot is None else two_shot)
        return (
            0 < x.nbytes <= limit
            and x.nbytes % VECTOR_BYTES == 0
            and x.data_ptr() % ALIGNMENT == 0
            and x.is_contiguous()
        )

    def _is_large(self, x: torch.Tensor) -> bool:
        return x.nbytes > self._capacity * VECTOR_BYTES

    def _limit(self, two_shot: bool) -> int:
        return VECTOR_BYTES * (self._pieces * self._ranks if two_shot else self._capacity)

    def __call__(
        self, x: torch.Tensor, *, out: torch.Tensor, dependent: bool = True, two_shot: bool | None = None
    ) -> torch.Tensor:
        """The sum of `x` over all ranks, written to `out`, on torch's current stream.

        x:   float16, bfloat16 or float32, contiguous, `serves(x)`
        out: like x; may be x
        two_shot: in two steps, or not; None: in one as far as `max_bytes` goes. The bits are the same.
        dependent: programmatic dependent launch; nothing is read before the predecessors have ended.
        Sums are float32 in the order of ranks and rounded once: the same bits on every rank, in every run.
        Raises KernelContractError for tensors that do not fit; DeviceError without a GPU.
        """
        key = (x.shape, x.dtype, x.stride(), x.data_ptr() % ALIGNMENT, out.data_ptr() % ALIGNMENT, out.shape, out.dtype,
               dependent, two_shot)  # fmt: skip
        kernel = self._bound.get(key)
        if two_shot is None:
            two_shot = self._is_large(x)
        if kernel is None:
            kernel = self._bound[key] = self._bind(x, out, dependent, two_shot)
        vectors = x.nbytes // VECTOR_BYTES
        kernel(
            *map(pointer, (out, x)),
            *self._memory[two_shot],
            pointer(self._state),
            self._rank,
            vectors,
            self._pieces if two_shot else self._capacity,
        )
        return out

    def _bind(self, x: torch.Tensor, out: torch.Tensor, dependent: bool, two_shot: bool) -> BoundKernel:
        element = element_type(OP, x)
        sizes = {f"size_{axis}": size for axis, size in enumerate(x.shape)}
        check_tensor(OP, "x", x, x.dtype, sizes, x)
        check_tensor(OP, "out", out, x.dtype, sizes, x)
        if not self.serves(x, two_shot=two_shot):
            limit = self._limit(two_shot)
            raise KernelContractError(
                f"{OP}: x has {x.nbytes} bytes; accepted: multiples of {VECTOR_BYTES} up to {limit}"
            )
        (source,) = sources(element, self._ranks)
        kernel = self._library.kernel(source, entry(element, self._ranks, two_shot=two_shot), SIGNATURE)
        dependent = dependent and self._library.capability >= 90
        vectors = x.nbytes // VECTOR_BYTES
        grid = (blocks(_piece(vectors, self._ranks) if two_shot else vectors),)
        return kernel.bind(LaunchShape(grid, (THREADS,), dependent=dependent))


def _addresses(memory: Sequence[int], rank: int, offset: int) -> tuple[int, ...]:
    """The kernels' arguments: the memory of every rank, then that of `rank`."""
    places = [address + offset for address in memory]
    return (*places, *[0] * (MAX_RANKS - len(memory)), places[rank])
