"""Memory of a rank's GPU that the GPUs of the other ranks of its host can write: torch's symmetric memory."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

import torch

from ..kernels.launch import check, driver
from .distributed import RankGroup

SWITCH = "TRTC_PEER_MEMORY"
"""Environment variable: 0 leaves all sums to NCCL, should the GPUs of a machine not do what is asked of them here."""


@dataclass(frozen=True)
class PeerMemory:
    """Zeros, on every rank, when it is made. It is there as long as this object."""

    own: torch.Tensor
    """[bytes] uint8, what this rank lends."""
    handle: object
    addresses: tuple[int, ...]
    """For each rank of the stage, where on this GPU its memory is."""


def lend_memory(group: RankGroup, device: torch.device, size: int) -> PeerMemory | None:
    """`size` bytes of every rank for its stage. Every rank calls it, after `group.connect_gpus`.

    None on every rank when the GPUs cannot write each other's memory: not all on one host, no way between two of them,
    refused by the system or unknown to this torch, which the rank that finds it says in a line of its own; or when `SWITCH`
    is off on any.
    """
    if not group.one_host or not group.least(int(os.environ.get(SWITCH, "1") != "0")):
        return None
    try:
        found = _rendezvous(group, device, size)
    except (RuntimeError, ImportError, AttributeError) as error:
        found = None
        reason = str(error).partition("\n")[0]
        print(
            f"trtc: {group.name}: no memory shared between GPUs, small sums go through NCCL too: {reason}",
            file=sys.stderr,
        )
    # Nobody may write before all have zeroed theirs, nor when somebody has none.
    return found if group.least(int(found is not None)) else None


def are_linked(device: torch.device) -> bool:
    """Whether NVLink connects `device` with all other GPUs that this process sees. What crosses PCIe may come in other pieces
    than it was written in; there are no atomics there, which is what the driver is asked about."""
    cuda = driver()
    native = cuda.CUdevice_P2PAttribute.CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED
    others = (ordinal for ordinal in range(torch.cuda.device_count()) if ordinal != device.index)
    return all(check(cuda.cuDeviceGetP2PAttribute(native, device.index, other), "NVLink") for other in others)


def _rendezvous(group: RankGroup, device: torch.device, size: int) -> PeerMemory:
    from torch._C._distributed_c10d import _SymmetricMemory
    from torch.distributed import _symmetric_memory

    # Not `_symmetric_memory.empty`, which may give a part of a pool, at an offset into what is shared.
    own = _SymmetricMemory.empty_strided_p2p((size,), (1,), torch.uint8, device)
    handle = _symmetric_memory.rendezvous(own, group.gpus)
    own.zero_()
    torch.cuda.synchronize(device)
    offset = own.data_ptr() - int(handle.buffer_ptrs[group.member])
    return PeerMemory(own, handle, tuple(int(address) + offset for address in handle.buffer_ptrs))
