"""Exchange between the GPUs of a job: small sums through memory that they lend each other, all else through NCCL."""

from __future__ import annotations

import torch

from ..kernels.all_reduce import MAX_RANKS, AllReduce, memory_bytes
from ..kernels.all_reduce.norm import AllReduceNorm
from ..kernels.all_reduce.two_shot import TwoShotAllReduce
from ..kernels.all_reduce.two_shot import memory_bytes as line_bytes
from ..kernels.library import KernelLibrary
from .distributed import RankGroup
from .peer_memory import are_linked, lend_memory

LEAST_LINE_RANKS = 3
"""GPUs whose sums of two steps, with the norm that follows or without, are made in lines where NVLink connects them all: two
have not been run so."""

LINES_SAVED_BYTES = 400 << 10
"""What a second step has to save a GPU from sending then: on four H200s parts of 64 KB take 4.1 us in one step and 4.2 in
lines, parts of 128 KB 5.7 and 4.3, with the norm 64 x 9216 take 10.6 us and in packets 18.5
(`bench/results/gpus-4-all-reduce.json`)."""

SENT_BYTES = 8 << 20
"""What a GPU sends for one sum at most, in the kernels' packets, twice as large as what they hold: in one step its part, to
each other GPU; in two, two pieces of it. Above: NCCL, whose rings send less. On two H200s a part of 4 MB, the largest that is
not NCCL's, takes 29.6 us, with NCCL 41.2; on four one of 4 MB takes 24.2 us in lines, with NCCL 48.3
(`bench/results/gpus-all-reduce.json`, `gpus-4-all-reduce.json`). More GPUs were not measured."""

SAVED_BYTES = 300 << 10
"""What a second step in packets has to save: on four H200s parts of 64 KB take 4.1 us in one step and 5.2 in two, parts of
128 KB 5.7 and 5.5, parts of 1 MB 22.1 and 15.2."""

NORMED_BYTES = 2304 << 10
"""Bytes of the largest part whose sum one kernel makes together with the norm that follows; larger ones were not measured."""


def largest_small_sum(ranks: int) -> int:
    """Bytes of the largest part that is summed in one step. Two GPUs would send no less in two."""
    limit = SENT_BYTES // (2 * (ranks - 1))
    if ranks > 2:
        # Each byte of a part is sent 2 (ranks - 1) times in packets, in two steps 4 (ranks - 1) / ranks times.
        limit = min(limit, SAVED_BYTES * ranks // ((ranks - 1) * (2 * ranks - 4)))
    return limit // 16 * 16


def largest_two_shot_sum(ranks: int) -> int:
    """Bytes of the largest part that is summed in two steps, of which a GPU sends two pieces of it to each other GPU. Two
    GPUs would send no less that way."""
    return SENT_BYTES * ranks // (4 * (ranks - 1)) // 16 * 16 if ranks > 2 else 0


def largest_sum_before_lines(ranks: int) -> int:
    """Bytes of the largest part that is summed in one step before lines. A byte of it is sent 2 (ranks - 1) times, in
    packets; in two steps, in lines, 8 / 7 * 2 (ranks - 1) / ranks times."""
    return LINES_SAVED_BYTES * 7 * ranks // ((ranks - 1) * (14 * ranks - 16)) // 16 * 16


def largest_sum_in_lines(ranks: int) -> int:
    """Bytes of the largest part that is summed in lines."""
    return SENT_BYTES * 7 * ranks // (16 * (ranks - 1)) // 16 * 16


def normed_bytes(ranks: int, linked: bool) -> range:
    """Bytes of a part whose sum and norm one kernel makes faster than two. linked: in lines.

    On two H200s by 3 to 13 %; smaller parts take as long or, in rows of several blocks, up to 11 % longer. On four, all that
    are summed in two steps: 64 x 4096 takes 7.2 us in lines, as two kernels 7.7, and 128 x 9216, the
    largest that was measured with its norm, 16.7 and 17.2.
    """
    if linked:
        return range(largest_sum_before_lines(ranks) + 1, largest_sum_in_lines(ranks) + 1)
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
        self._large: TwoShotAllReduce | None = None
        if not 1 < ranks <= MAX_RANKS:
            return
        limit, two_shot, lines = largest_small_sum(ranks), largest_two_shot_sum(ranks), 0
        linked = ranks >= LEAST_LINE_RANKS and bool(group.least(are_linked(device)))
        if linked:
            limit, two_shot, lines = largest_sum_before_lines(ranks), 0, largest_sum_in_lines(ranks)
        behind = line_bytes(lines, ranks)
        self._memory = lend_memory(group, device, behind + memory_bytes(limit, ranks, two_shot))
        if self._memory is None:
            return
        addresses, state = self._memory.addresses, torch.zeros(2, dtype=torch.int32, device=device)
        packets = [address + behind for address in addresses]
        self.small = AllReduce(library, packets, group.member, limit, state, two_shot)
        self._normed_bytes = normed_bytes(ranks, linked)
        if linked:
            self._large = TwoShotAllReduce(library, addresses, group.member, lines, state)
        else:
            self._normed = AllReduceNorm(self.small)

    def all_reduce(self, x: torch.Tensor, *, overwrite: bool = False) -> torch.Tensor:
        """The sum over the ranks, the same bits on every rank; see `RankGroup.all_reduce`."""
        for sums in (self.small, self._large):
            if sums is not None and sums.serves(x):
                return sums(x, out=x if overwrite else torch.empty_like(x))
        return self._group.all_reduce(x, overwrite=overwrite)

    def norms(self, x: torch.Tensor) -> bool:
        """Whether `all_reduce_norm` serves `x`, and is faster than a sum and a norm."""
        if self._large is not None:
            return x.nbytes in self._normed_bytes and self._large.norms(x)
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
        if self._large is not None:
            self._large.norm(
                x, scale, shift, out=out, residual=residual, total=total, kind=kind, epsilon=epsilon
            )
            return
        assert self._normed is not None
        self._normed(x, scale, shift, out=out, residual=residual, total=total, kind=kind, epsilon=epsilon)

    def all_gather(self, x: torch.Tensor, axis: int) -> torch.Tensor:
        """The parts of all ranks, in rank order along `axis`."""
        return self._group.all_gather(x, axis)
