"""Passes. Oracle of every rewrite: the interpreter in float64 gives the same value before and after."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

import pytest
import torch
from trtc.core.dtypes import DType
from trtc.core.errors import BuildError, ConfigError, GraphError
from trtc.core.graph import Graph, GraphBuilder, Node
from trtc.core.interpreter import interpret
from trtc.core.ops import ReferenceContext, op_names
from trtc.core.passes import Partition, fold, fuse, optimize, rows, share_tied_weights, simplify
from trtc.core.passes.fold import partition
from trtc.core.passes.rewrite import Rewrite, Rule, in_order, remove_dead, rewrite
from trtc.core.passes.shard import shard
from trtc.core.sharding import Shard, ShardingOptions
from trtc.core.weights import IDENTITY, ResolvedWeight
from trtc.tests.opt_models import VARIANTS, OptCheckpoint
from trtc.tests.packed_steps import Inputs, PagedSequences, filled_cache
from trtc.tests.thread_group import RankCommunicator, run_ranks
from trtc.tests.tolerances import FLOAT64_ABS, max_error
from trtc.tests.toy_decoder import random_weights, toy_decoder, weight_rows

PAGE_SIZE, NUM_PAGES = 16, 12
Weights = Mapping[str, torch.Tensor]


def evaluate(graph: Graph, weights: Weights, inputs: Inputs, communicator: Any = None) -> torch.Tensor:
    """The graph's output in float64, on a fresh cache."""
    context = ReferenceContext(filled_cache(graph, PAGE_SIZE, NUM_PAGES, torch.float64), communicator)
    result: torch.Tensor = interpret(graph, {**weights, **inputs}, context)
    assert result.dtype == torch.float64
    return result


def two_prompts(vocab_size: int) -> Inputs:
    """Two sequences of 5 and 18 tokens; the logits of three of their rows."""
    generator = torch.Generator().manual_seed(7)
    a, b = (torch.randint(vocab_size, (size,), generator=generator).tolist() for size in (5, 18))
    inputs = PagedSequences(PAGE_SIZE, NUM_PAGES).step({"a": a, "b": b})
    return inputs | {"logits_index": torch.tensor([4, 9, 22], dtype=torch.int32)}


def ops_of(graph: Graph) -> list[str]:
    return [node.op for node in graph.nodes if node.op not in ("input", "weight")]


def check(before: Graph, *rules: Rule, communicator: Any = None) -> Graph:
    """`before` rewritten; it verifies and has the value it had."""
    after = rewrite(before, rules).verify()
    given = random_weights(before), two_prompts(11), communicator
    assert max_error(evaluate(after, *given), evaluate(before, *given)) <= FLOAT64_ABS
    return after


class ThreeTimesAsMuch:
    """The other ranks have twice what this one has."""

    def all_reduce(self, x: torch.Tensor, *, overwrite: bool = False) -> torch.Tensor:
        return 3 * x


def unchanged(before: Graph, *rules: Rule) -> bool:
    return rewrite(before, rules) == before


def small(**shapes: tuple[int, ...]) -> tuple[GraphBuilder, str]:
    """A builder with these weights, and x: [T, 8]."""
    g = GraphBuilder(DType.FLOAT32, weight_rows(table=(11, 8), **shapes))
    return g, g.add("embedding", "token_ids", g.weight("table"), name="x", offset=0)


def linear(g: GraphBuilder, x: str, name: str, *, bias: bool = False, **attrs: Any) -> str:
    inputs = [x, g.weight(f"{name}_w"), *([g.weight(f"{name}_b")] if bias else [])]
    return g.add("linear", *inputs, name=name, **attrs)


def _activation(kind: str, present: bool) -> dict[str, Any]:
    return {"activation": kind} if present else {}


# ---- simplify ------------------------------------------------------------------------------------


def test_an_op_that_changes_nothing_goes() -> None:
    g, x = small()
    x = g.add("cast", x, name="cast", dtype="float32")
    x = g.add("reshape", x, name="reshape", shape=("T", 8))
    x = g.add("slice", x, name="slice", axis=1, start=0, stop=8)
    assert ops_of(check(g.finish(x), simplify.same_type)) == ["embedding"]


def test_an_op_that_changes_the_type_stays() -> None:
    g, x = small()
    x = g.add("slice", x, name="slice", axis=1, start=0, stop=6)
    x = g.add("reshape", x, name="reshape", shape=("T", 2, 3))
    assert unchanged(g.finish(g.add("cast", x, name="cast", dtype="float16")), simplify.same_type)


def test_a_reshape_of_a_reshape_is_one() -> None:
    g, x = small()
    heads = g.add("reshape", x, name="heads", shape=("T", 2, 4))
    after = check(
        g.finish(g.add("reshape", heads, name="pairs", shape=("T", 4, 2))), simplify.reshape_of_reshape
    )
    assert ops_of(after) == ["embedding", "reshape"]


def test_a_reshape_of_something_else_stays() -> None:
    g, x = small()
    act = g.add("activation", x, name="act", kind="relu")
    assert unchanged(
        g.finish(g.add("reshape", act, name="r", shape=("T", 2, 4))), simplify.reshape_of_reshape
    )


# ---- rows ----------------------------------------------------------------------------------------


def test_rows_are_selected_before_row_wise_ops() -> None:
    """Also through a sum of which one part has other readers, and past weights and vectors."""
    g, x = small(n_w=(8,), n_b=(8,), up_w=(16, 8), up_b=(16,), scale=(16,))
    normed = g.add("layer_norm", x, g.weight("n_w"), g.weight("n_b"), name="n", eps=1e-5)
    total = g.add("add", x, normed, name="sum")
    up = g.add("mul", linear(g, total, "up", bias=True), g.weight("scale"), name="scaled")
    out = g.add("select_rows", g.add("activation", up, name="act", kind="gelu"), "logits_index", name="rows")
    after = check(g.finish(out), *rows.RULES)
    assert ops_of(after) == ["embedding", "select_rows", "layer_norm", "add", "linear", "mul", "activation"]


def test_rows_are_not_selected_before_ops_that_mix_rows() -> None:
    g, x = small()
    reshaped = g.add("reshape", x, name="heads", shape=("T", 2, 4))
    out = g.add("select_rows", reshaped, "logits_index", name="rows")
    assert unchanged(g.finish(out), rows.select_before)


def test_rows_are_not_selected_before_an_op_with_other_readers() -> None:
    g, x = small(a_w=(8, 8))
    y = linear(g, x, "a")
    picked = g.add("select_rows", y, "logits_index", name="rows")
    graph = g.finish(picked)
    assert not unchanged(graph, rows.select_before)
    assert unchanged(Graph(graph.nodes, (picked, y)), rows.select_before)


def test_rows_of_a_weight_are_never_selected() -> None:
    """A head whose weight is computed (a transpose here) is a weight all the same."""
    g, x = small(head=(8, 5))
    weight = g.add("transpose", g.weight("head"), name="head.t")
    out = g.add("select_rows", g.add("linear", x, weight, name="logits"), "logits_index", name="rows")
    after = check(g.finish(out), rows.select_before)
    assert ops_of(after) == ["embedding", "transpose", "select_rows", "linear"]


def test_rows_selected_twice_are_selected_once() -> None:
    g, x = small()
    first, second = (g.add("select_rows", x, "logits_index", name=name) for name in ("one", "two"))
    assert ops_of(check(g.finish(g.add("mul", first, second, name="square")), rows.same_rows)) == [
        "embedding", "select_rows", "mul"]  # fmt: skip


def test_other_rows_are_selected_on_their_own() -> None:
    g, x = small(table2=(11, 8))
    y = g.add("embedding", "token_ids", g.weight("table2"), name="y", offset=0)
    first, second = (g.add("select_rows", t, "logits_index", name=f"{t}.rows") for t in (x, y))
    assert unchanged(g.finish(g.add("mul", first, second, name="product")), rows.same_rows)


# ---- fold ----------------------------------------------------------------------------------------


def test_a_projection_goes_into_the_table() -> None:
    g, x = small(p_w=(6, 8))
    after = check(g.finish(linear(g, x, "p")), *fold.RULES)
    assert ops_of(after) == ["linear", "embedding"]
    parts = partition(after)
    assert ops_of(parts.graph) == ["embedding"]
    assert list(parts.recipes) == ["x.projected"]


@pytest.mark.parametrize("case", ["bias", "activation", "other reader", "computed weight"])
def test_a_projection_that_is_more_than_one_stays(case: str) -> None:
    g, x = small(p_w=(8, 8), p_b=(8,)) if case == "bias" else small(p_w=(8, 8))
    if case == "computed weight":
        y = g.add("linear", x, g.add("transpose", g.weight("p_w"), name="t"), name="p")
    else:
        attrs: dict[str, Any] = {"activation": "relu"} if case == "activation" else {}
        y = linear(g, x, "p", bias=case == "bias", **attrs)
    if case == "other reader":
        y = g.add("add", x, y, name="sum")
    assert unchanged(g.finish(y), *fold.RULES)


def test_partition_moves_ops_on_weights_to_the_build() -> None:
    """Oracle: the whole graph in one run. Of a chain of such ops only the last is stored; ops on tensors stay."""
    g, x = small(a_w=(8, 8), b_w=(8, 8))
    weight = g.add(
        "transpose", g.add("concat", g.weight("a_w"), g.weight("b_w"), name="ab", axis=1), name="t"
    )
    weight = g.add("slice", weight, name="half", axis=0, start=4, stop=12)
    graph = g.finish(g.add("linear", x, weight, name="y"))
    parts = partition(graph)
    parts.graph.verify()
    assert list(parts.recipes) == ["half"]
    assert [node.name for node in parts.graph.weights] == ["table", "half"]
    weights, inputs = random_weights(graph), two_prompts(11)
    stored = {"table": weights["table"], "half": interpret(parts.recipes["half"], weights)}
    assert max_error(evaluate(parts.graph, stored, inputs), evaluate(graph, weights, inputs)) == 0


def test_partition_of_a_graph_without_ops_on_weights_changes_nothing() -> None:
    g, x = small(a_w=(8, 8))
    graph = g.finish(linear(g, x, "a"))
    assert partition(graph) == Partition(graph, {})


# ---- fuse ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_linear_siblings_become_one_product(bias: bool) -> None:
    shapes: dict[str, tuple[int, ...]] = {"q_w": (8, 8), "k_w": (4, 8), "v_w": (4, 8)}
    g, x = small(**shapes, **({"q_b": (8,), "k_b": (4,), "v_b": (4,)} if bias else {}))
    q, k, v = (linear(g, x, name, bias=bias) for name in "qkv")
    both = g.add("concat", k, v, name="kv", axis=1)
    after = check(g.finish(g.add("mul", q, both, name="product")), fuse.linear_siblings)
    assert ops_of(after) == [
        "embedding",
        "concat",
        *(["concat"] if bias else []),
        "linear",
        "split",
        "concat",
        "mul",
    ]
    assert after.producers["qkv"].op == "linear"


@pytest.mark.parametrize("case", ["other input", "one without bias", "one with activation", "alone"])
def test_linears_that_are_no_siblings_stay(case: str) -> None:
    shapes: dict[str, tuple[int, ...]] = {"a_w": (8, 8), "b_w": (8, 8)}
    g, x = small(**shapes, **({"a_b": (8,)} if case == "one without bias" else {}))
    first = linear(g, x, "a", bias=case == "one without bias")
    other = g.add("activation", x, name="act", kind="relu") if case == "other input" else x
    other = first if case == "alone" else other
    second = linear(g, other, "b", **_activation("relu", case == "one with activation"))
    assert unchanged(g.finish(g.add("mul", first, second, name="product")), fuse.linear_siblings)


def test_an_activation_goes_into_the_linear_before_it() -> None:
    g, x = small(a_w=(8, 8), a_b=(8,))
    out = g.add("activation", linear(g, x, "a", bias=True), name="act", kind="gelu_tanh")
    after = check(g.finish(out), fuse.linear_activation)
    assert ops_of(after) == ["embedding", "linear"]
    assert after.producers["a"].attrs == {"activation": "gelu_tanh"}


@pytest.mark.parametrize("case", ["other reader", "two activations", "no linear"])
def test_an_activation_stays_where_the_linear_alone_is_needed(case: str) -> None:
    g, x = small() if case == "no linear" else small(a_w=(8, 8))
    if case == "no linear":
        out = g.add("activation", x, name="act", kind="relu")
    else:
        y = linear(g, x, "a", **_activation("silu", case == "two activations"))
        out = g.add("activation", y, name="act", kind="relu")
        out = g.add("add", y, out, name="sum") if case == "other reader" else out
    assert unchanged(g.finish(out), fuse.linear_activation)


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_a_norm_takes_the_sum_before_it_along(norm: str) -> None:
    """Other readers of the sum, another norm among them, get it from the fused op."""
    g, x = small(t2=(11, 8), n_w=(8,), m_w=(8,))
    y = g.add("embedding", "token_ids", g.weight("t2"), name="y", offset=0)
    total = g.add("add", x, y, name="sum")
    first = g.add(norm, total, g.weight("n_w"), name="n", eps=1e-5)
    second = g.add(norm, total, g.weight("m_w"), name="m", eps=1e-5)
    out = g.add("add", g.add("mul", first, second, name="product"), total, name="out")
    after = check(g.finish(out), fuse.add_norm)
    assert ops_of(after) == ["embedding", "embedding", f"add_{norm}", norm, "mul", "add"]


def test_a_norm_of_no_sum_or_of_a_sum_with_a_vector_stays() -> None:
    g, x = small(vector=(8,))
    assert unchanged(g.finish(g.add("layer_norm", g.add("add", x, g.weight("vector"), name="sum"), name="n", eps=1e-5)),
                     fuse.add_norm)  # fmt: skip
    g, x = small()
    assert unchanged(g.finish(g.add("layer_norm", x, name="n", eps=1e-5)), fuse.add_norm)


@pytest.mark.parametrize("affine", [False, True], ids=["bare", "scale and shift"])
@pytest.mark.parametrize("adds", ["no", "x", "residual"])
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_a_sum_over_ranks_takes_the_norm_after_it_along(norm: str, adds: str, affine: bool) -> None:
    """The sum is either input of an add_norm; other readers get it from the fused op, with what was added."""
    g, x = small(**({"n_w": (8,), "n_b": (8,)} if affine else {}))
    total = g.add("all_reduce", x, name="sum", tp_size=2)
    weights = [g.weight("n_w"), g.weight("n_b")] if affine else []
    if adds == "no":
        stream, normed = total, g.add(norm, total, *weights, name="n", eps=1e-5)
    else:
        inputs = (total, x) if adds == "x" else (x, total)
        stream, normed = g.add_many(f"add_{norm}", *inputs, *weights, name="n", eps=1e-5)
    graph = g.finish(g.add("mul", stream, normed, name="out"))
    after = check(graph, fuse.all_reduce_norm, communicator=ThreeTimesAsMuch())
    assert ops_of(after) == ["embedding", "all_reduce_norm", "mul"]
    (node,) = (node for node in after.nodes if node.op == "all_reduce_norm")
    given = [x, *([None] if adds == "no" and affine else [] if adds == "no" else [x]), *weights]
    assert node.inputs == tuple(given)
    assert node.attrs == {"tp_size": 2, "norm": norm.removesuffix("_norm"), "eps": 1e-5}


def test_a_sum_over_ranks_that_is_read_before_something_is_added_stays() -> None:
    g, x = small()
    total = g.add("all_reduce", x, name="sum", tp_size=2)
    stream, normed = g.add_many("add_layer_norm", x, total, name="n", eps=1e-5)
    out = g.add("add", g.add("mul", stream, normed, name="product"), total, name="out")
    assert unchanged(g.finish(out), fuse.all_reduce_norm)
    g, x = small()
    assert unchanged(g.finish(g.add("layer_norm", x, name="n", eps=1e-5)), fuse.all_reduce_norm)


@pytest.mark.parametrize("activation", [{}, {"activation": "gelu"}], ids=["plain", "with activation"])
@pytest.mark.parametrize("first", [True, False], ids=["residual first", "residual second"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_takes_the_residual_added_to_it(bias: bool, first: bool, activation: dict[str, Any]) -> None:
    g, x = small(a_w=(8, 8), **({"a_b": (8,)} if bias else {}))
    y = linear(g, x, "a", bias=bias, **activation)
    after = check(g.finish(g.add("add", *((x, y) if first else (y, x)), name="sum")), fuse.linear_residual)
    assert ops_of(after) == ["embedding", "linear"]


@pytest.mark.parametrize("case", ["other reader", "vector", "second sum"])
def test_a_sum_stays_where_the_linear_cannot_take_it(case: str) -> None:
    g, x = small(a_w=(8, 8), **({"v": (8,)} if case == "vector" else {}))
    y = linear(g, x, "a")
    total = g.add("add", y, g.weight("v") if case == "vector" else x, name="sum")
    if case == "other reader":
        assert unchanged(g.finish(g.add("mul", total, y, name="product")), fuse.linear_residual)
    elif case == "vector":
        assert unchanged(g.finish(total), fuse.linear_residual)
    else:
        again = g.add("add", total, x, name="again")
        assert ops_of(check(g.finish(again), fuse.linear_residual)) == ["embedding", "linear", "add"]


def test_positions_go_into_the_lookup_of_tokens() -> None:
    g, x = small(p=(30, 8))
    positions = g.add("embedding", "positions", g.weight("p"), name="positions_embedded", offset=2)
    after = check(g.finish(g.add("add", x, positions, name="sum")), fuse.embedding_positions)
    assert ops_of(after) == ["embedding"]


@pytest.mark.parametrize("case", ["other reader", "no lookup", "masked positions"])
def test_positions_stay_where_the_lookups_are_needed_apart(case: str) -> None:
    g, x = small(p=(30, 8))
    attrs: dict[str, Any] = {"masked": True} if case == "masked positions" else {}
    y = g.add("embedding", "positions", g.weight("p"), name="y", offset=2, **attrs)
    if case == "no lookup":
        y = g.add("activation", y, name="act", kind="relu")
    out = g.add("add", x, y, name="sum")
    if case == "other reader":
        out = g.add("mul", out, x, name="product")
    assert unchanged(g.finish(out), fuse.embedding_positions)


def norm_and_linear(norm: str, extra: str, weights: tuple[str, ...] = ()) -> Graph:
    """linear(norm(x)), with what `extra` names besides the product, and the norm's own `weights`."""
    vectors: dict[str, tuple[int, ...]] = dict.fromkeys(weights, (8,))
    g, x = small(a_w=(8, 8), **({"a_b": (8,)} if "bias" in extra else {}), **vectors)
    normed = g.add(
        norm, x, *(g.optional_weight(name) for name in ("scale", "shift")), name="normed", eps=1e-3
    )
    bias = g.optional_weight("a_b")
    residual = x if "residual" in extra else None
    return g.finish(g.add("linear", normed, g.weight("a_w"), bias, residual, name="a", activation="gelu"))


EXTRAS = ["plain", "bias", "residual", "bias and residual"]


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_a_linear_takes_the_norm_before_it(norm: str, extra: str) -> None:
    assert ops_of(check(norm_and_linear(norm, extra), fuse.norm_linear)) == ["embedding", "linear"]
    assert unchanged(norm_and_linear(norm, extra, ("scale",)), fuse.norm_linear)


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize(
    ("norm", "weights"),
    [("layer_norm", ("scale", "shift")), ("layer_norm", ("scale",)), ("rms_norm", ("scale",))],
)
def test_the_weights_of_a_norm_go_into_the_linear_after_it(
    norm: str, weights: tuple[str, ...], extra: str
) -> None:
    """What is computed of weights alone is left to the build; then the norm itself goes in too."""
    after = check(norm_and_linear(norm, extra, weights), fuse.affine_into_linear)
    assert ops_of(partition(after).graph) == ["embedding", norm, "linear"]
    assert ops_of(partition(check(after, fuse.norm_linear)).graph) == ["embedding", "linear"]


def test_the_weights_of_a_norm_stay_where_it_has_none_or_others_read_it() -> None:
    assert unchanged(norm_and_linear("layer_norm", "bias"), fuse.affine_into_linear)
    g, x = small(a_w=(8, 8), scale=(8,))
    normed = g.add("layer_norm", x, g.weight("scale"), name="normed", eps=1e-5)
    assert unchanged(
        g.finish(g.add("mul", linear(g, normed, "a"), normed, name="m")), fuse.affine_into_linear
    )


@pytest.mark.parametrize("masked", [False, True])
def test_the_weights_of_a_norm_stay_before_a_table_that_is_split(masked: bool) -> None:
    """It is there once, for a lookup in a part of the vocabulary and as the head."""
    g, _ = small(scale=(8,))
    x = g.add("embedding", "token_ids", g.weight("table"), name="part", offset=0, masked=masked)
    normed = g.add("layer_norm", x, g.weight("scale"), name="normed", eps=1e-5)
    graph = g.finish(g.add("linear", normed, g.weight("table"), name="head"))
    assert unchanged(graph, fuse.affine_into_linear) == masked


def test_a_norm_with_another_reader_stays() -> None:
    g, x = small(a_w=(8, 8))
    normed = g.add("layer_norm", x, name="normed", eps=1e-5)
    assert unchanged(g.finish(g.add("mul", linear(g, normed, "a"), normed, name="product")), fuse.norm_linear)


# ---- the rewriter ---------------------------------------------------------------------------------


def test_an_output_is_followed_through_several_replacements() -> None:
    """A cast that goes stands for a norm that is fused in the same sweep, whose tensor gets another name."""
    g, x = small(t2=(11, 8))
    y = g.add("embedding", "token_ids", g.weight("t2"), name="y", offset=0)
    normed = g.add("layer_norm", g.add("add", x, y, name="sum"), name="n", eps=1e-5)
    after = check(
        g.finish(g.add("cast", normed, name="out", dtype="float32")), simplify.same_type, fuse.add_norm
    )
    assert after.outputs == ("n:1",)


def test_a_new_node_with_the_name_of_another_is_found() -> None:
    """Silently dropping the other node would change the result."""
    g, x = small(a_w=(8, 8))
    other = g.add("activation", x, name="other", kind="relu")
    graph = g.finish(g.add("add", linear(g, x, "a"), other, name="sum"))

    def clashing(graph: Graph, node: Node) -> Rewrite | None:
        if node.op != "linear":
            return None
        result = Rewrite(graph, (node,))
        (tensor,) = result.add("activation", node.used[0], name="other", kind="gelu")
        result.replace(node.name, tensor)
        return result

    with pytest.raises(
        GraphError, match="after pass 'clashing': activation 'other': %other is defined twice"
    ):
        rewrite(graph, (clashing,)).verify("after pass 'clashing'")


def test_dead_nodes_go_and_inputs_stay() -> None:
    g, x = small(a_w=(8, 8))
    linear(g, x, "a")
    graph = remove_dead(g.finish(x))
    assert ops_of(graph) == ["embedding"]
    assert [node.name for node in graph.weights] == ["table"]
    assert len(graph.inputs) == 6


def test_nodes_are_put_in_an_order_that_runs() -> None:
    graph = toy_decoder()
    shuffled = tuple(reversed(graph.nodes))
    Graph(in_order(shuffled), graph.outputs).verify()
    assert in_order(graph.nodes) == graph.nodes


def test_an_alias_reads_its_owner() -> None:
    g, x = small(head=(11, 8))
    graph = g.finish(g.add("linear", x, g.weight("head"), name="logits"))
    shared = share_tied_weights(graph, {"head": "table"}).verify()
    assert [node.name for node in shared.weights] == ["table"]
    weights, inputs = random_weights(graph), two_prompts(11)
    expected = evaluate(graph, weights | {"head": weights["table"]}, inputs)
    assert max_error(evaluate(shared, weights, inputs), expected) == 0
    assert share_tied_weights(graph, {}) == graph


# ---- the pipeline ---------------------------------------------------------------------------------


def optimized(
    graph: Graph, *, fusions: frozenset[str] = fuse.FUSIONS, sharding: ShardingOptions | None = None, rank: int = 0,
    aliases: Mapping[str, str] | None = None,
) -> Partition:  # fmt: skip
    return optimize(
        graph,
        sharding=sharding or ShardingOptions(),
        rank=rank,
        aliases=aliases or {},
        fusions=fusions,
        ops=op_names(),
    )


def stored_weights(parts: Partition, weights: Weights) -> dict[str, torch.Tensor]:
    """Values of the weights of `parts.graph`: those of `weights`, or made by their recipes."""
    return {
        node.name: interpret(parts.recipes[node.name], weights)
        if node.name in parts.recipes
        else weights[node.name]
        for node in parts.graph.weights
    }


ALL_FUSIONS = [frozenset(), *(frozenset({name}) for name in sorted(fuse.FUSIONS)), fuse.FUSIONS]


@pytest.mark.parametrize("fusions", [frozenset(), fuse.FUSIONS], ids=["no fusions", "all fusions"])
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "vocabulary_50272"])
def test_the_pipeline_keeps_the_value_of_every_opt(
    variant: str, fusions: frozenset[str], opt_checkpoint: Callable[[str], OptCheckpoint]
) -> None:
    checkpoint = opt_checkpoint(variant)
    source = checkpoint.weights()
    composed = checkpoint.family.compose(checkpoint.config)
    parts = optimized(composed, fusions=fusions, aliases=source.aliases)
    weights = {node.name: source.read(0, node.name).double() for node in composed.weights}
    inputs = two_prompts(checkpoint.config.vocab_size)
    value = evaluate(parts.graph, stored_weights(parts, weights), inputs)
    assert max_error(value, evaluate(composed, weights, inputs)) <= FLOAT64_ABS


@pytest.mark.parametrize("fusions", ALL_FUSIONS, ids=lambda names: "+".join(sorted(names)) or "none")
def test_the_pipeline_keeps_the_value_of_another_decoder(fusions: frozenset[str]) -> None:
    composed = toy_decoder()
    parts = optimized(composed, fusions=fusions)
    weights, inputs = random_weights(composed), two_prompts(61)
    value = evaluate(parts.graph, stored_weights(parts, weights), inputs)
    assert max_error(value, evaluate(composed, weights, inputs)) <= FLOAT64_ABS


def test_fusions_leave_the_ops_they_should() -> None:
    """Oracle: counted by hand. Per layer q, k, v are one product and gate and up another; every sum but the last, which
    meets the head, meets a norm. The gate comes out of a split, so its activation stays an op of its own."""
    fused = ops_of(optimized(toy_decoder(), fusions=fuse.FUSIONS - {fuse.RESIDUAL}).graph)
    counts = {op: fused.count(op) for op in ("linear", "split", "activation", "add", "add_rms_norm")}
    assert counts == {"linear": 4 * 2 + 1, "split": 2 * 2, "activation": 2, "add": 1, "add_rms_norm": 3}
    with_residual = ops_of(optimized(toy_decoder()).graph)
    assert not {"add", "add_rms_norm"} & set(with_residual)
    plain = ops_of(optimized(toy_decoder(), fusions=frozenset()).graph)
    assert plain.count("linear") == 7 * 2 + 1
    assert not {"split", "add_rms_norm"} & set(plain)


def test_an_op_that_the_target_lacks_is_named() -> None:
    with pytest.raises(GraphError, match=r"lowering: rotary '0.attention.q.rotary': op is not allowed here"):
        optimize(
            toy_decoder(), sharding=ShardingOptions(), rank=0, aliases={}, fusions=frozenset(),
            ops=op_names() - {"rotary"},
        )  # fmt: skip


def test_the_trace_tells_of_steps_that_changed_something() -> None:
    told: list[str] = []
    optimize(
        toy_decoder(), sharding=ShardingOptions(), rank=0, aliases={}, fusions=frozenset({fuse.SIBLINGS}),
        ops=op_names(), trace=lambda name, graph: told.append(name),
    )  # fmt: skip
    assert told == ["simplify", "select rows early", "fuse linear siblings"]


# ---- tensor parallelism ---------------------------------------------------------------------------


SHARDINGS = {
    "embedding whole": {},
    "embedding by vocabulary": {"use_parallel_embedding": True, "embedding_sharding_dim": 0},
    "embedding by width": {"use_parallel_embedding": True, "embedding_sharding_dim": 1},
}


RANKS = [
    *product(
        ["vocabulary_odd", "untied_head", "post_norm_projected", "bias_free_non_affine_gelu"],
        SHARDINGS,
        [2, 4],
    ),
    *product(["odd_sizes"], SHARDINGS, [2, 3]),
]


@pytest.mark.parametrize(("variant", "embedding", "tp_size"), RANKS)
def test_ranks_together_give_the_logits_of_one(
    variant: str, embedding: str, tp_size: int, opt_checkpoint: Callable[[str], OptCheckpoint]
) -> None:
    """Oracle: the composed graph on one rank. Every rank has all logits, and ids of every rank's part of the table
    occur; a vocabulary of 101 is padded, and so are five heads of 15 and a feed-forward layer of 77."""
    checkpoint = opt_checkpoint(variant)
    composed = checkpoint.family.compose(checkpoint.config)
    whole = checkpoint.weights()
    inputs = two_prompts(checkpoint.config.vocab_size)
    expected = evaluate(composed, {n.name: whole.read(0, n.name).double() for n in composed.weights}, inputs)

    sharding = ShardingOptions(tp_size=tp_size, **SHARDINGS[embedding])  # type: ignore[arg-type]
    source = checkpoint.weights(sharding=sharding)

    def run(rank: int, communicator: RankCommunicator) -> torch.Tensor:
        parts = optimized(composed, sharding=sharding, rank=rank, aliases=source.aliases)
        needed = {n.name for graph in (parts.graph, *parts.recipes.values()) for n in graph.weights}
        weights = {name: source.read(rank, name).double() for name in needed - parts.recipes.keys()}
        return evaluate(parts.graph, stored_weights(parts, weights), inputs, communicator)

    for logits in run_ranks(tp_size, run):
        assert max_error(logits, expected) <= FLOAT64_ABS


def sharded(shard_rule: Shard, *, tp_size: int = 2, **shapes: tuple[int, ...]) -> tuple[GraphBuilder, str]:
    """As `small`, with weights `shapes` split by `shard_rule`."""
    table = weight_rows(table=(11, 8))
    split = [ResolvedWeight(name, (), shape, shard_rule, IDENTITY) for name, shape in shapes.items()]
    g = GraphBuilder(DType.FLOAT32, [*table, *split])
    return g, g.add("embedding", "token_ids", g.weight("table"), name="x", offset=0)


def test_one_rank_is_left_as_it_is() -> None:
    graph = toy_decoder()
    assert shard(graph, ShardingOptions(), 0) is graph


def test_a_row_split_weight_needs_a_split_input() -> None:
    g, x = sharded(Shard.ROW, w=(8, 8))
    graph = g.finish(g.add("linear", x, g.weight("w"), name="y"))
    with pytest.raises(
        BuildError, match=r"tp_size 2: linear 'y' cannot work with inputs split along \(%x: None, %w: 1\)"
    ):
        shard(graph, ShardingOptions(tp_size=2), 0)


def test_an_op_over_a_split_axis_is_refused() -> None:
    """Oracle: a norm needs the whole row, and three heads are not to be had by two ranks."""
    g, x = sharded(Shard.COLUMN, w=(8, 8))
    y = g.add("linear", x, g.weight("w"), name="y")
    with pytest.raises(BuildError, match="layer_norm 'n' cannot work with inputs split"):
        shard(g.finish(g.add("layer_norm", y, name="n", eps=1e-5)), ShardingOptions(tp_size=2), 0)
    g, x = sharded(Shard.COLUMN, w=(12, 8))
    y = g.add("linear", x, g.weight("w"), name="y")
    with pytest.raises(BuildError, match="reshape 'r' cannot work with inputs split"):
        shard(g.finish(g.add("reshape", y, name="r", shape=("T", 3, 4))), ShardingOptions(tp_size=2), 0)


def test_a_size_too_small_for_the_ranks_is_named() -> None:
    g, x = sharded(Shard.COLUMN, w=(5, 8))
    graph = g.finish(g.add("linear", x, g.weight("w"), name="y"))
    with pytest.raises(
        ConfigError, match="w: a size of 5 over tp_size 4, 2 on each rank, would leave 1 without"
    ):
        shard(graph, ShardingOptions(tp_size=4), 0)


def test_a_split_sum_takes_a_split_vector_only() -> None:
    """[T, 4 of 8] + [4 of 8] fits; the whole vector does not."""
    g, x = sharded(Shard.COLUMN, w=(8, 8), b=(8,))
    y = g.add("linear", x, g.weight("w"), name="y")
    graph = g.finish(g.add("add", y, g.weight("b"), name="sum"))
    with pytest.raises(
        AssertionError, match="output %sum is split"
    ):  # nothing gathers it: a family's mistake
        shard(graph, ShardingOptions(tp_size=2), 0)
    g = GraphBuilder(DType.FLOAT32, [*weight_rows(table=(11, 8), b=(8,)),
                                     ResolvedWeight("w", (), (8, 8), Shard.COLUMN, IDENTITY)])  # fmt: skip
    x = g.add("embedding", "token_ids", g.weight("table"), name="x", offset=0)
    y = g.add("linear", x, g.weight("w"), name="y")
    with pytest.raises(BuildError, match="add 'sum' cannot work with inputs split"):
        shard(g.finish(g.add("add", y, g.weight("b"), name="sum")), ShardingOptions(tp_size=2), 0)
