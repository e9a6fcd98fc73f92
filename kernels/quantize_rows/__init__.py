"""Rows of activations rounded to e4m3 numbers, with a scale for each row."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..contract import addresses_and_key, check_tensor, element_type
from ..errors import KernelContractError
from ..launch import BoundKernel, LaunchShape
from ..library import KernelLibrary
from ..nvrtc import KernelSource

if TYPE_CHECKING:
    import torch

OP = "quantize_rows"
ELEMENTS = ("float16", "bfloat16")
SIGNATURE = "PPPiii"
MAX_THREADS = 512
PIECES = (2, 4, 8, 12)
"""Accepted pieces of 8 elements per thread."""
MAX_COLUMNS = MAX_THREADS * PIECES[-1] * 8


def entry(element: str, pieces: int) -> str:
    """Name expression of the kernel for a CUDA type and so many pieces per thread."""
    return f"trtc::quantize_rows<{element}, {pieces}>"


def sources(element: str) -> tuple[KernelSource, ...]:
    """The file with every kernel for CUDA type `element`."""
    entries = tuple(entry(element, pieces) for pieces in PIECES)
    return (KernelSource(Path(__file__).parent / "quantize_rows.cu", entries),)


class QuantizeRows:
    """Launcher of the kernels. One per device and thread."""

    def __init__(self, library: KernelLibrary) -> None:
        self._library = library
        self._bound: dict[tuple[object, ...], BoundKernel] = {}

    def __call__(
        self,
        x: torch.Tensor,
        *,
        out: torch.Tensor,
        scale: torch.Tensor,
        relu: bool = False,
        dependent: bool = False,
    ) -> None:
        """out * scale = x, or relu(x), rounded to e4m3 with the largest absolute value of each row as 448.

        x:     [rows, columns]         float16 or bfloat16, columns a multiple of 8
        out:   [rows, padded_columns]  float8_e4m3fn, at least as wide, at most MAX_COLUMNS; the columns beyond are 0
        scale: [rows]                  float32; 1 for a row of zeros
        dependent: programmatic dependent launch; nothing is read before the predecessors have ended.
        Raises KernelContractError for tensors that do not fit; DeviceError without a GPU.
        """
        addresses, contract = addresses_and_key((out, scale, x))
        key = (contract, dependent)
        kernel = self._bound.get(key)
        if kernel is None:
            check(x, out, scale)
            kernel = self._bound[key] = self._bind(x, out, dependent)
        kernel(*addresses, x.shape[1], out.shape[1], int(relu))

    def _bind(self, x: torch.Tensor, out: torch.Tensor, dependent: bool) -> BoundKernel:
        element = element_type(OP, x, ELEMENTS)
        count = out.shape[1] // 8
        pieces = next(size for size in PIECES if count <= MAX_THREADS * size)
        threads = -(-count // (pieces * 32)) * 32
        shape = LaunchShape((x.shape[0],), (threads,), dependent=dependent)
        return self._library.bind(sources(element)[0], entry(element, pieces), SIGNATURE, shape)


def check(x: torch.Tensor, out: torch.Tensor, scale: torch.Tensor) -> None:
    """Raise KernelContractError unless the tensors fit the contract of `QuantizeRows.__call__`."""
    import torch

    element_type(OP, x, ELEMENTS)
    rows, columns = x.shape
    padded = out.shape[-1]
    if columns % 8 or padded % 8 or not columns <= padded <= MAX_COLUMNS:
        raise KernelContractError(
            f"{OP}: columns={columns} and padded_columns={padded} are not multiples of 8, the latter at least as large and at "
            f"most {MAX_COLUMNS}"
        )
    check_tensor(OP, "x", x, x.dtype, {"rows": rows, "columns": columns}, x)
    check_tensor(OP, "out", out, torch.float8_e4m3fn, {"rows": rows, "padded_columns": padded}, x)
    check_tensor(OP, "scale", scale, torch.float32, {"rows": rows}, x)
