"""Linear layers with integer weights: the contract on the CPU; on a GPU the kernels themselves. Their layouts and
plans are tested in test_quantized_layouts.py.

Oracle of results: float64 references. Oracle of a weight: see quantized_weights.py.
"""

from __future__ import annotations

import pytest
import torch
from trtc.core.quantize.integers import dequantize
from trtc.kernels.errors import KernelContractError
from trtc.kernels.layer_norm.reference import norm as reference_norm
from trtc.kernels.library import KernelLibrary
from trtc.kernels.linear import Norm, weight_sums
from trtc.kernels.linear.formats import WEIGHTS
from trtc.kernels.linear.quantized import Dequantize, QuantizedLinear, for_kernels
from trtc.kernels.linear.quantized_plan import (
    QuantizedPlan,
    choose_quantized,
    quantized_stream,
    quantized_tile,
)
from trtc.kernels.linear.reference import linear as reference
from trtc.kernels.linear.stripe_plan import fits_stripe, plan_stripe

from .quantized_weights import (
    FORMATS,
    RELATIVE_ERROR,
    ZERO_FORMATS,
    check_products,
    made_weight,
    relative_error,
    skip_parts_of_groups,
    weight,
    weight_with_zeros,
)

# ---- contract ------------------------------------------------------------------------------------


def arguments(how: str = "int8") -> dict[str, object]:
    integers, scale = for_kernels(*weight(16, 128, how, torch.float16))
    return {
        "x": torch.zeros(2, 128, dtype=torch.float16),
        "integers": integers,
        "scale": scale,
        "out": torch.zeros(2, 16, dtype=torch.float16),
    }


@pytest.mark.parametrize(
    ("how", "change", "message"),
    [
        ("int8", {"scale": torch.ones(16, 1, dtype=torch.float16)}, "with scales .* are not supported; accepted: int8"),
        ("int8", {"scale": torch.ones(16)}, r"scale is \[16\] float32 on cpu; expected \[out_features=16\] float16"),
        ("fp8", {"scale": torch.ones(16)}, r"scale is \[16\] float32"),
        ("int8", {"integers": torch.zeros(16, 112, dtype=torch.int8)}, "integers is .*; expected .* int8"),
        ("int4/64", {"scale": torch.ones(16, 3, dtype=torch.float16)}, r"with scales \[16, 3\] are not supported"),
        ("int4/64", {"scale": torch.ones(15, 2, dtype=torch.float16)}, r"scale is \[15, 2\]"),
        ("int4/64", {"x": torch.zeros(65, 128, dtype=torch.float16)}, "rows=65 is not in 1 to 64"),
        ("int4/64", {"x": torch.zeros(2, 128)}, "quantized linear: dtype float32 is not supported"),
        ("int8", {"bias": torch.zeros(9, dtype=torch.float16)}, r"quantized linear: bias is \[9\]"),
        ("int8", {"activation": "swish"}, "quantized linear: activation 'swish' is unknown"),
        ("int8", {"norm": Norm(None)}, "quantized linear: a layer norm needs weight_sums"),
        ("int8",
         {"norm": Norm(None, scale=torch.ones(128, dtype=torch.float16)), "plan": quantized_stream(2, 16, 128, weight="int8")},
         r"no kernel for 2 rows times int8 \[16, 128\] norms with weights"),
        ("int8", {"norm": Norm(None, scale=torch.ones(127, dtype=torch.float16))}, r"norm.scale is \[127\]"),
    ],
)  # fmt: skip
def test_contract_is_checked_before_anything_runs(how: str, change: dict[str, object], message: str) -> None:
    """Oracle: the text; no GPU is touched."""
    with pytest.raises(KernelContractError, match=message):
        QuantizedLinear(KernelLibrary())(**{**arguments(how), **change})  # type: ignore[arg-type]


def test_a_matrix_of_another_size_is_refused() -> None:
    """Oracle: the text."""
    given = arguments("int4/32")
    with pytest.raises(KernelContractError, match="dequantize: 16 rows of integers, out has 15"):
        Dequantize(KernelLibrary())(
            given["integers"], given["scale"], out=torch.zeros(15, 128, dtype=torch.float16)
        )  # type: ignore[arg-type]


# ---- on a GPU ------------------------------------------------------------------------------------


def plans(rows: int, features: int, columns: int, how: str) -> list[QuantizedPlan]:
    """The chosen plan and one of every kernel and way of running it."""
    found = [choose_quantized(rows, features, columns, weight=how)]
    if rows <= 16:
        found += [
            quantized_stream(rows, features, columns, weight=how, blocks=blocks, warps=warps, held=held, alone=alone)
            for blocks, warps, held, alone in ((264, 4, False, False), (5, 8, True, True), (132, 6, False, True))
        ]  # fmt: skip
    if fits_stripe(rows, columns, WEIGHTS[how]):
        stripes = (
            plan_stripe(
                rows, features, columns, weight=how, blocks=blocks, warps=warps, tiles=tiles, residents=residents,
                block_bytes=kib * 1024, early_steps=early,
            )
            for blocks, warps, tiles, residents, kib, early in (
                (264, 8, 4, 2, 112, 1), (9, 16, 2, 2, 226, 2), (70, 4, 1, 2, 112, 9)
            )
        )  # fmt: skip
        found += [plan for plan in stripes if plan is not None]
    found += [
        quantized_tile(rows, features, columns, weight=how, cluster=cluster, stages=stages)
        for cluster, stages in ((1, 2), (2, 4))
    ]
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", RELATIVE_ERROR, ids=str)
@pytest.mark.parametrize("how", FORMATS)
@pytest.mark.parametrize(
    ("rows", "features", "columns"),
    [
        (1, 768, 768),
        (3, 100, 896),
        (8, 1024, 3072),
        (13, 1001, 640),
        (16, 256, 4096),
        (33, 1001, 384),
        (64, 520, 1152),
    ],
)
def test_kernels(
    rows: int, features: int, columns: int, how: str, dtype: torch.dtype, library: KernelLibrary
) -> None:
    """Oracle: the float64 reference with the weight dequantized in float64; see `check_products`."""
    made, exact = made_weight(features, columns, how, dtype)
    check_products(library, plans(rows, features, columns, how), made, exact, rows, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", RELATIVE_ERROR, ids=str)
@pytest.mark.parametrize("how", ["int4/128", "int4/32", "int4zero/128"])
@pytest.mark.parametrize(("mean", "deviation"), [(20.0, 1.0), (2e-4, 1e-4), (200.0, 60.0)])
def test_inputs_that_are_all_positive(
    mean: float, deviation: float, how: str, dtype: torch.dtype, library: KernelLibrary
) -> None:
    """Oracle: the float64 reference. What stands for an integer in a product is larger than it, and what that adds grows with
    the sum of x: the more of it, the more of the result could be lost. The weights with zeros are all positive."""
    integers, scale = weight(264, 4096, how, dtype, "cuda")
    zero = torch.full_like(scale, -8, dtype=torch.int8) if WEIGHTS[how].zeros else None
    exact = dequantize(integers, scale.double(), zero)
    made, scales = for_kernels(integers.clone(), scale, zero)
    x = (
        torch.randn(8, 4096, generator=torch.Generator().manual_seed(1))
        .mul_(deviation)
        .add_(mean)
        .abs_()
        .to("cuda", dtype)
    )
    out = torch.empty(8, 264, device="cuda", dtype=dtype)
    for plan in plans(8, 264, 4096, how):
        result = QuantizedLinear(library)(x, made, scales, out=out.fill_(float("nan")), plan=plan)
        assert relative_error(result, reference(x, exact)) < RELATIVE_ERROR[dtype], plan


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", RELATIVE_ERROR, ids=str)
@pytest.mark.parametrize("how", FORMATS)
@pytest.mark.parametrize("columns", [160, 192, 224])
def test_columns_that_are_not_whole_blocks(
    columns: int, how: str, dtype: torch.dtype, library: KernelLibrary
) -> None:
    """Oracle: the float64 reference. Rows are padded; what lies behind x's last column must not be read into the sum."""
    skip_parts_of_groups(columns, how)
    made, exact = made_weight(72, columns, how, dtype)
    for rows in (1, 8, 40):
        whole = torch.full((rows + 1, columns), float("nan"), device="cuda", dtype=dtype)
        whole[:rows] = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(dtype)
        out = torch.full((rows, 72), float("nan"), device="cuda", dtype=dtype)
        result = QuantizedLinear(library)(whole[:rows], *made, out=out)
        assert relative_error(result, reference(whole[:rows], exact)) < RELATIVE_ERROR[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", RELATIVE_ERROR, ids=str)
@pytest.mark.parametrize("how", ["int8", "fp8", "int4/128"])
@pytest.mark.parametrize(("rows", "kind"), [(1, "layer"), (5, "layer"), (16, "layer"), (2, "rms")])
def test_fused_norm(rows: int, kind: str, how: str, dtype: torch.dtype, library: KernelLibrary) -> None:
    """Oracle: the float64 reference."""
    made, exact = made_weight(1000, 2048, how, dtype)
    x = (torch.randn(rows, 2048, generator=torch.Generator().manual_seed(rows)) + 3).to("cuda", dtype)
    norm = Norm(weight_sums(exact) if kind == "layer" else None, kind)
    out = QuantizedLinear(library)(x, *made, out=x.new_empty(rows, 1000), norm=norm)
    expected = reference_norm(x, kind=kind) @ exact.T
    assert relative_error(out, expected) < RELATIVE_ERROR[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", RELATIVE_ERROR, ids=str)
@pytest.mark.parametrize("how", ["int8", "fp8", "int4/128", "int4zero/32"])
@pytest.mark.parametrize(("rows", "kind"), [(1, "layer"), (3, "layer"), (8, "rms")])
@pytest.mark.parametrize("columns", [768, 4096])
def test_norms_with_weights_of_their_own(
    columns: int, rows: int, kind: str, how: str, dtype: torch.dtype, library: KernelLibrary
) -> None:
    """Oracle: the float64 reference, the norm before the product."""
    integers, scale = weight(1001, columns, how, dtype, "cuda")
    zero = torch.full_like(scale, 3, dtype=torch.int8) if WEIGHTS[how].zeros else None
    exact = dequantize(integers, scale.double(), zero)
    made, scales = for_kernels(integers, scale, zero)
    generator = torch.Generator().manual_seed(rows)
    x, norm_scale, norm_shift = (
        torch.randn(*shape, generator=generator).to("cuda", dtype)
        for shape in ((rows, columns), (columns,), (columns,))
    )
    x += 3
    norm = Norm(None, kind, scale=norm_scale, shift=norm_shift if kind == "layer" else None)
    shift = norm_shift.double() if kind == "layer" else 0
    expected = (reference_norm(x, kind=kind) * norm_scale.double() + shift) @ exact.T
    for blocks, warps, tiles, residents in ((264, 8, 4, 2), (20, 16, 2, 1)):
        plan = plan_stripe(
            rows, 1001, columns, weight=how, norm=kind, blocks=blocks, warps=warps, tiles=tiles, residents=residents,
            block_bytes=225 * 1024,
        )  # fmt: skip
        assert plan is not None
        out = torch.full((rows, 1001), float("nan"), device="cuda", dtype=dtype)
        QuantizedLinear(library)(x, made, scales, out=out, norm=norm, plan=plan)
        assert relative_error(out, expected) < RELATIVE_ERROR[dtype], plan


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", RELATIVE_ERROR, ids=str)
@pytest.mark.parametrize("how", FORMATS)
@pytest.mark.parametrize(("features", "columns"), [(33, 128), (100, 896), (7, 192), (1024, 4096)])
def test_dequantization(
    features: int, columns: int, how: str, dtype: torch.dtype, library: KernelLibrary
) -> None:
    """Oracle: `dequantize` of the engine's own layout, bit by bit."""
    skip_parts_of_groups(columns, how)
    integers, scale = weight(features, columns, how, dtype, "cuda")
    expected = dequantize(integers, scale)
    made, scales = for_kernels(integers, scale)
    out = torch.full((features, columns), float("nan"), device="cuda", dtype=dtype)
    assert torch.equal(Dequantize(library)(made, scales, out=out), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", RELATIVE_ERROR, ids=str)
@pytest.mark.parametrize("how", ZERO_FORMATS)
@pytest.mark.parametrize(
    ("rows", "features", "columns"),
    [(1, 768, 768), (3, 100, 896), (8, 72, 192), (16, 256, 4096), (64, 521, 1152)],
)
def test_kernels_with_zeros(
    rows: int, features: int, columns: int, how: str, dtype: torch.dtype, library: KernelLibrary
) -> None:
    """Oracle: the float64 reference with the weight dequantized in float64; dequantization itself bit by bit."""
    skip_parts_of_groups(columns, how)
    integers, scale, zero = weight_with_zeros(features, columns, how, dtype, "cuda")
    exact, rounded = dequantize(integers, scale.double(), zero), dequantize(integers, scale, zero)
    made, values = for_kernels(integers, scale, zero)
    whole = torch.full((features, columns), float("nan"), device="cuda", dtype=dtype)
    assert torch.equal(Dequantize(library)(made, values, out=whole), rounded)
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to("cuda", dtype)
    out = torch.empty(rows, features, device="cuda", dtype=dtype)
    for plan in plans(rows, features, columns, how):
        result = QuantizedLinear(library)(x, made, values, out=out.fill_(float("nan")), plan=plan)
        assert relative_error(result, reference(x, exact)) < RELATIVE_ERROR[dtype], plan
