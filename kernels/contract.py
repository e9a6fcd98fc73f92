"""Checks of tensors against a kernel's contract. Launchers run them once per combination of shapes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from .errors import KernelContractError

if TYPE_CHECKING:
    import torch

ALIGNMENT = 16
"""Bytes to which every tensor of a kernel is aligned: the widest access."""

ELEMENT_TYPES = {"float16": "__half", "bfloat16": "__nv_bfloat16", "float32": "float"}
"""torch dtype name -> CUDA C++ type."""


def check_tensor(
    op: str, name: str, tensor: torch.Tensor, dtype: torch.dtype, sizes: dict[str, int], like: torch.Tensor
) -> None:
    """Raise KernelContractError unless `tensor` is a contiguous `dtype` tensor of `sizes` on the device of `like`.

    sizes: dimension name -> size, in order; the names are those of the op's docstring.
    """
    shape = tuple(sizes.values())
    got = f"{op}: {name} is {_describe(tensor)}"
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        wanted = ", ".join(f"{label}={size}" for label, size in sizes.items())
        raise KernelContractError(f"{got}; expected [{wanted}] {str(dtype).removeprefix('torch.')}")
    if not tensor.is_contiguous() or tensor.data_ptr() % ALIGNMENT:
        raise KernelContractError(
            f"{got}, stride {tensor.stride()}; expected contiguous, {ALIGNMENT}-byte aligned"
        )
    if tensor.device != like.device:
        raise KernelContractError(f"{got}; the other tensors are on {like.device}")


def element_type(op: str, tensor: torch.Tensor, accepted: tuple[str, ...] = tuple(ELEMENT_TYPES)) -> str:
    """The CUDA C++ type of `tensor`'s elements. Raises KernelContractError unless its dtype is `accepted`."""
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in accepted:
        raise KernelContractError(f"{op}: dtype {name} is not supported; accepted: {', '.join(accepted)}")
    return ELEMENT_TYPES[name]


def addresses_and_key(tensors: Iterable[torch.Tensor | None]) -> tuple[list[int], tuple[object, ...]]:
    """What every launch asks of its tensors: their addresses, 0 for None, and a key.

    The key has all that a contract looks at, of an address the alignment: calls with equal keys need one check.
    """
    addresses: list[int] = []
    key: list[object] = []
    for tensor in tensors:
        if tensor is None:
            addresses.append(0)
            key.append(None)
        else:
            address = tensor.data_ptr()
            addresses.append(address)
            key.append(
                (tensor.shape, tensor.stride(), tensor.dtype, tensor.get_device(), address % ALIGNMENT)
            )
    return addresses, tuple(key)


def pointer(tensor: torch.Tensor | None) -> int:
    """Address of the first element; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def _describe(tensor: torch.Tensor) -> str:
    sizes = ", ".join(str(size) for size in tensor.shape)
    return f"[{sizes}] {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"
