"""How weights are stored for the linear kernels. The numbers are those of weights.cuh; packing is plain torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

FLOAT = "float"
INT4_BLOCK = 128
"""Columns that are interleaved with each other."""


@dataclass(frozen=True)
class StoredWeight:
    """One format.

    bits:   of a weight. pieces: 16-byte pieces of x that go with 16 bytes of W.
    pad:    rows are stored in whole multiples of so many columns.
    group:  columns that share a scale; None: one scale a row, or none for floats.
    zeros:  behind every scale lies a zero.
    """

    name: str
    bits: int
    pieces: int
    pad: int
    group: int | None = None
    zeros: bool = False

    @property
    def warp_columns(self) -> int:
        """Columns of W that a warp takes in a step."""
        return 32 * self.pieces

    def policy(self, element: str) -> str:
        """The template argument for CUDA type `element`, with a comma before it; nothing for floats, the default."""
        if self.name == FLOAT:
            return ""
        group = "" if self.group is None else f", {self.group}"
        return f", trtc::{self.name.split('/')[0].capitalize()}Weight<{element}{group}>"

    def padded(self, columns: int) -> int:
        """Columns that a row is stored with."""
        return -(-columns // self.pad) * self.pad


WEIGHTS: Mapping[str, StoredWeight] = {
    weight.name: weight
    for weight in (
        StoredWeight(FLOAT, bits=16, pieces=1, pad=1),
        StoredWeight("int8", bits=8, pieces=2, pad=16),
        StoredWeight("fp8", bits=8, pieces=2, pad=16),
        *(
            StoredWeight(
                f"int4{'zero' * zeros}/{group}", bits=4, pieces=4, pad=INT4_BLOCK, group=group, zeros=zeros
            )
            for zeros in (False, True)
            for group in (32, 64, 128)
        ),
    )
}


def int4_name(group: int, *, zeros: bool = False) -> str:
    """The key of WEIGHTS for four-bit integers whose scales, and zeros, count for `group` columns."""
    return f"int4{'zero' * zeros}/{group}"


def interleave_int4(packed: torch.Tensor) -> torch.Tensor:
    """Four-bit integers as engines store them -> as the kernels read them; uint8 [out, in / 2], in a multiple of 128.

    Stored: the even column in the low four bits, two's complement. Read: 8 is added, and of every 128 columns
    piece p (of 16, 8 columns each) is word 4 * (p % 4) + p // 4, so that the 16 bytes of lane m hold the pieces m, m + 4,
    m + 8 and m + 12. In a word, columns 2 i and 2 i + 1 are in bits 4 i and 4 i + 16.
    """
    import torch

    rows = packed.shape[0]
    low, high = (packed & 15) ^ 8, (packed >> 4) ^ 8
    # [out, block, piece / 4, lane, pair of columns]
    even, odd = (nibbles.view(rows, -1, 4, 4, 4).transpose(2, 3) for nibbles in (low, high))
    words = torch.empty(*even.shape[:-1], 4, dtype=torch.uint8, device=packed.device)
    for byte in range(2):
        words[..., byte] = even[..., 2 * byte] | (even[..., 2 * byte + 1] << 4)
        words[..., byte + 2] = odd[..., 2 * byte] | (odd[..., 2 * byte + 1] << 4)
    return words.view(rows, -1)
