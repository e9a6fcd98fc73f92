"""Integers for weights and back: rounding to nearest, packing, dequantization. Pure functions of tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..dtypes import to_torch
from ..errors import CheckpointError
from .scheme import SCALE, ZERO, WeightFormat


@dataclass(frozen=True)
class Quantized:
    """Rows of a quantized weight: the stored tensors of `WeightFormat`."""

    integers: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None = None

    def parts(self) -> dict[str, torch.Tensor]:
        """By suffix, as `WeightFormat.parts` has them."""
        parts = {"": self.integers, SCALE: self.scale}
        return parts if self.zero is None else {**parts, ZERO: self.zero}


def round_to_nearest(weight: torch.Tensor, how: WeightFormat, *, name: str) -> Quantized:
    """Rows [rows, in] of the weight `name`, rounded to nearest.

    The largest absolute value of a row or group becomes `how.largest`. Scales have the dtype of `weight` and are rounded
    up, so that no value is cut off: the error is at most half a scale (fp8: half a step of e4m3, times the scale).
    Raises CheckpointError for values that are not finite.
    """
    wide = grouped(weight.float(), how)
    scale = scales(wide, how, weight.dtype, name=name)
    exact = (wide / scale.float().unsqueeze(-1)).flatten(1)
    integers = exact.to(to_torch(how.stored)) if how.stored.is_float else torch.round(exact).to(torch.int8)
    return Quantized(pack(integers, how), scale.squeeze(1) if how.group_size is None else scale)


def scales(wide: torch.Tensor, how: WeightFormat, dtype: torch.dtype, *, name: str) -> torch.Tensor:
    """Scales [rows, groups] of float32 groups [rows, groups, columns]."""
    largest = wide.abs().amax(-1)
    if not bool(torch.isfinite(largest).all()):
        raise CheckpointError(f"weight {name!r} has values that are not finite: it cannot be quantized")
    exact = torch.where(largest > 0, largest / how.largest, 1.0)
    scale = exact.to(dtype)
    short = scale.float() < exact
    return torch.where(short, torch.nextafter(scale, torch.full_like(scale, float("inf"))), scale)


def grouped(weight: torch.Tensor, how: WeightFormat) -> torch.Tensor:
    """[rows, in] -> [rows, groups, columns of a group]."""
    return weight.reshape(len(weight), -1, how.group_size or weight.shape[1])


def pack(integers: torch.Tensor, how: WeightFormat) -> torch.Tensor:
    """int8 [rows, in] -> as stored."""
    return pack_int4(integers) if how.per_byte == 2 else integers


def pack_int4(integers: torch.Tensor) -> torch.Tensor:
    """int8 of [-8, 7], [rows, in] -> uint8 [rows, in / 2]: the even column in the low four bits."""
    low, high = (integers[:, i::2].to(torch.uint8) & 15 for i in (0, 1))
    return low | (high << 4)


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_int4`."""
    pairs = torch.stack((packed & 15, packed >> 4), -1).flatten(1).to(torch.int8)
    return (pairs ^ 8) - 8


def dequantize(integers: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None = None) -> torch.Tensor:
    """[out, in] in the dtype of `scale`: each value is rounded once, since the integers are exact in every model dtype.

    integers: int8 or float8_e4m3fn [out, in], or uint8 [out, in / 2] that hold two each; scale, zero: [out] or [out, groups].
    """
    values = unpack_int4(integers) if integers.dtype == torch.uint8 else integers
    groups = values.reshape(len(values), 1 if scale.dim() == 1 else scale.shape[1], -1).to(scale.dtype)
    if zero is not None:
        groups = groups - zero.reshape(len(zero), -1, 1).to(scale.dtype)
    return (groups * scale.reshape(len(scale), -1, 1)).flatten(1)
