"""linear: reference, plans and contract; on a GPU the kernels themselves."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch.nn import functional
from trtc.kernels.errors import KernelContractError
from trtc.kernels.library import KernelLibrary
from trtc.kernels.linear import Linear, Norm, Plan, choose_plan, weight_sums
from trtc.kernels.linear.multicast_plan import TOKENS, MulticastPlan, plan_multicast
from trtc.kernels.linear.plan import (
    SHARED_LIMITS,
    SMALLEST_SHARED_LIMIT,
    StreamPlan,
    TilePlan,
    WarpgroupPlan,
    plan_stream,
    plan_tile,
    plan_warpgroup,
)
from trtc.kernels.linear.reference import activate
from trtc.kernels.linear.reference import linear as reference

RELATIVE_ERROR = {torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Largest 2-norm of the error over that of the reference: one rounding of the output, of 11 or 8 bits."""

SHAPES = [
    (2304, 768),
    (768, 768),
    (768, 3072),
    (50272, 768),
    (6144, 2048),
    (2560, 10240),
    (4096, 16384),
    (1001, 264),
]
"""(out_features, in_features)"""


def test_reference_is_torch_linear() -> None:
    """Oracle: torch's layer_norm and linear in float64."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, residual = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((3, 16), (8, 16), (8,), (3, 8))
    )
    expected = functional.relu(functional.linear(functional.layer_norm(x, (16,)), weight, bias)) + residual
    out = reference(x, weight, bias, residual=residual, activation="relu", norm="layer")
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_norm_moves_into_the_layer() -> None:
    """Oracle: torch's layer_norm with parameters; what `Norm` says about them and what the kernel computes."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, scale, shift = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((3, 16), (8, 16), (8,), (16,), (16,))
    )
    expected = functional.linear(functional.layer_norm(x, (16,), scale, shift), weight, bias)
    folded, moved = weight * scale, bias + weight @ shift
    torch.testing.assert_close(reference(x, folded, moved, norm="layer"), expected, rtol=1e-12, atol=1e-12)
    inverse = torch.rsqrt(x.var(dim=1, correction=0, keepdim=True) + 1e-5)
    sums = weight_sums(folded).double()
    by_sums = inverse * (x @ folded.T - x.mean(dim=1, keepdim=True) * sums) + moved
    torch.testing.assert_close(by_sums, expected, rtol=1e-5, atol=1e-5)  # the sums are float32


@pytest.mark.parametrize(
    ("capability", "multiprocessors"), [(80, 108), (89, 132), (89, 142), (90, 132), (120, 170)]
)
@pytest.mark.parametrize(("features", "columns"), [*SHAPES, (6144, 4096), (10240, 256)])
def test_plans_cover_the_matrix_and_fit(
    capability: int, multiprocessors: int, features: int, columns: int
) -> None:
    for rows in (1, 4, 7, 8, 9, 16, 17, 32, 33, 64):
        check_plan(rows, features, columns, capability, multiprocessors)


def test_plans_of_any_sizes_cover_the_matrix_and_fit() -> None:
    """So many because few are at the edge of a block's memory."""
    draw = random.Random(0)
    for _ in range(20_000):
        check_plan(
            rows=draw.randint(1, 64),
            features=draw.choice((draw.randint(1, 20_000), draw.randint(1, 130_000))),
            columns=8 * draw.choice((draw.randint(1, 100), draw.randint(1, 3000))),
            capability=draw.choice((80, 86, 89, 90, 100, 120)),
            multiprocessors=draw.randint(1, 200),
        )


def check_plan(rows: int, features: int, columns: int, capability: int, multiprocessors: int) -> None:
    """Oracle: the sizes of the matrix, the rules that the kernels state, the hardware's limits."""
    limit = SHARED_LIMITS.get(capability, SMALLEST_SHARED_LIMIT)
    plan = choose_plan(rows, features, columns, capability=capability, multiprocessors=multiprocessors)
    shape = plan.launch_shape(dependent=True)
    assert plan.shared_bytes <= limit, plan
    assert shape.block[0] <= 1024 and shape.block[0] % 32 == 0
    if isinstance(plan, StreamPlan):
        moments = plan.warps * 8 * plan.token_tiles * 8  # bytes beside the ring, with a norm
        assert plan.shared_bytes + moments <= limit, plan
        assert plan.blocks <= features and 1 <= plan.octets <= 5 and 8 * plan.token_tiles >= rows
        return
    cluster = shape.cluster[0] if shape.cluster else 1
    assert cluster <= (8 if capability >= 90 else 1)
    assert shape.grid[0] % cluster == 0
    if isinstance(plan, MulticastPlan):
        assert capability == 90
        check_multicast(plan, rows, features, columns)
        return
    assert shape.grid[0] // cluster * plan.features_per_block >= features
    assert cluster * plan.columns_per_block >= columns and plan.columns_per_block % 64 == 0
    if isinstance(plan, WarpgroupPlan):
        assert capability == 90 and plan.tokens >= rows
        assert plan.features_per_block % 8 == 0
        assert plan.features_per_block <= min(256, 64 * plan.feature_tiles)
    else:
        assert isinstance(plan, TilePlan) and 8 * plan.token_tiles >= rows
        assert plan.features_per_block <= 16 * plan.feature_tiles * plan.warps_down


MULTICAST_PLANS = [
    # features_per_block, copies, split, block_bytes: rings that hold all of K, and rings that turn.
    (8, 1, 1, 112 * 1024),
    (24, 4, 1, 112 * 1024),
    (16, 8, 1, 40 * 1024),
    (64, 2, 1, 72 * 1024),
    (128, 4, 1, 112 * 1024),
    (40, 2, 2, 60 * 1024),
    (24, 4, 2, 112 * 1024),
    (32, 2, 4, 48 * 1024),
    (80, 1, 4, 112 * 1024),
    (64, 1, 8, 112 * 1024),
    (112, 1, 8, 100 * 1024),
    # Sums in the places of stages that are done with, in a ring that turns and in one that does not.
    (72, 1, 4, 52 * 1024),
    (128, 1, 2, 80 * 1024),
    (88, 1, 2, 66 * 1024),
    (64, 1, 2, 64 * 1024),
    (144, 1, 8, 100 * 1024),
    (192, 1, 2, 112 * 1024),
]


def multicast_plans(rows: int, features: int, columns: int) -> list[MulticastPlan]:
    return [
        plan_multicast(
            rows, features, columns, features_per_block=width, copies=copies, split=split, block_bytes=size
        )
        for width, copies, split, size in MULTICAST_PLANS
    ]


@pytest.mark.parametrize(("features", "columns"), SHAPES)
def test_multicast_plans_cover_the_matrix_and_fit(features: int, columns: int) -> None:
    """Oracle: the sizes of the matrix, the rules that multicast.cu states, the hardware's limits."""
    for rows in (17, 24, 32, 33, 64):
        for plan in multicast_plans(rows, features, columns):
            check_multicast(plan, rows, features, columns)


def check_multicast(plan: MulticastPlan, rows: int, features: int, columns: int) -> None:
    shape = plan.launch_shape(dependent=True)
    size = shape.cluster[0] if shape.cluster else 1
    assert size == plan.copies * plan.split <= 8 and shape.grid[0] % size == 0
    width = plan.features_per_block
    assert width <= 256 and width % (16 if width > 128 else 8) == 0
    assert shape.grid[0] // plan.split * width >= features
    assert plan.split * plan.columns_per_block >= columns and plan.columns_per_block % 64 == 0
    assert rows <= plan.tile_rows <= 64 and plan.tile_rows % (8 * plan.copies) == 0
    assert 2 <= plan.weight_stages <= 32 and min(2, plan.columns_per_block // 64) <= plan.row_stages <= 16
    read = (plan.row_stages - 1) * plan.tile_rows + TOKENS  # rows of 128 bytes, by the last wgmma
    assert read * 128 <= plan.shared_bytes <= SHARED_LIMITS[90] - 1024


@pytest.mark.parametrize("rows", [1, 4, 8])
def test_a_block_alone_asks_for_much_of_a_large_weight(rows: int) -> None:
    """Oracle: bytes of W in the ring, 512 for each warp, octet of features and stage; what was measured to be the fastest."""

    def ring(features: int, columns: int) -> tuple[int, int, int]:
        plan = choose_plan(rows, features, columns)
        assert isinstance(plan, StreamPlan) and not plan.held_x and 2 * (plan.least_bytes + 1024) > 228 * 1024
        return plan.blocks, plan.warps, plan.stages * plan.warps * plan.octets * 512 // 1024

    assert ring(12288, 4096) == (128, 8, 176 if rows == 1 else 160)
    assert ring(4096, 4096) == ring(4096, 16384) == (128, 8, 160 if rows == 8 else 176), "one buffer of sums"
    assert ring(2560, 10240) == (128, 16, 144)
    assert ring(2560, 2560) == (107, 16, 120), "24 features of each block, all of their columns"


@pytest.mark.parametrize(
    ("features", "columns", "blocks"),
    [
        (6144, 2048, 256), (8192, 2048, 256), (7680, 2560, 256), (10240, 2560, 256),  # two to a multiprocessor
        (2048, 2048, 128), (2560, 10240, 128), (4096, 4096, 128), (5120, 5120, 128),  # one tile each
        (12288, 4096, 128), (16384, 4096, 128),  # three and four whole tiles
        (15360, 5120, 132), (20480, 5120, 132), (7168, 7168, 132),  # 120, 160 and 56 features: not whole, too many, not whole
    ],
)  # fmt: skip
def test_blocks_have_equally_many_features(features: int, columns: int, blocks: int) -> None:
    """Oracle: divisions by hand, of twice 132 multiprocessors or 132 or up to a twentieth fewer; what was measured."""
    plan = choose_plan(8, features, columns)
    assert isinstance(plan, StreamPlan) and plan.blocks == blocks


def test_ten_warps_take_whole_stages_of_columns() -> None:
    """Oracle: 320 columns a stage of ten warps: 2,560 are eight of them, 2,048 are not; only measured up to 8 rows."""
    plans = [choose_plan(rows, 4 * columns, columns) for rows in (1, 8, 9) for columns in (2560, 2048)]
    assert [getattr(plan, "warps", 0) for plan in plans] == [10, 8, 10, 8, 8, 8]


@pytest.mark.parametrize("rows", [9, 16])
def test_a_block_fits_beside_those_of_the_kernel_before(rows: int) -> None:
    """Oracle: an H200's 228 KB, 1 KB of it reserved for each block. So fc1 starts while a block of the output product runs."""
    before, after = choose_plan(rows, 2048, 2048), choose_plan(rows, 8192, 2048)
    assert isinstance(before, StreamPlan) and isinstance(after, StreamPlan)
    assert before.shared_bytes + after.shared_bytes + 2 * 1024 <= 228 * 1024


@pytest.mark.parametrize("rows", [1, 8, 16])
def test_one_wide_tile_instead_of_two(rows: int) -> None:
    """Oracle: bytes by hand: W and x in the ring; the warps' sums of a tile once where there is one and nothing behind them."""

    def size(per_block: int, columns: int, held: bool) -> tuple[int, int]:
        plan = plan_stream(rows, 264 * per_block, columns, blocks=264, held=held)
        assert plan.held_x == held
        slots = plan.octets + (0 if held else plan.token_tiles)
        return plan.octets, plan.shared_bytes - plan.stages * slots * 8 * 512 - held * rows * 2 * (
            columns + 32
        )

    tile = 8 * rows * 8 * 4  # of 8 warps, for an octet of features
    assert size(39, 2560, False) == (5, 5 * tile)
    assert size(39, 512, True) == (5, 2 * 5 * tile)
    assert size(70, 2560, False) == (5, 2 * 5 * tile), "two tiles of 40, not three of 24"
    assert size(41, 2560, False) == (3, 2 * 3 * tile)


@pytest.mark.parametrize(
    ("rows", "features", "columns", "split", "width", "copies", "stages"),
    [
        (64, 8192, 2048, 2, 64, 1, (6, 8)), (64, 6144, 2048, 2, 64, 1, (6, 8)), (40, 7680, 2560, 2, 64, 1, (9, 8)),
        (64, 2048, 2048, 8, 88, 1, (6, 4)), (64, 2560, 10240, 8, 104, 1, (4, 7)), (64, 16384, 4096, 2, 128, 1, (4, 6)),
        (64, 20480, 5120, 1, 80, 2, (6, 6)), (48, 20480, 5120, 1, 80, 1, (7, 7)),
    ],
)  # fmt: skip
def test_blocks_of_tiles_as_measured(
    rows: int, features: int, columns: int, split: int, width: int, copies: int, stages: tuple[int, int]
) -> None:
    """Oracle: clusters that fit, 132 of two and 25 of eight, divided by hand; stages that fit 112 KB; what was measured."""
    plan = choose_plan(rows, features, columns)
    assert isinstance(plan, MulticastPlan)
    assert (plan.split, plan.features_per_block, plan.copies) == (split, width, copies)
    assert (plan.weight_stages, plan.row_stages) == stages


@pytest.mark.parametrize("rows", [1, 8, 16])
def test_norm_does_not_change_the_plan(rows: int) -> None:
    """Oracle: the plan without a norm; a norm must not cost its layer the better kernel."""
    plain, normed = (choose_plan(rows, 2304, 768, norm=norm) for norm in ("none", "layer"))
    assert plain.launch_shape(True) == normed.launch_shape(True)
    assert plain.entry("float") != normed.entry("float")


def tensors(
    rows: int, features: int, columns: int, dtype: torch.dtype, device: str
) -> dict[str, torch.Tensor]:
    """Random x, weight, bias and residual, the weight scaled so that outputs are of size 1; out full of NaN."""
    generator = torch.Generator().manual_seed(rows * features + columns)

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)

    return {
        "x": random(rows, columns, scale=2.0) + 0.5,
        "weight": random(features, columns, scale=columns**-0.5),
        "bias": random(features),
        "residual": random(rows, features),
        "out": torch.full((rows, features), float("nan"), dtype=dtype, device=device),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"bias": torch.zeros(9, dtype=torch.float16)},
            r"bias is \[9\] float16 on cpu; expected \[out_features=16\]",
        ),
        ({"weight": torch.zeros(16, 24, dtype=torch.bfloat16)}, r"weight is .*; expected .* float16"),
        ({"x": torch.zeros(65, 24, dtype=torch.float16)}, "rows=65 is not in 1 to 64"),
        ({"x": torch.zeros(2, 20, dtype=torch.float16)}, "in_features=20 is not a multiple of 8"),
        ({"x": torch.zeros(2, 24)}, "dtype float32 is not supported; accepted: float16, bfloat16"),
        ({"activation": "swish"}, "activation 'swish' is unknown; accepted: none, relu"),
        ({"norm": Norm(None, "batch")}, "norm 'batch' is unknown"),
        ({"norm": Norm(None)}, "needs weight_sums"),
        ({"residual": torch.zeros(16, 2, dtype=torch.float16).T}, "expected contiguous"),
    ],
)
def test_contract_is_checked_before_anything_runs(change: dict[str, object], message: str) -> None:
    """Oracle: the text; no GPU is touched."""
    arguments = {**tensors(2, 16, 24, torch.float16, "cpu"), **change}
    with pytest.raises(KernelContractError, match=message):
        Linear(KernelLibrary())(**arguments)  # type: ignore[arg-type]


def test_norm_of_many_rows_is_refused() -> None:
    """Oracle: the text."""
    with pytest.raises(KernelContractError, match="a norm is fused for up to 16 rows, not 17"):
        choose_plan(17, 768, 768, norm="layer")


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    return float((out.double() - expected).norm() / expected.norm())


def plans(rows: int, features: int, columns: int) -> list[Plan]:
    """The chosen plan and one of every kernel and way of running it."""
    found = [choose_plan(rows, features, columns)]
    if rows <= 16:
        found += [
            plan_stream(rows, features, columns, blocks=blocks, warps=warps, held=held)
            for blocks, warps, held in ((132, 8, True), (264, 8, False), (5, 12, True))
        ]
        wide = -(-features // 38)  # blocks of one tile of 40 features
        found += [plan_stream(rows, features, columns, blocks=wide, held=held) for held in (True, False)]
    if rows > 8:
        found += [
            plan_warpgroup(rows, features, columns, cluster=cluster, feature_tiles=tiles)
            for cluster, tiles in ((1, 1), (2, 2), (3, 4))
        ]
        found += [
            plan_tile(rows, features, columns, cluster=cluster, feature_tiles=2, warps_down=down)
            for cluster, down in ((1, 4), (4, 8))
        ]
        found += multicast_plans(rows, features, columns)
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", RELATIVE_ERROR, ids=str)
@pytest.mark.parametrize(
    ("rows", "features", "columns"),
    [
        (1, 768, 768),
        (3, 100, 776),
        (8, 3072, 768),
        (13, 1001, 520),
        (16, 256, 4096),
        (17, 1001, 520),
        (33, 1001, 264),
        (48, 300, 3072),
        (64, 520, 1024),
    ],
)
def test_kernels(rows: int, features: int, columns: int, dtype: torch.dtype, library: KernelLibrary) -> None:
    """Oracle: the float64 reference, on poisoned outputs; the second run gives the same bits."""
    linear, given = Linear(library), tensors(rows, features, columns, dtype, "cuda")
    activations = itertools.cycle(("none", "relu", "gelu", "gelu_tanh", "silu"))
    for plan, activation in zip(plans(rows, features, columns), activations, strict=False):
        first = linear(**given, activation=activation, plan=plan).clone()
        given["out"].fill_(float("nan"))
        second = linear(**given, activation=activation, plan=plan)
        inputs = {name: tensor for name, tensor in given.items() if name != "out"}
        assert relative_error(first, reference(**inputs, activation=activation)) < RELATIVE_ERROR[dtype], plan
        assert torch.equal(first, second), plan


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", RELATIVE_ERROR, ids=str)
@pytest.mark.parametrize(("rows", "kind"), [(1, "layer"), (5, "layer"), (16, "layer"), (2, "rms")])
def test_fused_norm(rows: int, kind: str, dtype: torch.dtype, library: KernelLibrary) -> None:
    """Oracle: the float64 reference; x has a mean of ten deviations, which a sum of squares must survive."""
    given = tensors(rows, 1000, 2048, dtype, "cuda")
    given["x"] += 20.0
    norm = Norm(weight_sums(given["weight"]) if kind == "layer" else None, kind)
    expected = reference(given["x"], given["weight"], given["bias"], norm=kind)
    out = Linear(library)(given["x"], given["weight"], given["bias"], out=given["out"], norm=norm)
    assert relative_error(out, expected) < RELATIVE_ERROR[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "sizes",
    [(8, 8, 1, 112), (24, 4, 1, 112), (32, 2, 4, 112), (64, 1, 8, 112), (128, 1, 2, 80), (72, 1, 4, 52)],
    ids=str,
)
def test_multicast_in_a_captured_chain(sizes: tuple[int, int, int, int], library: KernelLibrary) -> None:
    """Oracle: the float64 reference, layer after layer, in place: a kernel that reads x early or ends early differs."""
    width, copies, split, kilobytes = sizes
    plan = plan_multicast(
        64, 768, 768, features_per_block=width, copies=copies, split=split, block_bytes=kilobytes * 1024
    )
    check_chain(library, 64, plan)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [8, 16, 64])
def test_row_does_not_depend_on_the_others(rows: int, library: KernelLibrary) -> None:
    """Oracle: the same row among other rows, bit by bit."""
    linear, given = Linear(library), tensors(rows, 768, 3072, torch.float16, "cuda")
    before = linear(given["x"], given["weight"], out=given["out"]).clone()
    given["x"][1:] = given["x"][1:].flip(0) * 3
    after = linear(given["x"], given["weight"], out=given["out"])
    assert torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 64])
def test_residual_in_place_in_a_captured_chain(rows: int, library: KernelLibrary) -> None:
    """Oracle: the float64 reference, layer after layer. Dependent launches in a graph must wait for each other."""
    check_chain(library, rows, None)


def check_chain(library: KernelLibrary, rows: int, plan: Plan | None) -> None:
    """Twelve products in a graph, every second one adding to its residual in place."""
    linear, given = Linear(library), tensors(rows, 768, 768, torch.float16, "cuda")
    state, hidden = given["residual"].clone(), torch.empty_like(given["out"])

    def layers() -> None:
        for _ in range(6):
            linear(state, given["weight"], given["bias"], out=hidden, activation="relu", plan=plan)
            linear(hidden, given["weight"], out=state, residual=state, plan=plan)

    layers()
    state.copy_(given["residual"])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layers()
    graph.replay()
    expected = given["residual"]
    for _ in range(6):
        middle = reference(expected, given["weight"], given["bias"], activation="relu").half()
        expected = reference(middle, given["weight"], residual=expected).half()
    assert relative_error(state, expected.double()) < 6 * RELATIVE_ERROR[torch.float16]


def test_activations_keep_nan() -> None:
    """Oracle: IEEE: what is undefined stays undefined."""
    for kind in ("none", "relu", "gelu", "gelu_tanh", "silu"):
        assert bool(activate(torch.tensor([float("nan")]), kind).isnan())
