"""Embedding lookup of tokens, of a vocabulary shard, and of positions in the same pass."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..contract import addresses_and_key, check_tensor, element_type
from ..errors import KernelContractError
from ..launch import BoundKernel, LaunchShape
from ..library import KernelLibrary
from ..nvrtc import KernelSource

if TYPE_CHECKING:
    import torch

SIGNATURE = "PPPPPiiiiii"
MAX_THREADS = 128


@dataclass(frozen=True)
class Positions:
    """A table of learned positions, added to the token's row.

    ids: [num_tokens] int32; table: [num_positions, columns]; the row used is `id + offset` and must be inside.
    """

    ids: torch.Tensor
    table: torch.Tensor
    offset: int = 0


def entry(element: str) -> str:
    """Name expression of the kernel for a CUDA type."""
    return f"trtc::embedding<{element}>"


def sources(element: str) -> tuple[KernelSource, ...]:
    """The file with the kernel for CUDA type `element`."""
    return (KernelSource(Path(__file__).parent / "embedding.cu", (entry(element),)),)


class Embedding:
    """Launcher of the embedding kernel. One per device and thread."""

    def __init__(self, library: KernelLibrary) -> None:
        self._library = library
        self._bound: dict[tuple[object, ...], BoundKernel] = {}

    def __call__(
        self,
        ids: torch.Tensor,
        table: torch.Tensor,
        *,
        out: torch.Tensor,
        offset: int = 0,
        masked: bool = False,
        positions: Positions | None = None,
        dependent: bool = True,
    ) -> torch.Tensor:
        """`table[ids + offset] (+ positions.table[positions.ids + positions.offset])`, written to `out`.

        ids:    [num_tokens]           int32
        table:  [num_rows, columns]    float16, bfloat16 or float32; columns a multiple of 16 bytes
        out:    [num_tokens, columns]  dtype of table
        masked: rows outside the table give 0 (a rank's shard of the vocabulary). Otherwise they must not occur: the
                kernel clamps them to the table.
        Raises KernelContractError for tensors that do not fit; DeviceError without a GPU.
        """
        position_ids, position_table = (positions.ids, positions.table) if positions else (None, None)
        addresses, contract = addresses_and_key((out, ids, table, position_ids, position_table))
        key = (contract, dependent)
        kernel = self._bound.get(key)
        if kernel is None:
            self._check(ids, table, out, positions)
            kernel = self._bound[key] = self._bind(ids, table, dependent)
        position_offset, position_rows = (positions.offset, positions.table.shape[0]) if positions else (0, 0)
        kernel(
            *addresses, table.shape[1], offset, table.shape[0], position_offset, position_rows, int(masked)
        )
        return out

    def _bind(self, ids: torch.Tensor, table: torch.Tensor, dependent: bool) -> BoundKernel:
        element = element_type("embedding", table)
        vectors = table.shape[1] * table.element_size() // 16
        grid = (ids.shape[0], -(-vectors // MAX_THREADS))
        shape = LaunchShape(grid, (MAX_THREADS,), dependent=dependent)
        return self._library.bind(sources(element)[0], entry(element), SIGNATURE, shape)

    @staticmethod
    def _check(
        ids: torch.Tensor, table: torch.Tensor, out: torch.Tensor, positions: Positions | None
    ) -> None:
        import torch

        element_type("embedding", table)
        (tokens,), (rows, columns) = ids.shape, table.shape
        size = 16 // table.element_size()
        if columns % size:
            raise KernelContractError(f"embedding: columns={columns} is not a multiple of {size}")
        check_tensor("embedding", "ids", ids, torch.int32, {"num_tokens": tokens}, table)
        check_tensor("embedding", "table", table, table.dtype, {"num_rows": rows, "columns": columns}, table)
        check_tensor("embedding", "out", out, table.dtype, {"num_tokens": tokens, "columns": columns}, table)
        if positions:
            sizes = {"num_positions": positions.table.shape[0], "columns": columns}
            check_tensor(
                "embedding", "positions.ids", positions.ids, torch.int32, {"num_tokens": tokens}, table
            )
            check_tensor("embedding", "positions.table", positions.table, table.dtype, sizes, table)
