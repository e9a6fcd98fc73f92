"""Layer norm and root-mean-square norm, with an optional residual add in front."""

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

KINDS = ("layer", "rms")
SIGNATURE = "PPPPPPif"
MAX_THREADS = 512
VECTORS = (1, 2, 3)
"""Accepted 16-byte vectors per thread."""
MANY_ROWS, WIDE = 1024, 256
"""Rows, and vectors of one, from which on two vectors a thread are faster: bandwidth counts then, and not how soon a row is
done."""


def entry(element: str, vectors: int, kind: str) -> str:
    """Name expression of the kernel for a CUDA type, vectors per thread and a kind of norm."""
    return f"trtc::layer_norm<{element}, {vectors}, {'true' if kind == 'rms' else 'false'}>"


def sources(element: str) -> tuple[KernelSource, ...]:
    """The file with every kernel for CUDA type `element`."""
    entries = tuple(entry(element, vectors, kind) for vectors in VECTORS for kind in KINDS)
    return (KernelSource(Path(__file__).parent / "layer_norm.cu", entries),)


def check_norm(
    op: str,
    x: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    residual: torch.Tensor | None,
    total: torch.Tensor | None,
    out: torch.Tensor,
    kind: str,
) -> None:
    """Raises KernelContractError unless tensors have the types and sizes that `LayerNorm` names, and `kind` is one of KINDS."""
    element_type(op, x)
    if kind not in KINDS:
        raise KernelContractError(f"{op}: kind {kind!r} is unknown; accepted: {', '.join(KINDS)}")
    rows, columns = x.shape
    all_sizes, row_sizes = {"rows": rows, "columns": columns}, {"columns": columns}
    for name, tensor, sizes in (
        ("x", x, all_sizes), ("out", out, all_sizes), ("residual", residual, all_sizes),
        ("total", total, all_sizes), ("scale", scale, row_sizes), ("shift", shift, row_sizes),
    ):  # fmt: skip
        if tensor is not None:
            check_tensor(op, name, tensor, x.dtype, sizes, x)


class LayerNorm:
    """Launcher of the norm kernels. One per device and thread."""

    def __init__(self, library: KernelLibrary) -> None:
        self._library = library
        self._bound: dict[tuple[object, ...], BoundKernel] = {}

    def __call__(
        self,
        x: torch.Tensor,
        scale: torch.Tensor | None = None,
        shift: torch.Tensor | None = None,
        *,
        out: torch.Tensor,
        residual: torch.Tensor | None = None,
        total: torch.Tensor | None = None,
        kind: str = "layer",
        epsilon: float = 1e-5,
        dependent: bool = True,
    ) -> torch.Tensor:
        """`norm(x) * scale + shift`, or with `residual`: `total = x + residual`, then the norm of `total`.

        x, residual:  [rows, columns]  float16, bfloat16 or float32; columns a multiple of 16 bytes, at most 1536
                      16-byte vectors
        scale, shift: [columns]        dtype of x, or None
        out, total:   [rows, columns]  dtype of x; total with residual only, and may be x or residual
        kind:         "layer" or "rms".
        Statistics are float32 (two passes over registers); `total` is rounded before its norm is taken.
        Raises KernelContractError for tensors that do not fit; DeviceError without a GPU.
        """
        addresses, contract = addresses_and_key((out, total, x, residual, scale, shift))
        key = (contract, kind, dependent)
        kernel = self._bound.get(key)
        if kernel is None:
            self._check(x, scale, shift, residual, total, out, kind)
            kernel = self._bound[key] = self._bind(x, kind, dependent)
        kernel(*addresses, x.shape[1], epsilon)
        return out

    def _bind(self, x: torch.Tensor, kind: str, dependent: bool) -> BoundKernel:
        rows, columns = x.shape
        element = element_type("layer_norm", x)
        count = columns * x.element_size() // 16
        least = 2 if rows >= MANY_ROWS and count >= WIDE else 1
        vectors = next(size for size in VECTORS if size >= least and count <= MAX_THREADS * size)
        threads = min(MAX_THREADS, -(-count // (vectors * 32)) * 32)
        shape = LaunchShape((rows,), (threads,), dependent=dependent)
        return self._library.bind(sources(element)[0], entry(element, vectors, kind), SIGNATURE, shape)

    @staticmethod
    def _check(
        x: torch.Tensor,
        scale: torch.Tensor | None,
        shift: torch.Tensor | None,
        residual: torch.Tensor | None,
        total: torch.Tensor | None,
        out: torch.Tensor,
        kind: str,
    ) -> None:
        element_type("layer_norm", x)
        columns, size = x.shape[1], 16 // x.element_size()
        if columns % size or columns > MAX_THREADS * VECTORS[-1] * size:
            limit = MAX_THREADS * VECTORS[-1] * size
            raise KernelContractError(
                f"layer_norm: columns={columns} is not a multiple of {size} up to {limit}"
            )
        if (residual is None) != (total is None):
            raise KernelContractError("layer_norm: residual and total are given together or not at all")
        check_norm("layer_norm", x, scale, shift, residual, total, out, kind)
