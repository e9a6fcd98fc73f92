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
each other GPU; in two, two pieces of it. Above: NCCL, whose rings send less. On two H200s a part of 4 MB, the largest that is
not NCCL's, takes 29.6 us, with NCCL 41.2; on four one of 2 MB takes 27.1 us, with NCCL 35.5
(`bench/results/gpus-all-reduce.json`, `gpus-4-all-reduce.json`). More GPUs were not measured."""

SAVED_BYTES = 300 << 10
"""What a second step has to save a GPU from sending to be worth the wait for it, about a microsecond: on four H200s parts of 64
KB take 4.6 us in one step and 5.1 in two, parts of 128 KB 5.8 and 5.4, parts of 1 MB 25.4 and 15.4."""

NORMED_BYTES = 2304 << 10
"""Bytes of the largest part whose sum one kernel makes together with the norm that follows; larger ones were not measured."""


def largest_small_sum(ranks: int) -> int:
    """Bytes of the largest part that is summed in one step. Two GPUs would send no less in two."""
    limit = SENT_BYTES // (2 * (ranks - 1))
    if (
        ranks > 2
    ):  # each byte of a part is sent 2 (ranks - 1) times in packets, in two steps 4 (ranks - 1) / ranks times
        limit = min(limit, SAVED_BYTES * ranks // ((ranks - 1) * (2 * ranks - 4)))
    return limit // 16 * 16


def largest_two_shot_sum(ranks: int) -> int:
    """Bytes of the largest part that is summed in two steps, of which a GPU sends two pieces of it to each other GPU. Two
    GPUs would send no less that way."""
    return SENT_BYTES * ranks // (4 * (ranks - 1)) // 16 * 16 if ranks > 2 else 0


def normed_bytes(ranks: int) -> range:
    """Bytes of a part whose sum and norm one kernel makes faster than two.

    On two H200s by 3 to 13 %; smaller parts take as long or, in rows of several blocks, up to 11 % longer. On four, all that
    are summed in two steps: 64 x 9216 in 19.5 us, a sum alone in 17; 64 x 4096 in 9.7, a sum alone in 9.2.
    """
    least = 512 << 10 if ranks == 2 else largest_small_sum(ranks) + 1
    return range(least, NORMED_BYTES + 1)


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
            self._normed, self._normed_bytes = AllReduceNorm(self.small), normed_bytes(ranks)

    def all_reduce(self, x: torch.Tensor, *, overwrite: bool = False) -> torch.Tensor:
        """The sum over the ranks, the same bits on every rank; see `RankGroup.all_reduce`."""
        if self.small is not None and self.small.serves(x):
            return self.small(x, out=x if overwrite else torch.empty_like(x))
        return self._group.all_reduce(x, overwrite=overwrite)

    def norms(self, x: torch.Tensor) -> bool:
        """Whether `all_reduce_norm` serves `x`, and is faster than a sum and a norm."""
        return self._normed is not None and x.nbytes in self._normed_bytes and self._normed.serves(x)

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
