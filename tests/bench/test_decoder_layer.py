"""The benchmark of decoder layers, without a GPU: sizes, plans to try, the search, the command line."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from trtc.bench.kernels import decoder_layer
from trtc.bench.kernels.decoder_layer import Search
from trtc.bench.kernels.decoder_layer_plans import (
    MOVES,
    NAMES,
    SIZES,
    Gpu,
    Layer,
    LayerPlans,
    by_other_kernels,
    candidates,
    choose_plans,
    weight_ring_bytes,
)
from trtc.kernels.linear.multicast_plan import MulticastPlan
from trtc.kernels.linear.plan import StreamPlan, TilePlan, WarpgroupPlan
from trtc.kernels.paged_decode_attention.plan import DecodePlan

from ..kernels.test_linear import check_multicast

GPU = Gpu()
MULTIPROCESSOR_BYTES = 228 * 1024
"""Of shared memory, of which each block takes 1 KiB for the driver."""


def test_bytes_of_a_layer() -> None:
    """Oracle: OPT-2.7B by hand, 12 matrices of 2560 x 2560 and 9 vectors, 8 sequences of 576 keys and values."""
    layer = Layer("2.7B", 8, 576)
    assert layer.weight_bytes == 2 * (12 * 2560 * 2560 + 9 * 2560)
    assert layer.moved_bytes == layer.weight_bytes + 2 * 2 * 8 * 576 * 2560
    assert (layer.heads, layer.head_dim, layer.case) == (32, 80, "layer 2.7B rows 8 x 576")


@pytest.mark.parametrize("rows", [1, 8, 16, 17, 64])
def test_plans_of_a_layer(rows: int) -> None:
    """Oracle: the products of the layer. Norms are part of products of up to 16 rows."""
    for size in SIZES:
        layer = Layer(size, rows, 576)
        plans = choose_plans(layer, GPU)
        for name, one in layer.products.items():
            plan: Any = plans[name]
            assert (plan.rows, plan.features, plan.columns) == (rows, one.features, one.columns)
            assert getattr(plan, "norm", "none") == ("layer" if one.norm and rows <= 16 else "none")
        assert [len(source.entries) for source in plans.sources()] == [1] * 5


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rows", [1, 4, 8, 16, 24, 64])
def test_candidates_are_plans_of_the_same_work_and_fit(size: str, rows: int) -> None:
    """Oracle: the sizes of the work, the hardware's limits, what multicast.cu states. Also of what a product may change to."""
    plans = choose_plans(Layer(size, rows, 576), GPU)
    for name in NAMES:
        plan = plans[name]
        others = by_other_kernels(plan, GPU)
        for start in (plan, *{type(one): one for one in others}.values()):
            found = [one for move in MOVES[type(start)] for one in candidates(start, move, GPU)]
            assert start not in found and {type(one) for one in found} == {type(start)}
            for one in (*found, *others):
                CHECKS[type(one)](one, plan)


@pytest.mark.parametrize(("rows", "capability"), [(8, 90), (24, 90), (64, 90), (8, 80), (64, 80)])
def test_products_are_tried_on_the_other_kernels(rows: int, capability: int) -> None:
    """Oracle: what the kernels state: norms and few rows are for stream.cu, tensor copies and wgmma for Hopper."""
    gpu = Gpu(capability)
    plans = choose_plans(Layer("1.3B", rows, 576), gpu)
    able = {TilePlan} | ({StreamPlan} if rows <= 16 else set())
    able |= {WarpgroupPlan, MulticastPlan} if capability == 90 else set()
    for name in NAMES:
        plan = plans[name]
        others = {type(one) for one in by_other_kernels(plan, gpu)}
        if name == "attention" or (rows <= 16 and name in ("qkv", "fc1")):
            assert not others
        else:
            assert others == able - {type(plan)}


def check_work(one: Any, chosen: Any) -> None:
    assert (one.rows, one.features, one.columns) == (chosen.rows, chosen.features, chosen.columns)
    assert getattr(one, "norm", "none") == getattr(chosen, "norm", "none")


def check_stream(one: StreamPlan, chosen: Any) -> None:
    check_work(one, chosen)
    assert one.blocks <= one.features and 1 <= one.octets <= 5 and one.stages >= 2
    assert 8 * one.token_tiles >= one.rows and 32 * one.warps <= 512
    moments = 8 * one.warps * 8 * one.token_tiles
    assert one.shared_bytes + moments + 1024 <= MULTIPROCESSOR_BYTES
    assert weight_ring_bytes(one) < one.shared_bytes
    if one.least_bytes:  # alone
        assert one.blocks <= 132 and 2 * (one.shared_bytes + 1024) > MULTIPROCESSOR_BYTES


def check_cluster(one: MulticastPlan, chosen: Any) -> None:
    check_work(one, chosen)
    check_multicast(one, chosen.rows, chosen.features, chosen.columns)
    assert (one.split - 1) * one.columns_per_block < one.columns
    assert 2 * (one.shared_bytes + 2048) <= MULTIPROCESSOR_BYTES


def check_tiles(one: WarpgroupPlan | TilePlan, chosen: Any) -> None:
    check_work(one, chosen)
    shape = one.launch_shape(dependent=True)
    assert one.cluster <= 8 and shape.grid[0] % one.cluster == 0
    assert shape.grid[0] // one.cluster * one.features_per_block >= one.features
    assert (one.cluster - 1) * one.columns_per_block < one.columns <= one.cluster * one.columns_per_block
    assert 2 <= one.stages <= 16 and one.shared_bytes + 1024 <= GPU.shared_limit
    if isinstance(one, WarpgroupPlan):
        assert one.features_per_block <= 64 * one.feature_tiles and one.features_per_block % 8 == 0
        assert one.tokens >= one.rows and one.columns_per_block % 64 == 0
    else:
        assert one.features_per_block <= 16 * one.feature_tiles * one.warps_down
        assert one.features_per_block % 4 == 0 and 8 * one.token_tiles >= one.rows
        assert one.columns_per_block % one.stage_columns == 0


def check_attention(one: DecodePlan, chosen: DecodePlan) -> None:
    given = {"warps": one.warps, "stages": one.stages, "splits": one.splits, "cluster": one.cluster}
    assert replace(chosen, **given) == one
    assert one.shared_bytes + 1024 <= 227 * 1024 and one.cluster == (one.splits <= 8)
    assert one.splits == 1 or one.cluster or one.workspace_bytes


CHECKS: dict[type, Callable[[Any, Any], None]] = {
    StreamPlan: check_stream, MulticastPlan: check_cluster, DecodePlan: check_attention,
    WarpgroupPlan: check_tiles, TilePlan: check_tiles,
}  # fmt: skip


@pytest.mark.parametrize("rows", [1, 8, 24, 64])
def test_candidates_differ_in_what_the_move_names(rows: int) -> None:
    """Oracle: the choices of a search, each of which some candidate changes."""
    plans = choose_plans(Layer("1.3B", rows, 576), GPU)
    grid = ("features_per_block", "cluster", "feature_tiles", "stages")
    fields = {
        StreamPlan: ("blocks", "warps", "stages", "held_x", "least_bytes"),
        MulticastPlan: ("features_per_block", "split", "copies", "row_stages"),
        WarpgroupPlan: grid,
        TilePlan: (*grid, "warps_down"),
        DecodePlan: ("warps", "stages", "splits"),
    }
    seen: dict[type, set[str]] = {}
    for start in itertools.chain(
        *((plans[name], *by_other_kernels(plans[name], GPU)[::16]) for name in NAMES)
    ):
        kind = type(start)
        for one in itertools.chain(*(candidates(start, move, GPU) for move in MOVES[kind])):
            changed = (field for field in fields[kind] if getattr(one, field) != getattr(start, field))
            seen.setdefault(kind, set()).update(changed)
    assert seen == {kind: set(fields[kind]) for kind in seen} and {TilePlan, WarpgroupPlan} < set(seen)


class CountedChain:
    """Stands for a GPU: a layer takes 40 us, and more for plans other than those wanted, of qkv only once fc1's is right."""

    def __init__(self, layer: Layer) -> None:
        self.layer, self.library = layer, None
        self.checked: list[LayerPlans] = []
        self.whole: list[LayerPlans] = []

    def us(self, plans: LayerPlans) -> float:
        warps = {name: getattr(plans[name], "warps", 0) for name in ("qkv", "fc1", "fc2")}
        late = 0.5 if warps["fc1"] != 12 or warps["qkv"] != 6 else 0
        return (
            40 + 0.25 * abs(plans.attention.stages - 6) + late + sum(warps[n] != 12 for n in ("fc1", "fc2"))
        )

    def check_kernels(self, plans: LayerPlans) -> float:
        self.checked.append(plans)
        return 0.0

    def check(self, plans: LayerPlans) -> float:
        self.whole.append(plans)
        return 0.0

    def time(self, contenders: Sequence[LayerPlans], replays: int) -> list[list[float]]:
        return [[self.us(plans) + noise for noise in (0.01, 0.0, 1.0)] for plans in contenders]


@pytest.fixture
def chain(monkeypatch: pytest.MonkeyPatch) -> CountedChain:
    monkeypatch.setattr(decoder_layer, "compile_side_by_side", lambda library, sources: list(sources))
    return CountedChain(Layer("2.7B", 8, 576))


def test_search_finds_the_best_plan_of_each_kernel(chain: CountedChain) -> None:
    """Oracle: the times of the stand-in. What changes nothing by itself stays as it was chosen."""
    chosen = choose_plans(chain.layer, GPU)
    found = Search(chain, GPU, chosen, 60).run()  # type: ignore[arg-type]
    assert found.best_us == pytest.approx(40.01) and found.chosen_us == pytest.approx(chain.us(chosen) + 0.01)
    assert found.worth_us.keys() == {"qkv", "attention", "fc1", "fc2"} and found.best.attention.stages == 6
    for name, worth in found.worth_us.items():
        undone = found.best.changed(name, chosen[name])
        assert worth == pytest.approx(chain.us(undone) - 40) and worth > 0
        assert undone in chain.whole
    assert {chosen, found.best} < set(chain.whole)
    assert found.tried == len({chosen, *chain.checked})
    assert "2.7B rows 8" in str(found) and "attention: warps" in str(found)


def test_search_takes_another_kernel_and_its_best_plan(
    chain: CountedChain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the times of the stand-in, which likes a width of multicast.cu for fc2 that only its own moves lead to."""

    def us(plans: LayerPlans) -> float:
        return (
            39 + abs(plans.fc2.features_per_block - 72) / 100 if isinstance(plans.fc2, MulticastPlan) else 40
        )

    monkeypatch.setattr(chain, "us", us)
    chosen = choose_plans(chain.layer, GPU)
    assert 72 not in {getattr(one, "features_per_block", 0) for one in by_other_kernels(chosen.fc2, GPU)}
    found = Search(chain, GPU, chosen, 60).run()  # type: ignore[arg-type]
    assert isinstance(found.best.fc2, MulticastPlan) and found.best.fc2.features_per_block == 72
    assert found.worth_us.keys() == {"fc2"} and "fc2: stream" in str(found) and "-> multicast" in str(found)


def test_search_ends_in_time_and_checks_what_it_times(chain: CountedChain) -> None:
    chosen = choose_plans(chain.layer, GPU)
    found = Search(chain, GPU, chosen, -1).run()  # type: ignore[arg-type]
    assert found.best == chosen and found.tried == 1 and not found.worth_us and not chain.checked


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--rows 65", "argument --rows: '65' is not a number from 1 to 64"),
        ("--rows 0", "argument --rows: '0' is not"),
        ("--tokens 4096", "argument --tokens: '4096' is not a number from 1 to 2048"),
        ("--search soon", "argument --search: 'soon' is not a number of seconds; accepted: more than 0"),
        ("--search nan", "argument --search: 'nan' is not"),
        ("--sizes 350M", "argument --sizes: invalid choice: '350M'"),
        ("--row", "--row"),
    ],
)
def test_errors_are_one_line(
    words: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["decoder_layer", *words.split()])
    with pytest.raises(SystemExit) as ended:
        decoder_layer.main()
    text = capsys.readouterr().err
    assert ended.value.code == 2 and message in text and text.count("\n") == 1


def test_without_a_gpu_it_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def library() -> SimpleNamespace:
        raise decoder_layer.DeviceError("no usable CUDA GPU on this machine; running kernels needs one")

    monkeypatch.setattr(decoder_layer, "KernelLibrary", library)
    monkeypatch.setattr(sys, "argv", ["decoder_layer"])
    with pytest.raises(SystemExit):
        decoder_layer.main()
    assert capsys.readouterr().err == (
        "decoder_layer: error: no usable CUDA GPU on this machine; running kernels needs one\n"
    )
