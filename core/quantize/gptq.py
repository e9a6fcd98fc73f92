"""GPTQ: integers for a weight that keep the layer's outputs, not the weight's values.

Columns are rounded one after the other, and what a column loses is made up for by the columns that are not rounded yet, as
far as inputs seen in calibration tell. Source: arXiv:2210.17323. Columns are taken in their own order: another one ("act
order") would scatter the columns of a group.
"""

from __future__ import annotations

import torch

from ..errors import CheckpointError
from .integers import Quantized, grouped, pack, scales
from .scheme import WeightFormat

DAMPING = 0.01
"""Added to the Hessian's diagonal, in parts of its mean: keeps it invertible where inputs are few or alike."""
BLOCK = 128
"""Columns whose corrections to the rest of the weight are applied together."""


def gptq(weight: torch.Tensor, hessian: torch.Tensor, how: WeightFormat, *, name: str) -> Quantized:
    """The weight `name`, [out, in], quantized for inputs with the second moments `hessian`.

    hessian: float32 [in, in], the sum of x x^T over calibration inputs x; any scale. An input that is always zero says nothing
        of its column, which is then rounded to nearest.
    Raises CheckpointError for weights or inputs that are not finite.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise CheckpointError(f"weight {name!r}: calibration gives its layer inputs that are not finite")
    rest = weight.float().clone()
    factor = _inverse_factor(hessian)
    columns, block = weight.shape[1], how.group_size or BLOCK
    integers = torch.empty(weight.shape, dtype=torch.int8)
    scale = scales(grouped(rest, how), how, weight.dtype, name=name)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        part, errors = rest[:, start:stop].clone(), torch.empty(len(rest), stop - start)
        if how.group_size is not None:  # of what the group has become
            scale[:, start // block] = scales(part.unsqueeze(1), how, weight.dtype, name=name)[:, 0]
        step = scale[:, start // block if how.group_size else 0].float()
        lowest = -how.largest - (how.per_byte - 1)
        for i in range(stop - start):
            column, row = part[:, i], factor[start + i, start + i : stop]
            rounded = (column / step).round().clamp(lowest, how.largest)
            integers[:, start + i] = rounded.to(torch.int8)
            errors[:, i] = (column - rounded * step) / row[0]
            part[:, i:] -= errors[:, i : i + 1] * row
        rest[:, stop:] -= errors @ factor[start:stop, stop:]
    return Quantized(pack(integers, how), scale if how.group_size else scale.squeeze(1))


def _inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the inverse of the damped Hessian. In float64: few inputs make it nearly singular."""
    damped = hessian.double()
    diagonal = damped.diagonal()
    mean = diagonal.mean()
    diagonal += DAMPING * mean + (diagonal == 0) * (mean if mean > 0 else 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: torch.Tensor = torch.linalg.cholesky(inverse, upper=True).float()
    return factor
