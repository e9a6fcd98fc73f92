"""Products with weights of few bits. The formats are those of `core.quantize.scheme.WeightFormat`."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..dtypes import DType
from ..quantize.integers import dequantize
from ..spec import TensorSpec
from .attention import FP8_MAX
from .linear import check_linear, linear
from .norm import NORMS, check_affine
from .registry import Attrs, Op, ReferenceContext, Signature, register, widen

ACTIVATIONS = "activations"
"""The attribute that says what rows of x are rounded to."""


def _weight(sig: Signature, first: int) -> TensorSpec:
    """Type of the dequantized weight; inputs `first`.. are integers, scale, zero."""
    integers, scale, zero = sig[first], sig[first + 1], sig.get(first + 2)
    per_byte = {DType.INT8: 1, DType.FLOAT8_E4M3: 1, DType.UINT8: 2}.get(integers.dtype)
    fits = integers.rank == 2 and per_byte is not None
    sig.require(fits, f"integers {integers} are not int8 or float8_e4m3fn [out, in], or uint8[out, in / 2]")
    sig.require(scale.dtype.is_float, f"scale {scale} is not floating point")
    rows, stored = integers.shape
    assert isinstance(stored, int) and per_byte is not None
    columns = stored * per_byte
    groups = scale.shape[1] if scale.rank == 2 else 1
    sig.require(
        scale.rank in (1, 2) and scale.shape[0] == rows and isinstance(groups, int) and groups > 0 and columns % groups == 0,
        f"scale {scale} does not fit integers {integers}",
    )  # fmt: skip
    fits = zero is None or zero == TensorSpec(DType.INT8, scale.shape)
    sig.require(fits, f"zero {zero} is not int8 of the shape of scale {scale}")
    return TensorSpec(scale.dtype, (rows, columns))


def _infer_dequantize(sig: Signature) -> tuple[TensorSpec, ...]:
    return (_weight(sig, 0),)


def _infer_linear(sig: Signature) -> tuple[TensorSpec, ...]:
    if ACTIVATIONS in sig.attrs:
        sig.attr(ACTIVATIONS, "fp8")
    if "norm" in sig.attrs:
        check_affine(sig, 6)
    else:
        sig.require(len(sig.inputs) <= 6, "weights of a norm without a norm")
    return (check_linear(sig, _weight(sig, 1), bias=4, residual=5),)


def _dequantize_reference(
    _: ReferenceContext,
    attrs: Attrs,
    integers: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None = None,
) -> torch.Tensor:
    return dequantize(integers, scale, zero)


def _linear_reference(
    _: ReferenceContext,
    attrs: Attrs,
    x: torch.Tensor,
    integers: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    norm_scale: torch.Tensor | None = None,
    norm_shift: torch.Tensor | None = None,
) -> torch.Tensor:
    if "norm" in attrs:
        x = NORMS[attrs["norm"]](x, norm_scale, norm_shift, attrs["eps"])
        attrs = {name: value for name, value in attrs.items() if name != "norm"}
    if ACTIVATIONS in attrs:
        x = rounded_rows(x)
    return linear(attrs, x, dequantize(integers, scale, zero), bias, residual)


def rounded_rows(x: torch.Tensor) -> torch.Tensor:
    """`x` in its own dtype, every row rounded to e4m3 numbers with a scale of its own: its largest absolute value is 448."""
    wide = widen(x)
    largest = wide.abs().amax(-1, keepdim=True)
    scale = torch.where(largest > 0, largest / FP8_MAX, 1.0)
    numbers = (wide / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return (numbers.to(wide.dtype) * scale).to(x.dtype)


def _linear_flops(sig: Signature, outputs: tuple[TensorSpec, ...], sizes: Mapping[str, int]) -> int:
    in_features = sig[0].shape[-1]
    assert isinstance(in_features, int)
    return 2 * outputs[0].numel(sizes) * in_features


DEQUANTIZE = register(Op("dequantize", _infer_dequantize, _dequantize_reference, folds=False, attrs=()))
"""`dequantize(integers, scale, zero?)` -> [out, in] in the dtype of the scales: (integers - zero) * scale.

integers: int8 or float8_e4m3fn [out, in], or uint8 [out, in / 2] with two of four bits each; scale: [out], or [out, groups];
zero: int8 of the shape of the scales. Never evaluated by the build: that would undo what quantization is for.
"""
QUANTIZED_LINEAR = register(
    Op(
        "quantized_linear",
        _infer_linear,
        _linear_reference,
        _linear_flops,
        attrs=("activation", "norm", "eps", "activations"),
    )
)
"""`quantized_linear(x[..., in], integers, scale, zero?, bias[out]?, residual[..., out]?, norm_scale[in]?, norm_shift[in]?;
activation?, norm?, eps?, activations?)` -> [..., out]: `linear` with the weight that `dequantize` gives, and a norm that may
have weights. A pass makes it for targets that read integers in the product. With activations fp8, the rows that are multiplied
are rounded to e4m3 numbers with a scale each; a target may leave them as they are in steps where that is no slower."""
