"""Formats of quantized weights: rounding, packing, dequantization, and what says which weights have which.

Oracle of numbers: the definition of the format, element by element in numpy.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from trtc.core.dtypes import DType
from trtc.core.errors import CheckpointError, ConfigError
from trtc.core.quantize.integers import Quantized, dequantize, pack_int4, round_to_nearest, unpack_int4
from trtc.core.quantize.scheme import KINDS, Quantization, QuantizeOptions, WeightFormat
from trtc.core.sharding import Shard
from trtc.core.weights import IDENTITY, ResolvedWeight
from trtc.tests.tolerances import max_error

from .quantized_weights import FP8, INT4, INT8, by_definition

# ---- integers ------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    how=st.sampled_from([INT8, INT4, WeightFormat("int4", 64)]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    magnitude=st.floats(-9, 4),
    seed=st.integers(0, 2**32),
    spikes=st.integers(0, 5),
)
@example(how=INT8, dtype=torch.float16, magnitude=-5.3, seed=0, spikes=0)
def test_rounding_is_off_by_half_a_scale_at_most(
    how: WeightFormat, dtype: torch.dtype, magnitude: float, seed: int, spikes: int
) -> None:
    """Also for weights so small that their scales are subnormal in float16, for rows of zeros and for outliers. The scale
    is no larger than it must be: one step of its dtype above the largest value's share."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, 128, generator=generator) * 10**magnitude
    weight[1] = 0
    weight[2, :spikes] *= 40
    weight = weight.clamp(-6e4, 6e4).to(dtype)
    found = round_to_nearest(weight, how, name="w")
    value = by_definition(found.integers, found.scale)
    columns = how.group_size or 128
    step = found.scale.double().reshape(5, -1).repeat_interleave(columns, 1)
    half = 0.5 + how.largest * 2.0**-23  # the quotient that is rounded is one of float32
    assert bool(((value - weight.double()).abs() <= step * half).all())
    largest = weight.double().unflatten(1, (-1, columns)).abs().amax(-1).reshape(found.scale.shape)
    tight = largest / how.largest
    next_up = torch.nextafter(tight.to(dtype), torch.full_like(found.scale, torch.inf))
    assert bool(((found.scale <= next_up) | (largest == 0)).all())
    assert bool((found.scale > 0).all())


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    magnitude=st.floats(-6, 4),
    seed=st.integers(0, 2**32),
)
def test_e4m3_is_off_by_half_a_step_at_most(dtype: torch.dtype, magnitude: float, seed: int) -> None:
    """A step of e4m3 is an eighth of the power of two below the number, and 2**-9 below 2**-6. Nothing is cut off at 448."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, 128, generator=generator) * 10**magnitude
    weight[1] = 0
    weight = weight.clamp(-6e4, 6e4).to(dtype)
    found = round_to_nearest(weight, FP8, name="w")
    assert found.integers.dtype is torch.float8_e4m3fn and found.scale.shape == (5,)
    step = found.scale.double().unsqueeze(1)
    exact = weight.double() / step
    power = exact.abs().clamp(min=2.0**-6).log2().floor().exp2()
    error = (by_definition(found.integers, found.scale) / step - exact).abs()
    assert bool((error <= power / 16 * (1 + 2.0**-20)).all())
    assert bool((exact.abs() <= 448 * (1 + 2.0**-22)).all()) and bool((found.scale > 0).all())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 4), st.sampled_from([2, 6, 64]))
def test_four_bits_are_packed_and_unpacked(seed: int, rows: int, columns: int) -> None:
    integers = torch.randint(-8, 8, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(
        torch.int8
    )
    packed = pack_int4(integers)
    assert packed.dtype == torch.uint8 and packed.shape == (rows, columns // 2)
    assert torch.equal(unpack_int4(packed), integers)
    assert max_error(by_definition(packed, torch.ones(rows)), integers) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_dequantization_is_the_definition(
    packed: bool, zeros: bool, groups: int | None, dtype: torch.dtype
) -> None:
    """Rounded once, to the dtype of the scales."""
    generator = torch.Generator().manual_seed(3)
    shape = (3,) if groups is None else (3, groups)
    limit = 8 if packed else 127
    integers = torch.randint(-limit, limit, (3, 8), generator=generator).to(torch.int8)
    scale = (torch.rand(shape, generator=generator) + 0.1).to(dtype)
    zero = torch.randint(-8, 8, shape, generator=generator).to(torch.int8) if zeros else None
    stored = pack_int4(integers) if packed else integers
    value = dequantize(stored, scale, zero)
    assert value.dtype == dtype
    assert torch.equal(value, by_definition(stored, scale, zero).to(dtype))


def test_values_that_are_not_finite_are_refused() -> None:
    for bad in (float("inf"), float("nan")):
        with pytest.raises(CheckpointError, match=r"weight 'a.w' has values that are not finite"):
            round_to_nearest(torch.tensor([[1.0, bad]]), INT8, name="a.w")


# ---- schemes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (("int3",), "weight precision 'int3' is not known; accepted: int8, int4, fp8"),
        (("int8", 64), "int8 weights have one scale a row"),
        (("fp8", 64), "fp8 weights have one scale a row"),
        (("int4",), "group size None is not supported; accepted: 32, 64, 128"),
        (("int4", 48), "group size 48 is not supported; accepted: 32, 64, 128"),
    ],
)
def test_unknown_formats_are_refused(fields: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WeightFormat(*fields)


def test_quantization_travels_as_json() -> None:
    quantization = Quantization(WeightFormat("int4", 64, True), ("a", "b"), "gptq")
    data = quantization.to_json() | {"weights": ["a", "b"]}
    assert Quantization.from_json(data, "x") == quantization
    for bad in (None, {}, data | {"weights": "a"}, data | {"extra": 1}, data | {"format": {"bits": 4}}):
        with pytest.raises(CheckpointError, match="x: quantization must be an object"):
            Quantization.from_json(bad, "x")
    with pytest.raises(CheckpointError, match="x: weight precision 'int2' is not known"):
        Quantization.from_json(data | {"format": {"precision": "int2"}}, "x")


def test_rounded_activations_travel_as_json() -> None:
    """Oracle: the object. What has none is written as it was before there were any."""
    quantization = Quantization(FP8, ("a",), activations="fp8")
    data = quantization.to_json() | {"weights": ["a"]}
    assert Quantization.from_json(data, "x") == quantization
    assert quantization.kind == "fp8 with fp8 activations" and quantization.kind in KINDS
    assert str(quantization) == "fp8 with fp8 activations, nearest"
    assert Quantization(FP8, ("a",)).to_json().keys() == {"format", "weights", "method"}
    for bad in ("int8", 1):
        with pytest.raises(
            CheckpointError, match=r"x: .* activations do not go with fp8 weights; accepted: fp8 with fp8"
        ):
            Quantization.from_json(data | {"activations": bad}, "x")
    with pytest.raises(ConfigError, match="fp8 activations do not go with int8 weights"):
        Quantization(INT8, ("a",), activations="fp8")


def test_parts_are_named_after_their_weight() -> None:
    parts = Quantized(torch.zeros(1), torch.ones(1), torch.zeros(1)).parts()
    assert (
        set(parts)
        == set(WeightFormat("int4", 32, True).parts((2, 64), DType.FLOAT16))
        == {"", ".scale", ".zero"}
    )


def table() -> list[ResolvedWeight]:
    return [
        ResolvedWeight("embed", (), (10, 64), Shard.EMBEDDING, IDENTITY),
        ResolvedWeight("up", (), (8, 64), Shard.COLUMN, IDENTITY, quantizable=True),
        ResolvedWeight("down", (), (8, 64), Shard.ROW, IDENTITY, quantizable=True),
        ResolvedWeight("head", (), (10, 64), Shard.VOCAB_HEAD, IDENTITY, tied_to="embed"),
        ResolvedWeight("head.bias", (), (10,), Shard.VOCAB_HEAD, IDENTITY),
    ]


def test_the_table_says_what_is_quantized() -> None:
    assert QuantizeOptions(INT8).choose(table()).weights == ("down", "up")
    assert QuantizeOptions(INT8, lm_head=True).choose(table()).weights == ("down", "head", "up")
    with pytest.raises(ConfigError, match="marks no weight as quantizable"):
        QuantizeOptions(INT8).choose(table()[:1])
