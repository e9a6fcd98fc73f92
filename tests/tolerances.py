"""The one table of numerical tolerances of the tests.

Errors are absolute for float64 and float32. For the 16-bit types they are relative to the largest absolute value of
the reference, because an error there grows with the numbers it is made of.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from trtc.core.dtypes import DType

FLOAT64_ABS = 1e-9
"""Two orders of one computation in float64: a rewritten graph, or ranks that share the work, against the original."""

OP_FLOAT64_ABS = 1e-12
"""One op in float64 against an independent formula in float64."""

LOGITS_FLOAT32_ABS = 1e-4
"""Logits of a tiny model in float32 against transformers in float32."""

LOGITS_INT8_RELATIVE = 3e-2
"""Logits of a tiny model with int8 weights on target `cpu` against its own dequantized weights in float64, relative to the
largest: layers of many tokens take activations in int8, 64 columns at a time. What bfloat16 costs too. Measured: 1.7e-2."""

LOGITS_INT8_DECODE_RELATIVE = 5e-4
"""The same in decode steps alone, which keep activations in 16 bits. Measured: 1.1e-4."""

RANKS_EPSILONS = {DType.FLOAT32: 32.0, DType.FLOAT16: 8.0, DType.BFLOAT16: 8.0}
"""Logits of a tiny model on several ranks against those of one, relative to the largest, in units of the dtype (its epsilon):
sums are made in another order. Measured: 6.6, 1.5 and 2.0."""

LOGITS_RELATIVE = {DType.FLOAT16: 5e-3, DType.BFLOAT16: 3e-2}
"""Logits of a tiny model computed in a 16-bit type against float32: a few units of its 11 or 8 bits. The largest
errors measured over the variants of OPT were 2.5e-3 and 1.6e-2."""


def max_error(value: Any, reference: Any) -> float:
    """The largest absolute difference; infinite when one of the two is not finite where the other is."""
    a, b = (np.asarray(torch.as_tensor(x).detach().to(torch.float64)) for x in (value, reference))
    assert a.shape == b.shape, f"shapes {a.shape} and {b.shape}"
    difference = np.abs(a - b).max(initial=0.0)
    return float("inf") if np.isnan(difference) else float(difference)


def logits_tolerance(dtype: DType, reference: torch.Tensor) -> float:
    """The largest absolute error of logits that a model computed in `dtype` may have."""
    if dtype is DType.FLOAT32:
        return LOGITS_FLOAT32_ABS
    return LOGITS_RELATIVE[dtype] * float(reference.abs().max())


LOGITS_FP8_CACHE_RELATIVE = {DType.FLOAT32: 2e-3, DType.FLOAT16: 4e-2, DType.BFLOAT16: 8e-2}
"""Logits of a tiny model over a KV cache of e4m3 numbers against float64 over one, relative to the largest: k and v have the
errors of their type, so that those next to the middle of two e4m3 numbers become the other one, a sixteenth away. The largest
errors measured on target `cpu` were 7e-4, 2.7e-2 and 5.3e-2; without rounding to e4m3 they are 3.6e-2 to 6.4e-2 everywhere."""

LOGITS_FP8_ACTIVATIONS_FLOAT32_RELATIVE = 1e-2
"""Logits of a tiny model in float32 whose products round their rows to e4m3 numbers against float64 that does, relative to the
largest: as above, and in every product. Measured: 6e-3. In 16-bit types other numbers are rounded the other way at every
product, and what is left to compare is how far both are from no rounding."""

ROUNDING_RATIO = 1.25
"""Distance of a 16-bit engine that rounds activations to e4m3 from float64 that does not, root mean square, over that of
float64 that does. Measured on a CPU: 0.94 to 1.07."""
