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


def entry(element: str, ranks: int) -> str:
    """Name expression of the kernel for a CUDA type and a number of ranks."""
    return f"trtc::all_reduce<{element}, {ranks}>"


def sources(element: str, ranks: int) -> tuple[KernelSource, ...]:
    """The file with the kernel for CUDA type `element`; none for numbers of ranks that it does not serve."""
    if not 2 <= ranks <= MAX_RANKS:
        return ()
    return (KernelSource(Path(__file__).parent / "all_reduce.cu", (entry(element, ranks),)),)


def memory_bytes(max_bytes: int, ranks: int) -> int:
    """What each rank lends to the others, for sums of up to `max_bytes`."""
    return -(-max_bytes // VECTOR_BYTES) * VECTOR_BYTES * _PACKETS * ranks


def blocks(vectors: int) -> int:
    return min(MAX_BLOCKS, -(-vectors // THREADS))


class AllReduce:
    """Launcher of the all-reduce kernel on one rank. All ranks make the same launches in the same order.

    memory: for each rank the address, on this GPU, of what it lends: `memory_bytes`, zeros before the first launch of any
            rank.
    rank:   this one among them.
    max_bytes: the same on every rank.
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
    ) -> None:
        import torch

        if not 2 <= len(memory) <= MAX_RANKS:
            raise KernelContractError(f"{OP}: {len(memory)} ranks; accepted: 2 to {MAX_RANKS}")
        if any(address % VECTOR_BYTES for address in memory):
            raise KernelContractError(f"{OP}: memory is not {VECTOR_BYTES}-byte aligned")
        check_tensor(OP, "state", state, torch.int32, {"state": 2}, state)
        self._library, self._rank, self._state = library, rank, state
        self._ranks = len(memory)
        self._memory = (*memory, *[0] * (MAX_RANKS - len(memory)))
        self._capacity = -(-max_bytes // VECTOR_BYTES)
        self._bound: dict[tuple[object, ...], BoundKernel] = {}

    def serves(self, x: torch.Tensor) -> bool:
        """Whether `x` is small enough, and whole vectors."""
        return (
            0 < x.nbytes <= self._capacity * VECTOR_BYTES
            and x.nbytes % VECTOR_BYTES == 0
            and x.data_ptr() % ALIGNMENT == 0
            and x.is_contiguous()
        )

    def __call__(self, x: torch.Tensor, *, out: torch.Tensor, dependent: bool = True) -> torch.Tensor:
        """The sum of `x` over all ranks, written to `out`, on torch's current stream.

        x:   float16, bfloat16 or float32, contiguous, `serves(x)`
        out: like x; may be x
        dependent: programmatic dependent launch; nothing is read before the predecessors have ended.
        Sums are float32 in the order of ranks and rounded once: the same bits on every rank, in every run.
        Raises KernelContractError for tensors that do not fit; DeviceError without a GPU.
        """
        key = (x.shape, x.dtype, x.stride(), x.data_ptr() % ALIGNMENT, out.data_ptr() % ALIGNMENT, out.shape, out.dtype,
               dependent)  # fmt: skip
        kernel = self._bound.get(key)
        if kernel is None:
            kernel = self._bound[key] = self._bind(x, out, dependent)
        vectors = x.nbytes // VECTOR_BYTES
        kernel(
            *map(pointer, (out, x)),
            *self._memory,
            self._memory[self._rank],
            pointer(self._state),
            self._rank,
            vectors,
            self._capacity,
        )
        return out

    def _bind(self, x: torch.Tensor, out: torch.Tensor, dependent: bool) -> BoundKernel:
        element = element_type(OP, x)
        sizes = {f"size_{axis}": size for axis, size in enumerate(x.shape)}
        check_tensor(OP, "x", x, x.dtype, sizes, x)
        check_tensor(OP, "out", out, x.dtype, sizes, x)
        if not self.serves(x):
            limit = self._capacity * VECTOR_BYTES
            raise KernelContractError(
                f"{OP}: x has {x.nbytes} bytes; accepted: multiples of {VECTOR_BYTES} up to {limit}"
            )
        (source,) = sources(element, self._ranks)
        kernel = self._library.kernel(source, entry(element, self._ranks), SIGNATURE)
        dependent = dependent and self._library.capability >= 90
        grid = (blocks(x.nbytes // VECTOR_BYTES),)
        return kernel.bind(LaunchShape(grid, (THREADS,), dependent=dependent))
