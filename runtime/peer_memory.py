"""Memory of a rank's GPU that the GPUs of the other ranks of its host can write: torch's symmetric memory."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch

from .distributed import RankGroup


@dataclass(frozen=True)
class PeerMemory:
    """Zeros, on every rank, when it is made. It is there as long as this object."""

    own: torch.Tensor
    """[bytes] uint8, what this rank lends."""
    handle: object
    addresses: tuple[int, ...]
    """For each rank, where on this GPU its memory is."""


def lend_memory(group: RankGroup, device: torch.device, size: int) -> PeerMemory | None:
    """`size` bytes of every rank for all. Every rank calls it, after `group.connect_gpus`.

    None on every rank when the GPUs cannot write each other's memory: not all on one host, no way between two of them, or
    refused by the system, which the rank that finds it says in a line of its own.
    """
    if not group.one_host:
        return None
    try:
        found = _rendezvous(group, device, size)
    except RuntimeError as error:
        found = None
        reason = str(error).partition("\n")[0]
        print(
            f"trtc: {group.name}: no memory shared between GPUs, small sums go through NCCL too: {reason}",
            file=sys.stderr,
        )
    # Nobody may write before all have zeroed theirs, nor when somebody has none.
    return found if group.least(int(found is not None)) else None


def _rendezvous(group: RankGroup, device: torch.device, size: int) -> PeerMemory:
    from torch._C._distributed_c10d import _SymmetricMemory
    from torch.distributed import _symmetric_memory

    # Not `_symmetric_memory.empty`, which may give a part of a pool, at an offset into what is shared.
    own = _SymmetricMemory.empty_strided_p2p((size,), (1,), torch.uint8, device)
    handle = _symmetric_memory.rendezvous(own, group.gpus)
    own.zero_()
    torch.cuda.synchronize(device)
    addresses = tuple(int(address) for address in handle.buffer_ptrs)
    assert addresses[group.rank] == own.data_ptr(), "memory at an offset into what was shared"
    return PeerMemory(own, handle, addresses)
