"""Kernels as TensorRT's ahead-of-time plugins launch them: which one, with which grid, and with which scalars.

TensorRT launches one kernel for a plugin, from PTX, with the addresses of the inputs, int32 scalars, and the addresses of
the outputs, in this order. Grid and scalars are expressions of the inputs' sizes: they are computed here with `+` and `//`
only, so that a size may be an int or TensorRT's symbolic expression of it. Dynamic shared memory stays within the 48 KiB that
every launch may have, and neither clusters nor a workspace are used: the interface has no word for them.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..context_attention.plan import WARPS, ContextPlan
from ..contract import ELEMENT_TYPES
from ..embedding import MAX_THREADS
from ..errors import KernelContractError
from ..nvrtc import KernelSource
from ..paged import LOG2_E, PAGE_SIZES, check_model

FOLDER = Path(__file__).parent
SHARED_LIMIT = 48 << 10
"""Bytes of dynamic shared memory that a kernel has without opting in to more."""
ATTENTION_ROWS = 64
ATTENTION_KEYS = {64: 64, 80: 32, 96: 32, 128: 16}
"""head_dim -> keys of a tile: the most that keep within SHARED_LIMIT."""
ATTENTION_SIGNATURE = "PPPPPPPPiiiiiiPPP"

Size = Any
"""An int, or TensorRT's symbolic expression of one."""


@dataclass(frozen=True)
class AotLaunch:
    """What TensorRT is told. grid: three sizes; scalars: the arguments between inputs and outputs."""

    source: KernelSource
    grid: tuple[Size, Size, Size]
    block: int
    shared_bytes: int
    scalars: tuple[Size, ...]

    @property
    def entry(self) -> str:
        (name,) = self.source.entries
        return name


def float_bits(value: float) -> int:
    """The float32 `value` as the int32 of the same bits."""
    (bits,) = struct.unpack("=i", struct.pack("=f", value))
    return int(bits)


def paged_attention(
    *,
    dtype: str,
    head_dim: int,
    num_heads: int,
    num_kv_heads: int,
    page_size: int,
    scale: float,
    accumulation: str,
    num_tokens: Size,
    num_seqs: Size,
    pages_per_seq: Size,
) -> AotLaunch:
    """Causal attention of packed new tokens over the paged cache, and the append of their k and v.

    Inputs q, k, v, k_cache, v_cache, query_start, kv_length, page_table; outputs out, k_cache, v_cache: shapes as in
    `ContextAttention.__call__`, all contiguous. dtype: float16 or bfloat16; accumulation: float32, or float16 for the sums.
    Raises KernelContractError for a model that the kernel does not serve.
    """
    check_model("paged_attention", dtype=dtype, head_dim=head_dim, num_heads=num_heads, num_kv_heads=num_kv_heads,
                page_size=page_size)  # fmt: skip
    if accumulation == "float16" and dtype != "float16":
        raise KernelContractError(
            f"paged_attention: accumulation in float16 takes float16 tensors, not {dtype}"
        )
    keys, half = ATTENTION_KEYS[head_dim], str(accumulation == "float16").lower()
    entry = f"trtc::paged_attention<{ELEMENT_TYPES[dtype]}, {head_dim}, {keys}, {half}>"
    scalars = (num_seqs, num_kv_heads, num_heads // num_kv_heads, PAGE_SHIFT[page_size], pages_per_seq,
               float_bits(scale * LOG2_E))  # fmt: skip
    return AotLaunch(
        source=KernelSource(FOLDER / "paged_attention.cu", (entry,)),
        grid=(num_heads, num_tokens // ATTENTION_ROWS + num_seqs, 1),
        block=WARPS * 32,
        shared_bytes=ContextPlan(
            0, 0, num_heads, head_dim, ATTENTION_ROWS, keys, accumulation, False
        ).shared_bytes,
        scalars=scalars,
    )


PAGE_SHIFT = {size: size.bit_length() - 1 for size in PAGE_SIZES}


def lookup(
    *,
    dtype: str,
    columns: int,
    table_rows: int,
    offset: int,
    num_tokens: Size,
    position_rows: int | None = None,
    position_offset: int = 0,
) -> AotLaunch:
    """Rows `ids + offset` of a table, zero outside of it; with `position_rows`, plus rows of a table of positions.

    Inputs ids [num_tokens], table [table_rows, columns] and, with positions, position_ids [num_tokens] and positions
    [position_rows, columns]; output [num_tokens, columns]. dtype: of the tables.
    Raises KernelContractError when a row is not a multiple of 16 bytes or the dtype is none of the kernel's.
    """
    if dtype not in ELEMENT_TYPES:
        raise KernelContractError(
            f"lookup: dtype {dtype} is not supported; accepted: {', '.join(ELEMENT_TYPES)}"
        )
    vector = 16 // ELEMENT_BYTES[dtype]
    if columns % vector:
        raise KernelContractError(f"lookup: columns={columns} is not a multiple of {vector}")
    name = "lookup"
    scalars: tuple[Size, ...] = (columns, offset, table_rows)
    if position_rows is not None:
        name, scalars = "lookup_with_positions", (*scalars, position_offset, position_rows)
    return AotLaunch(
        source=KernelSource(FOLDER / "lookup.cu", (f"trtc::{name}<{ELEMENT_TYPES[dtype]}>",)),
        grid=(num_tokens, -(-(columns // vector) // MAX_THREADS), 1),
        block=MAX_THREADS,
        shared_bytes=0,
        scalars=scalars,
    )


ELEMENT_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
