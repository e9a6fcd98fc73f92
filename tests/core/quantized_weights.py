"""What tests of quantized weights share: formats, sources, and dequantization by the definition, in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from trtc.core.dtypes import DType
from trtc.core.quantize.scheme import QuantizeOptions, WeightFormat
from trtc.core.quantize.source import QuantizedWeights, nearest
from trtc.core.sharding import ShardingOptions
from trtc.core.weight_source import WeightSource
from trtc.tests.opt_models import OptCheckpoint

INT8, INT4 = WeightFormat("int8"), WeightFormat("int4", 32)
FP8 = WeightFormat("fp8")
FORMATS = {"int8": INT8, "int4": INT4, "fp8": FP8}


def by_definition(
    integers: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None = None
) -> torch.Tensor:
    """(integer - zero) * scale in float64, one element after the other."""
    stored, scales = (
        (integers.double() if integers.is_floating_point() else integers).numpy(),
        scale.double().numpy(),
    )
    per_byte = 2 if integers.dtype == torch.uint8 else 1
    result = np.empty((stored.shape[0], stored.shape[1] * per_byte))
    for row in range(result.shape[0]):
        for column in range(result.shape[1]):
            value = stored[row, column // per_byte].item()
            if per_byte == 2:
                value = value // 16 if column % 2 else value % 16
                value = value - 16 if value > 7 else value
            group = (row,) if scales.ndim == 1 else (row, column * scales.shape[1] // result.shape[1])
            offset = 0 if zero is None else int(zero[group])
            result[row, column] = (value - offset) * scales[group]
    return torch.from_numpy(result)


def quantized(
    checkpoint: OptCheckpoint,
    how: WeightFormat,
    dtype: DType = DType.FLOAT32,
    *,
    lm_head: bool = False,
    **sharding: Any,
) -> QuantizedWeights:
    """The checkpoint's weights in `dtype`, rounded to the nearest; `sharding` as in ShardingOptions."""
    source = checkpoint.weights(dtype, ShardingOptions(**sharding))
    return nearest(QuantizeOptions(how, lm_head))(source)


def parts_of(source: WeightSource, rank: int, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers and scales of a weight, as `rank` has them."""
    return source.read(rank, name), source.read(rank, f"{name}.scale")
