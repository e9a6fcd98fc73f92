"""The rewriter, and the rewrites that fuse nothing: simplify, select rows early, fold weights.

Oracle of every rewrite: the interpreter in float64 gives the same value before and after.
"""

from __future__ import annotations

from typing import Any

import pytest
from trtc.core.errors import GraphError
from trtc.core.graph import Graph, Node
from trtc.core.interpreter import interpret
from trtc.core.passes import Partition, fold, fuse, rows, share_tied_weights, simplify
from trtc.core.passes.fold import partition
from trtc.core.passes.rewrite import Rewrite, in_order, remove_dead, rewrite
from trtc.tests.tolerances import max_error
from trtc.tests.toy_decoder import random_weights, toy_decoder

from .graph_values import evaluate, three_rows
from .small_graphs import check, linear, ops_of, small, unchanged

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
    weights, inputs = random_weights(graph), three_rows(11)
    stored = {"table": weights["table"], "half": interpret(parts.recipes["half"], weights)}
    assert max_error(evaluate(parts.graph, stored, inputs), evaluate(graph, weights, inputs)) == 0


def test_partition_of_a_graph_without_ops_on_weights_changes_nothing() -> None:
    g, x = small(a_w=(8, 8))
    graph = g.finish(linear(g, x, "a"))
    assert partition(graph) == Partition(graph, {})


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
    weights, inputs = random_weights(graph), three_rows(11)
    expected = evaluate(graph, weights | {"head": weights["table"]}, inputs)
    assert max_error(evaluate(shared, weights, inputs), expected) == 0
    assert share_tied_weights(graph, {}) == graph
