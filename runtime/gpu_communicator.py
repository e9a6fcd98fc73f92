"""Exchange between the GPUs of a job: small sums through memory that they lend each other, all else through NCCL."""

from __future__ import annotations

import torch

from ..kernels.all_reduce import MAX_RANKS, AllReduce, memory_bytes
from ..kernels.all_reduce.norm import AllReduceNorm
from ..kernels.library import KernelLibrary
from .distributed import RankGroup
from .peer_memory import lend_memory

SENT_BYTES = 8 << 20
"""What a GPU sends for one sum at most, in the kernels' packets, twice as large as what they hold: in one step its part, to
each other GPU; more GPUs than two make larger sums in two steps, in which they send less. Above: NCCL, whose rings
send less. On two H200s a part of 1 MB takes 8.8 us, one of 4 MB, the largest that is not NCCL's, 29.6 us; with NCCL 23.9 and
41.2 us (`bench/results/gpus-all-reduce.json`). More GPUs were not measured."""

NORMED_RANKS, NORMED_BYTES = 2, range(512 << 10, (2304 << 10) + 1)
"""GPUs, and bytes of a part, whose sums one kernel makes together with the norm that follows. On two H200s that takes 3 to 13 %
less than two kernels; smaller parts take as long or, in rows of several blocks, up to 11 % longer. Larger ones and more GPUs
were not measured (`bench/results/gpus-all-reduce.json`)."""


def largest_small_sum(ranks: int) -> int:
    """Bytes of the largest part that is summed in one step."""
    return SENT_BYTES // (2 * (ranks - 1)) // 16 * 16


def largest_two_shot_sum(ranks: int) -> int:
    """Bytes of the largest part that is summed in two steps, of which a GPU sends two pieces of it to each other GPU. Two
    GPUs would send no less that way."""
    return SENT_BYTES * ranks // (4 * (ranks - 1)) // 16 * 16 if ranks > 2 else 0


class GpuCommunicator:
    """A `Communicator` of one rank, within its stage, for tensors on its GPU, on torch's current stream; CUDA graphs may
    capture it.

    Every rank makes one, with `library` for its GPU.
    """

    def __init__(self, group: RankGroup, device: torch.device, library: KernelLibrary) -> None:
        group.connect_gpus(device)
        self._group, ranks = group, group.num_peers
        self.small: AllReduce | None = None
        """None where the GPUs cannot write each other's memory."""
        self._normed: AllReduceNorm | None = None
        if not 1 < ranks <= MAX_RANKS:
            return
        limit, two_shot = largest_small_sum(ranks), largest_two_shot_sum(ranks)
        self._memory = lend_memory(group, device, memory_bytes(limit, ranks, two_shot))
        if self._memory is not None:
            state = torch.zeros(2, dtype=torch.int32, device=device)
            self.small = AllReduce(library, self._memory.addresses, group.member, limit, state, two_shot)
            if ranks <= NORMED_RANKS:
                self._normed = AllReduceNorm(self.small)

    def all_reduce(self, x: torch.Tensor, *, overwrite: bool = False) -> torch.Tensor:
        """The sum over the ranks, the same bits on every rank; see `RankGroup.all_reduce`."""
        if self.small is not None and self.small.serves(x):
            return self.small(x, out=x if overwrite else torch.empty_like(x))
        return self._group.all_reduce(x, overwrite=overwrite)

    def norms(self, x: torch.Tensor) -> bool:
        """Whether `all_reduce_norm` serves `x`, and is faster than a sum and a norm."""
        return self._normed is not None and x.nbytes in NORMED_BYTES and self._normed.serves(x)

    def all_reduce_norm(
        self,
        x: torch.Tensor,
        scale: torch.Tensor | None,
        shift: torch.Tensor | None,
        *,
        out: torch.Tensor,
        residual: torch.Tensor | None,
        total: torch.Tensor | None,
        kind: str,
        epsilon: float,
    ) -> None:
        """See `AllReduceNorm`; `norms(x)`."""
        assert self._normed is not None
        self._normed(x, scale, shift, out=out, residual=residual, total=total, kind=kind, epsilon=epsilon)

    def all_gather(self, x: torch.Tensor, axis: int) -> torch.Tensor:
        """The parts of all ranks, in rank order along `axis`."""
        return self._group.all_gather(x, axis)
