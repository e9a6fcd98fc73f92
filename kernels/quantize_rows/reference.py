"""What quantize_rows computes, in torch."""

from __future__ import annotations

import torch

from ..paged import FP8_MAX


def quantize_rows(x: torch.Tensor, *, relu: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """float8_e4m3fn [rows, columns] and float32 scales [rows]; x: [rows, columns]."""
    wide = x.float().relu() if relu else x.float()
    largest = wide.abs().amax(1)
    # By a tensor: on a GPU, torch multiplies by the reciprocal of a number.
    scale = torch.where(largest > 0, largest / largest.new_tensor(FP8_MAX), 1.0)
    return (wide / scale[:, None]).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale
