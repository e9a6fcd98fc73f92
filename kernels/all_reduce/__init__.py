"""Sum of a small tensor over the GPUs of one host, through memory that they all can write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..contract import ALIGNMENT, addresses_and_key, check_tensor, element_type
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


@dataclass(frozen=True)
class Rooms:
    """What the ranks lend each other, as the kernels on one of them take it; see `AllReduce`."""

    rank: int
    ranks: int
    state: torch.Tensor
    capacity: int
    """Vectors of a sum in one step."""
    pieces: int
    """Vectors of one rank's piece of a sum in two."""
    addresses: tuple[tuple[int, ...], tuple[int, ...]]
    """For sums in one step, and in two: the memory of each of MAX_RANKS, then that of `rank`."""

    def arguments(self, two_shot: bool) -> tuple[int, ...]:
        """The kernels' arguments from the memory to the rank."""
        return (*self.addresses[two_shot], self.state.data_ptr(), self.rank)

    def room(self, two_shot: bool) -> int:
        return self.pieces if two_shot else self.capacity

    def limit(self, two_shot: bool) -> int:
        """Bytes of the largest sum."""
        return VECTOR_BYTES * (self.pieces * self.ranks if two_shot else self.capacity)

    def is_large(self, x: torch.Tensor) -> bool:
        """Whether a sum takes two steps."""
        return x.nbytes > self.limit(False)


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
        check_memory(OP, memory, state, VECTOR_BYTES)
        ranks, behind = len(memory), memory_bytes(max_bytes, len(memory))
        self.library = library
        self.rooms = Rooms(
            rank,
            ranks,
            state,
            _vectors(max_bytes),
            _piece(_vectors(two_shot_bytes), ranks),
            (addresses_on(rank, memory), addresses_on(rank, [address + behind for address in memory])),
        )
        self._bound: dict[tuple[object, ...], tuple[BoundKernel, tuple[int, ...]]] = {}

    def serves(self, x: torch.Tensor, *, two_shot: bool | None = None) -> bool:
        """Whether `x` is small enough, and whole vectors. two_shot: see `__call__`."""
        limit = self.rooms.limit(self.rooms.is_large(x) if two_shot is None else two_shot)
        return 0 < x.nbytes <= limit and is_whole_vectors(x)

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
        addresses, contract = addresses_and_key((out, x))
        key = (contract, dependent, two_shot)
        found = self._bound.get(key)
        if found is None:
            found = self._bound[key] = self._bind(x, out, dependent, two_shot)
        kernel, arguments = found
        kernel(*addresses, *arguments)
        return out

    def _bind(
        self, x: torch.Tensor, out: torch.Tensor, dependent: bool, two_shot: bool | None
    ) -> tuple[BoundKernel, tuple[int, ...]]:
        """The kernel, and what it takes behind the addresses."""
        check_sum(OP, x, out)
        if two_shot is None:
            two_shot = self.rooms.is_large(x)
        if not self.serves(x, two_shot=two_shot):
            limit = self.rooms.limit(two_shot)
            raise KernelContractError(
                f"{OP}: x has {x.nbytes} bytes; accepted: multiples of {VECTOR_BYTES} up to {limit}"
            )
        element, ranks = element_type(OP, x), self.rooms.ranks
        (source,) = sources(element, ranks)
        vectors = x.nbytes // VECTOR_BYTES
        grid = (blocks(_piece(vectors, ranks) if two_shot else vectors),)
        shape = LaunchShape(grid, (THREADS,), dependent=dependent)
        kernel = self.library.bind(source, entry(element, ranks, two_shot=two_shot), SIGNATURE, shape)
        return kernel, (*self.rooms.arguments(two_shot), vectors, self.rooms.room(two_shot))


def is_whole_vectors(x: torch.Tensor) -> bool:
    return x.nbytes % VECTOR_BYTES == 0 and x.data_ptr() % ALIGNMENT == 0 and x.is_contiguous()


def check_sum(op: str, x: torch.Tensor, out: torch.Tensor) -> None:
    """Raises KernelContractError unless `x` is of a type that is summed, and `out` like it."""
    element_type(op, x)
    sizes = {f"size_{axis}": size for axis, size in enumerate(x.shape)}
    check_tensor(op, "x", x, x.dtype, sizes, x)
    check_tensor(op, "out", out, x.dtype, sizes, x)


def check_memory(op: str, memory: Sequence[int], state: torch.Tensor, alignment: int) -> None:
    """Raises KernelContractError unless kernels can sum over as many ranks as there are addresses."""
    import torch

    if not 2 <= len(memory) <= MAX_RANKS:
        raise KernelContractError(f"{op}: {len(memory)} ranks; accepted: 2 to {MAX_RANKS}")
    if any(address % alignment for address in memory):
        raise KernelContractError(f"{op}: memory is not {alignment}-byte aligned")
    check_tensor(op, "state", state, torch.int32, {"state": 2}, state)


def addresses_on(rank: int, memory: Sequence[int]) -> tuple[int, ...]:
    """The kernels' arguments: the memory of each of MAX_RANKS, then that of `rank`."""
    return (*memory, *[0] * (MAX_RANKS - len(memory)), memory[rank])
