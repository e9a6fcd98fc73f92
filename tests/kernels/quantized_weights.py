"""What tests of products with integer weights share: formats, random weights, and the check of plans against float64.

Oracle of a weight: `core.quantize.integers.dequantize`, which `tests/core/test_weight_formats.py` checks by the definition.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from trtc.core.quantize.integers import dequantize, pack_int4
from trtc.kernels.library import KernelLibrary
from trtc.kernels.linear.formats import WEIGHTS
from trtc.kernels.linear.quantized import QuantizedLinear, for_kernels
from trtc.kernels.linear.quantized_plan import QuantizedPlan
from trtc.kernels.linear.reference import linear as reference

RELATIVE_ERROR = {torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Largest 2-norm of the error over that of the reference: one rounding of the output, of 11 or 8 bits."""
FORMATS = ("int8", "fp8", "int4/32", "int4/64", "int4/128")
ZERO_FORMATS = ("int4zero/32", "int4zero/64", "int4zero/128")


def weight(
    features: int, columns: int, how: str, dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers over their whole range and scales, as engines store them."""
    generator = torch.Generator().manual_seed(seed + features * columns)
    stored = WEIGHTS[how]
    shape = (features,) if stored.group is None else (features, columns // stored.group)
    spread = torch.rand(shape, generator=generator) + 0.2
    if how == "fp8":
        numbers = torch.randn(features, columns, generator=generator).mul_(100).clamp_(-448, 448)
        return numbers.to(device, torch.float8_e4m3fn), (spread * columns**-0.5 / 100).to(device, dtype)
    limit = 127 if stored.bits == 8 else 8
    integers = torch.randint(-limit, limit, (features, columns), generator=generator, dtype=torch.int8)
    packed = integers if stored.bits == 8 else pack_int4(integers)
    return packed.to(device), (spread * 2 / limit * columns**-0.5).to(device, dtype)


def weight_with_zeros(
    features: int, columns: int, how: str, dtype: torch.dtype, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same of a format with zeros, of which there are all that checkpoints have."""
    integers, scale = weight(features, columns, how, dtype, device)
    zero = torch.randint(
        -8, 9, scale.shape, generator=torch.Generator().manual_seed(columns), dtype=torch.int8
    )
    return integers, scale, zero.to(device)


def made_weight(
    features: int, columns: int, how: str, dtype: torch.dtype
) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A weight on the GPU as kernels read it, and its values in float64."""
    if how in ZERO_FORMATS:
        integers, scale, zero = weight_with_zeros(features, columns, how, dtype, "cuda")
        return for_kernels(integers.clone(), scale, zero), dequantize(integers, scale.double(), zero)
    integers, scale = weight(features, columns, how, dtype, "cuda")
    return for_kernels(integers.clone(), scale), dequantize(integers, scale.double())


def skip_parts_of_groups(columns: int, how: str) -> None:
    """Skips the test where `columns` are not whole groups of the format."""
    group = WEIGHTS[how].group
    if group is not None and columns % group:
        pytest.skip("columns are not whole groups")


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    return float((out.double() - expected).norm() / expected.norm())


def check_products(
    library: KernelLibrary,
    plans: Sequence[QuantizedPlan],
    made: tuple[torch.Tensor, torch.Tensor],
    exact: torch.Tensor,
    rows: int,
    dtype: torch.dtype,
) -> None:
    """Runs every plan twice, with bias, residual and another activation, on poisoned outputs.

    made, exact: of `made_weight`. Oracle: the float64 reference; the second run gives the same bits.
    """
    features, columns = exact.shape
    generator = torch.Generator().manual_seed(rows)
    x, bias, residual = (
        torch.randn(*shape, generator=generator).to("cuda", dtype)
        for shape in ((rows, columns), (features,), (rows, features))
    )
    out = torch.empty(rows, features, device="cuda", dtype=dtype)
    linear, activations = (
        QuantizedLinear(library),
        itertools.cycle(("none", "relu", "gelu", "gelu_tanh", "silu")),
    )
    for plan, activation in zip(plans, activations, strict=False):
        given = {"bias": bias, "residual": residual, "activation": activation}
        expected = reference(x, exact, **given)
        first = linear(x, *made, out=out.fill_(float("nan")), plan=plan, **given).clone()
        second = linear(x, *made, out=out.fill_(float("nan")), plan=plan, **given)
        assert relative_error(first, expected) < RELATIVE_ERROR[dtype], plan
        assert torch.equal(first, second), plan
