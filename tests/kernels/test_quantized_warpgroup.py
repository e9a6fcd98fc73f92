"""The linear kernel for 17 to 64 rows and integer weights on Hopper: its order of columns and its plans on the CPU; on a GPU
the kernel itself.

Oracle of a weight: see quantized_weights.py.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from trtc.kernels.library import KernelLibrary
from trtc.kernels.linear.formats import WEIGHTS
from trtc.kernels.linear.plan import SHARED_LIMITS
from trtc.kernels.linear.quantized import QuantizedLinear
from trtc.kernels.linear.quantized_plan import choose_quantized
from trtc.kernels.linear.quantized_warpgroup_plan import (
    LEAST_ROW_STAGES,
    UNIT_COLUMNS,
    QuantizedWarpgroupPlan,
    plan_quantized_warpgroup,
)
from trtc.kernels.linear.reference import linear as reference

from .quantized_weights import (
    FORMATS,
    RELATIVE_ERROR,
    ZERO_FORMATS,
    check_products,
    made_weight,
    relative_error,
    skip_parts_of_groups,
)

SHAPES = [
    (2304, 768),
    (12288, 4096),
    (4096, 16384),
    (2560, 10240),
    (50272, 9216),
    (36864, 9216),
    (101, 256),
    (7, 136),
]

PLANS = [
    # rings that hold all of K, and rings that turn; blocks with all the features they can have, and with fewer
    {"groups": 1, "split": 1},
    {"groups": 1, "split": 2, "ring_bytes": 16 << 10, "row_stages": 2},
    {"groups": 2, "split": 4, "features_per_block": 104},
    {"groups": 3, "split": 1, "ring_bytes": 48 << 10, "row_stages": 3},
    {"groups": 3, "split": 3, "features_per_block": 136},
    {"groups": 4, "split": 2, "ring_bytes": 48 << 10, "row_stages": 2},
    {"groups": 4, "split": 8},
    {"groups": 4, "split": 1, "features_per_block": 200},
]


def plans(rows: int, features: int, columns: int, how: str) -> list[QuantizedWarpgroupPlan]:
    return [plan_quantized_warpgroup(rows, features, columns, weight=how, **given) for given in PLANS]  # type: ignore[arg-type]


# ---- on the CPU ----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["int8", "int4/64"])
def test_products_pair_the_same_columns_of_x_and_weight(how: str) -> None:
    """Oracle: every column of a slice once, each with itself.

    The places of x are those of `arrange`, those of W those of `operand_of`; `slots` are what wgmma gives a member of each
    16 columns (PTX ISA, "Register Fragments for wgmma.mma_async.m64nNk16").
    """
    pieces = WEIGHTS[how].pieces
    member_pieces, index_pieces = {2: (2, 1), 4: (1, 4)}[
        pieces
    ]  # kMemberColumns and kPieceColumns, in pieces of 8 columns

    def piece(member: int, index: int) -> int:
        return member * member_pieces + index * index_pieces

    arranged = [-1] * 64
    for index, octet, member in itertools.product(range(2), range(4), range(4)):
        for j in range(
            2
        ):  # word `member` of the octet that takes the place of a piece is word `octet` of that member's piece
            arranged[8 * piece(octet, index) + 2 * member + j] = 8 * piece(member, index) + 2 * octet + j
    assert sorted(arranged) == list(range(64))

    one_set = member_pieces == 1
    for product, member, half, j in itertools.product(range(4), range(4), range(2), range(2)):
        index, octet = (product // 2, 2 * (product % 2) + half) if one_set else (half, product)
        of_weight = 8 * piece(member, index) + 2 * octet + j
        slot = 8 * half + 2 * member + j
        assert arranged[16 * product + slot] == of_weight
    if how == "int8":  # 16 stored bytes are the pieces of one slice; of int4, those of two, 64 columns apart
        assert sorted(piece(m, i) for m in range(4) for i in range(2)) == list(range(8))
    else:
        assert [8 * m + 32 * i for m in range(4) for i in (2, 3)] == [
            64 + 8 * piece(m, i) for m in range(4) for i in (0, 1)
        ]


def check(plan: QuantizedWarpgroupPlan, rows: int, features: int, columns: int) -> None:
    shape = plan.launch_shape(dependent=True)
    cluster = shape.cluster[0] if shape.cluster else 1
    assert cluster == plan.split <= 8 and shape.grid[0] % cluster == 0
    assert shape.block == (128 * plan.groups + 128,) and 1 <= plan.groups <= 4
    assert plan.features_per_block % 8 == 0 and plan.features_per_block <= 64 * plan.groups
    assert shape.grid[0] // plan.split * plan.features_per_block >= features
    assert plan.split * plan.columns_per_block >= columns and plan.columns_per_block % UNIT_COLUMNS == 0
    assert plan.tokens >= rows and plan.tokens % 16 == 0
    units = plan.columns_per_block // UNIT_COLUMNS
    assert min(units, 2) <= plan.row_stages <= 8
    assert plan.stages >= 2 and 2 * plan.stages * plan.split >= plan.tokens // 8
    assert plan.shared_bytes <= SHARED_LIMITS[90] - 1024


@pytest.mark.parametrize("how", [*FORMATS, *ZERO_FORMATS])
@pytest.mark.parametrize("rows", [17, 24, 33, 48, 64])
def test_plans_cover_the_matrix_and_fit(rows: int, how: str) -> None:
    """Oracle: the sizes of the matrix, the rules that the kernel states, the hardware's limits."""
    for features, columns in SHAPES:
        chosen = choose_quantized(rows, features, columns, weight=how, capability=90)
        assert isinstance(chosen, QuantizedWarpgroupPlan) and chosen.weight == how
        assert chosen.row_stages >= min(LEAST_ROW_STAGES, chosen.columns_per_block // UNIT_COLUMNS)
        for plan in (chosen, *plans(rows, features, columns, how)):
            check(plan, rows, features, columns)


def test_other_gpus_keep_their_kernel() -> None:
    """Oracle: the type of the plan; wgmma is of Hopper alone."""
    for capability in (80, 89, 100, 120):
        plan = choose_quantized(64, 4096, 4096, weight="int8", capability=capability)
        assert not isinstance(plan, QuantizedWarpgroupPlan)


# ---- on a GPU ------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", RELATIVE_ERROR, ids=str)
@pytest.mark.parametrize("how", ["int8", "fp8", "int4/64", "int4/128", "int4zero/64", "int4zero/128"])
@pytest.mark.parametrize(
    ("rows", "features", "columns"),
    [(17, 101, 128), (33, 1001, 384), (48, 300, 1152), (64, 520, 2048)],
)
def test_kernel(
    rows: int, features: int, columns: int, how: str, dtype: torch.dtype, library: KernelLibrary
) -> None:
    """Oracle: the float64 reference with the weight dequantized in float64; see `check_products`."""
    made, exact = made_weight(features, columns, how, dtype)
    chosen = choose_quantized(rows, features, columns, weight=how)
    check_products(library, [chosen, *plans(rows, features, columns, how)], made, exact, rows, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["int8", "fp8", "int4zero/32"])
@pytest.mark.parametrize("columns", [136, 200, 416])
def test_columns_that_are_not_whole_units(columns: int, how: str, library: KernelLibrary) -> None:
    """Oracle: the float64 reference. What lies behind x's last column and row must not be read into the sum."""
    skip_parts_of_groups(columns, how)
    made, exact = made_weight(72, columns, how, torch.float16)
    for rows in (20, 40):
        whole = torch.full((rows + 1, columns), float("nan"), device="cuda", dtype=torch.float16)
        whole[:rows] = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).half()
        for plan in plans(rows, 72, columns, how):
            out = torch.full((rows + 1, 72), float("nan"), device="cuda", dtype=torch.float16)
            QuantizedLinear(library)(whole[:rows], *made, out=out[:rows], plan=plan)
            assert (
                relative_error(out[:rows], reference(whole[:rows], exact)) < RELATIVE_ERROR[torch.float16]
            ), plan
            assert out[rows].isnan().all(), plan


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["int8", "int4/128"])
def test_layers_in_a_row(how: str, library: KernelLibrary) -> None:
    """Oracle: float64. Two layers, the second's residual in place, each reading what the one before has just written, captured
    and replayed: a kernel that starts under its predecessor's tail must wait for it."""
    rows, hidden = 64, 1024
    wide, exact_wide = made_weight(4 * hidden, hidden, how, torch.float16)
    narrow, exact_narrow = made_weight(hidden, 4 * hidden, how, torch.float16)
    x = torch.randn(rows, hidden, generator=torch.Generator().manual_seed(1)).to("cuda", torch.float16)
    state, between = x.clone(), torch.empty(rows, 4 * hidden, device="cuda", dtype=torch.float16)
    linear = QuantizedLinear(library)
    expected, factors = x.double(), []
    for _ in range(8):
        expected = expected + torch.relu(expected @ exact_wide.T) @ exact_narrow.T
        factors.append(float(x.double().norm() / expected.norm()))
        expected *= factors[-1]

    def layers() -> None:
        for factor in factors:
            linear(state, *wide, out=between, activation="relu")
            linear(between, *narrow, out=state, residual=state)
            state.mul_(factor)

    layers()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layers()
    results = []
    for _ in range(3):
        state.copy_(x)
        graph.replay()
        results.append(state.clone())
    assert relative_error(results[0], expected) < 8 * RELATIVE_ERROR[torch.float16]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
