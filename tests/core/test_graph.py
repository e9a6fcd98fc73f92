"""The graph: rules of `verify`, text form, JSON form, hash, cost, and the builder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trtc.core.dtypes import DType
from trtc.core.errors import GraphError, ShapeError
from trtc.core.graph import GRAPH_INPUTS, Graph, GraphBuilder, Node, make_node
from trtc.core.ops import Cost, Op, op_names, registry
from trtc.core.ops.elementwise import ACTIVATIONS
from trtc.core.spec import TensorSpec, normal_axis
from trtc.tests.toy_decoder import toy_decoder, weight_rows


def spec(*shape: int | str, dtype: DType = DType.FLOAT32) -> TensorSpec:
    return TensorSpec(dtype, shape)


def source(name: str, *shape: int | str, op: str = "input", dtype: DType = DType.FLOAT32) -> Node:
    return Node(name, op, (), {"dtype": dtype.value, "shape": shape}, (spec(*shape, dtype=dtype),))


X, W, V = source("x", "T", 8), source("w", 4, 8, op="weight"), source("v", 8, op="weight")
Y = Node("y", "linear", ("x", "w"), {}, (spec("T", 4),))
Z = Node("z", "split", ("y",), {"axis": 1, "sizes": (1, 3)}, (spec("T", 1), spec("T", 3)))


# ---- verify ------------------------------------------------------------------------------------------


def test_a_sound_graph_is_returned() -> None:
    graph = Graph((X, W, Y, Z), ("z:0", "z:1"))
    assert graph.verify() is graph
    assert toy_decoder().verify("toy", op_names()) is not None


@pytest.mark.parametrize(
    ("nodes", "outputs", "message"),
    [
        ((X, W, Y, X), ("y",), "input 'x': %x is defined twice"),
        ((X, Y, W), ("y",), "linear 'y': input %w is not defined before it is used"),
        ((X, W), ("y",), "output %y is not defined"),
        ((X, W, Y, Z), ("z",), "output %z is not defined"),
        ((X, dataclasses.replace(X, name="a", op="frobnicate")), ("x",), "op 'frobnicate' is not registered; known"),
        (
            (X, W, dataclasses.replace(Y, outputs=(spec("T", 5),))),
            ("y",),
            "linear 'y': outputs are ['float32[T, 5]'], not ['float32[T, 4]']",
        ),
        ((X, W, dataclasses.replace(Y, outputs=())), ("x",), "linear 'y': outputs are [], not ['float32[T, 4]']"),
        ((X, W, Y, dataclasses.replace(Z, attrs={"axis": 1})), ("y",), "split 'z': attribute 'sizes' is missing"),
        ((X, V, dataclasses.replace(Y, inputs=("x", "v"))), ("y",), "weight float32[8] is not [out_features"),
        ((X, W, dataclasses.replace(Y, inputs=("x",))), ("y",), "linear 'y': input 1 is missing"),
    ],
)  # fmt: skip
def test_every_broken_rule_is_named(nodes: tuple[Node, ...], outputs: tuple[str, ...], message: str) -> None:
    with pytest.raises(GraphError) as error:
        Graph(nodes, outputs).verify("after pass 'p'")
    assert message in str(error.value)


def test_the_stage_is_named() -> None:
    with pytest.raises(GraphError, match=r"^after pass 'p': input 'x': %x is defined twice$"):
        Graph((X, X), ("x",)).verify("after pass 'p'")


def test_ops_that_are_not_allowed_are_named() -> None:
    allowed = frozenset({"input", "weight", "linear"})
    Graph((X, W, Y), ("y",)).verify("lowering", allowed)
    with pytest.raises(
        GraphError, match=r"^lowering: split 'z': op is not allowed here; allowed: input, linear, weight$"
    ):
        Graph((X, W, Y, Z), ("y",)).verify("lowering", allowed)


@pytest.mark.parametrize(
    ("slots", "sound"), [((0, 1), True), ((1, 0), True), ((0, 0), False), ((0, 2), False), ((1,), False)]
)
def test_attention_slots_are_each_used_once(slots: tuple[int, ...], sound: bool) -> None:
    q = source("q", "T", 2, 4)
    tables = [
        source(name, *GRAPH_INPUTS[name].shape, dtype=DType.INT32)
        for name in ("query_start", "kv_length", "page_table")
    ]
    inputs = ("q", "q", "q", "query_start", "kv_length", "page_table")
    layers = [
        Node(f"a{i}", "attention", inputs, {"layer": s, "scale": 1.0}, q.outputs) for i, s in enumerate(slots)
    ]
    graph = Graph((q, *tables, *layers), ("a0",))
    if sound:
        assert graph.verify().num_cache_layers == len(slots)
    else:
        with pytest.raises(GraphError, match=r"attention slots are \[.*\], not each of 0\.\."):
            graph.verify()


# ---- immutability, text, JSON, hash ------------------------------------------------------------------


def test_nodes_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Y.name = "other"  # type: ignore[misc]
    with pytest.raises(TypeError):
        Z.attrs["axis"] = 0  # type: ignore[index]
    sizes = [1, 3]
    node = dataclasses.replace(Z, attrs={"axis": 1, "sizes": sizes})
    sizes.append(4)
    assert node == Z


def test_the_text_form() -> None:
    """Oracle: written by hand. One node a line; dtype and shape of sources are not said twice; `_` stands for None."""
    shard = dataclasses.replace(W, attrs={**W.attrs, "shard": "column"})
    normed = Node("n", "layer_norm", ("y", None, "b"), {"eps": 1e-05}, (spec("T", 4),))
    graph = Graph((X, shard, source("b", 4, op="weight"), Y, normed, Z), ("z:0", "n")).verify()
    assert str(graph) == "\n".join(
        [
            "%x: float32[T, 8] = input()",
            "%w: float32[4, 8] = weight() {shard='column'}",
            "%b: float32[4] = weight()",
            "%y: float32[T, 4] = linear(%x, %w)",
            "%n: float32[T, 4] = layer_norm(%y, _, %b) {eps=1e-05}",
            "%z: float32[T, 1], float32[T, 3] = split(%y) {axis=1, sizes=(1, 3)}",
            "return %z:0, %n",
        ]
    )


def test_the_json_form_is_plain_json() -> None:
    graph = Graph((X, W, Y, Z), ("z:0", "z:1"))
    text = json.dumps(graph.to_json())
    again = Graph.from_json(json.loads(text)).verify()
    assert again == graph
    assert json.dumps(again.to_json()) == text


def test_the_hash_is_of_the_json_form_and_sees_every_change() -> None:
    """Oracle: sha256 of the canonical text, made here; so equal in every process."""
    graph = Graph((X, W, Y, Z), ("z:0",))
    text = json.dumps(graph.to_json(), sort_keys=True, separators=(",", ":"))
    assert graph.hash == hashlib.sha256(text.encode()).hexdigest()
    in_another_process = "d6e8f264738eb3ad7c4f652dace27fc3a9a44cccbd72c1b25002be778412ce5f"
    assert graph.hash == in_another_process
    other_order = dataclasses.replace(Z, attrs=dict(reversed(list(Z.attrs.items()))))
    assert Graph((X, W, Y, other_order), ("z:0",)).hash == graph.hash
    changed = [
        Graph((X, W, Y, Z), ("z:1",)),
        Graph((W, X, Y, Z), ("z:0",)),
        Graph((X, W, dataclasses.replace(Y, attrs={"activation": "relu"}), Z), ("z:0",)),
        Graph((X, W, dataclasses.replace(Y, inputs=("x", "w", None)), Z), ("z:0",)),
    ]
    assert len({graph.hash, *(one.hash for one in changed)}) == 5


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        {},
        {"nodes": []},
        {"nodes": {}, "outputs": 3},
        {"nodes": [1], "outputs": []},
        {"nodes": [{"name": "x"}], "outputs": []},
        {"nodes": [{"name": "x", "op": "input", "outputs": [["float31", [1]]]}], "outputs": []},
        {"nodes": [{"name": "x", "op": "input", "outputs": [["float32"]]}], "outputs": []},
    ],
)
def test_json_that_is_no_graph_is_refused(data: Any) -> None:
    with pytest.raises(GraphError, match=r"^not the JSON form of a graph: "):
        Graph.from_json(data)


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """Graphs of element-wise and structural ops over two matrices."""
    nodes: list[Node] = [source("x", "T", 6), source("w", 6, 6, op="weight")]
    specs = {node.name: node.outputs[0] for node in nodes}
    for i in range(draw(st.integers(0, 8))):
        x = draw(st.sampled_from([name for name in specs if specs[name].shape[0] == "T"]))
        width = specs[x].shape[1]
        assert isinstance(width, int)
        choices: list[tuple[str, tuple[str, ...], dict[str, Any]]] = [
            ("activation", (x,), {"kind": draw(st.sampled_from(sorted(ACTIVATIONS)))}),
            ("layer_norm", (x,), {"eps": draw(st.floats(1e-12, 1e-3))}),
            ("mul", (x, x), {}),
            ("add_rms_norm", (x, x), {"eps": 1e-6}),
            ("concat", (x, x), {"axis": draw(st.sampled_from([1, -1]))}),
        ]
        if width == 6:
            choices.append(("linear", (x, "w"), {}))
        if width > 1:
            cut = draw(st.integers(1, width - 1))
            choices += [
                ("split", (x,), {"axis": 1, "sizes": (cut, width - cut)}),
                ("slice", (x,), {"axis": 1, "start": 0, "stop": cut}),
            ]
        op, inputs, attrs = draw(st.sampled_from(choices))
        node = make_node(f"n{i}", op, inputs, attrs, specs)
        nodes.append(node)
        specs |= dict(zip(node.tensors, node.outputs, strict=True))
    outputs = draw(st.lists(st.sampled_from(sorted(specs)), min_size=1, max_size=3))
    return Graph(tuple(nodes), tuple(outputs))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(graphs())
def test_any_graph_survives_json(graph: Graph) -> None:
    """Through text, with floats of every size: equal graph, hash and print, and still sound."""
    again = Graph.from_json(json.loads(json.dumps(graph.verify().to_json()))).verify()
    assert again == graph
    assert (again.hash, str(again)) == (graph.hash, str(graph))


# ---- views -------------------------------------------------------------------------------------------


def test_producers_and_users() -> None:
    total = Node("s", "add", ("y", "y"), {}, (spec("T", 4),))
    graph = Graph((X, W, V, Y, total, Z), ("s",)).verify()
    assert graph.producers["z:1"] is Z and graph.producers["y"] is Y
    assert graph.users["y"] == (total, Z)
    assert graph.users["s"] == () and graph.users["v"] == ()
    assert graph.inputs == (X,) and graph.weights == (W, V)
    assert graph.specs["z:0"] == spec("T", 1)


def test_cost_adds_up_over_nodes() -> None:
    """Oracle: by hand, for 3 tokens: 2*3*4*8 multiply-adds of the product, one read of x and w, one write of y."""
    graph = Graph((X, W, Y), ("y",))
    assert graph.cost({"T": 3}) == Cost(2 * 3 * 4 * 8, 4 * (3 * 8 + 4 * 8 + 3 * 4))


def test_cost_of_a_decoder_is_about_two_flops_per_weight_and_token() -> None:
    graph = toy_decoder()
    sizes = {"T": 5, "B": 1, "B+1": 2, "P": 1, "R": 5, "C": 0}
    matrices = sum(
        n.outputs[0].numel() for n in graph.weights if n.outputs[0].rank == 2 and n.name != "embed.weight"
    )
    assert 1 < graph.cost(sizes).flops / (2 * 5 * matrices) < 1.15


def test_specs() -> None:
    assert spec("T", 8).nbytes({"T": 3}) == 96
    with pytest.raises(KeyError):
        spec("T", 8).numel()
    assert str(spec("B", "P", dtype=DType.INT32)) == "int32[B, P]"
    assert [normal_axis(axis, 3) for axis in (0, 2, -1, -3)] == [0, 2, 2, 0]


# ---- builder -----------------------------------------------------------------------------------------


def builder() -> GraphBuilder:
    return GraphBuilder(DType.FLOAT16, weight_rows(a__w=(4, 8), a__b=(4,), table=(9, 8)))


def test_the_builder_has_the_inputs_of_every_step() -> None:
    g = builder()
    x = g.add("embedding", "token_ids", g.weight("table"), name="x", offset=0)
    with g.scope("a"):
        y = g.add("linear", x, g.weight("w"), g.optional_weight("b"), name="y")
        assert g.optional_weight("none") is None
        assert y == "a.y" and g.full_name("z") == "a.z"
    graph = g.finish(y)
    assert {node.name: node.outputs[0] for node in graph.inputs} == GRAPH_INPUTS
    assert graph.specs["a.w"] == spec(4, 8, dtype=DType.FLOAT16)
    assert g.shape(y) == ("T", 4)


def test_the_builder_refuses_what_does_not_fit() -> None:
    g = builder()
    x = g.add("embedding", "token_ids", g.weight("table"), name="x", offset=0)
    with pytest.raises(GraphError, match=r"weight 'fc.weight' is not in the family's weight table"):
        g.weight("fc.weight")
    with pytest.raises(GraphError, match="activation 'x': the name is taken"):
        g.add("activation", x, name="x", kind="relu")
    with pytest.raises(
        ShapeError, match=r"linear 'y': weight float16\[4\] is not \[out_features, in_features\]"
    ):
        g.add("linear", x, g.weight("a.b"), name="y")
    with pytest.raises(GraphError, match="mul 'm': input %nothing is not defined"):
        g.add("mul", x, "nothing", name="m")
    with pytest.raises(GraphError, match="layer_norm 'n': attribute 'epsilon' is not known; accepted: eps"):
        g.add("layer_norm", x, name="n", eps=1.0, epsilon=1e-5)
    with pytest.raises(GraphError, match=r"split 's' has 2 outputs; add_many returns them all"):
        g.add("split", x, name="s", axis=1, sizes=(4, 4))
    with pytest.raises(GraphError, match=r"split 't': attribute sizes is 4; accepted: sizes of at least 0"):
        g.add("split", x, name="t", axis=1, sizes=4)
    with pytest.raises(
        GraphError, match=r"layer_norm 'n': attribute eps is tensor\(1\); accepted: finite numbers"
    ):
        g.add("layer_norm", x, name="n", eps=torch.tensor(1))
    with pytest.raises(GraphError, match=r"rows that the composition never uses: a.w"):
        g.finish(x)


def test_a_shape_rule_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a plugin's op may."""
    monkeypatch.setitem(
        registry._OPS, "odd", Op("odd", lambda sig: sig.attrs["y"], lambda context, attrs, x: x)
    )
    with pytest.raises(
        GraphError, match=r"odd 'o': the op's shape rule raised KeyError: 'y'; attributes: axis=1, sizes=4"
    ):
        builder().add("odd", "positions", name="o", axis=1, sizes=4)


@pytest.mark.parametrize("value", [float("inf"), (1, float("nan"))])
def test_an_attribute_that_json_does_not_have_is_refused(value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a plugin's op, which may not look: engine.json would hold it, and be refused when it is opened."""
    odd = Op("odd", lambda sig: (sig[0],), lambda context, attrs, x: x)
    monkeypatch.setitem(registry._OPS, "odd", odd)
    with pytest.raises(GraphError, match=r"odd 'o': attribute cap is .*; accepted: finite numbers"):
        builder().add("odd", "positions", name="o", cap=value)


def test_a_shape_rule_that_gives_no_types_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a plugin's op may."""
    monkeypatch.setitem(registry._OPS, "odd", Op("odd", lambda sig: sig[0], lambda context, attrs, x: x))  # type: ignore[arg-type,return-value]
    g = builder()
    with pytest.raises(
        GraphError, match=r"odd 'o': the op's shape rule gave TensorSpec.*, not a tuple of TensorSpec"
    ):
        g.add("odd", "positions", name="o")
