"""Computes what follows the last attention only for the rows whose logits are wanted.

Of a prompt only the last token's logits are, so that the last layer's output projection and MLP, the final norm and the
head run on one row instead of all of them.
"""

from __future__ import annotations

from ..graph import Graph, Node
from .rewrite import Rewrite, Rule, only_reader

ROW_WISE = frozenset({"linear", "layer_norm", "rms_norm", "activation", "cast", "add", "mul", "all_reduce"})
"""Ops whose row i depends on row i of their inputs (and on weights) only."""


def select_before(graph: Graph, node: Node) -> Rewrite | None:
    """select_rows(op(x), index) -> op(select_rows(x, index))"""
    inner = graph.producers[node.used[0]] if node.op == "select_rows" else None
    if inner is None or inner.op not in ROW_WISE or not only_reader(graph, node.used[0]):
        return None
    result = Rewrite(graph, (node, inner))
    rows: list[str | None] = []
    for i, name in enumerate(inner.inputs):
        # Only tensors have rows to select: weights, and ops on weights, have no size known at run time.
        if name is not None and graph.specs[name].shape[:1] == inner.outputs[0].shape[:1]:
            (name,) = result.add("select_rows", name, node.used[1], name=f"{inner.name}.rows{i}")
        rows.append(name)
    (tensor,) = result.add(inner.op, *rows, name=inner.name, **inner.attrs)
    result.replace(node.name, tensor)
    return result


def same_rows(graph: Graph, node: Node) -> Rewrite | None:
    """select_rows(x, index), select_rows(x, index) -> the first of them twice"""
    if node.op != "select_rows":
        return None
    first = next(
        user for user in graph.users[node.used[0]] if user.op == node.op and user.inputs == node.inputs
    )
    if first == node:
        return None
    result = Rewrite(graph, (node, first))
    result.replace(node.name, first.name)
    return result


RULES: tuple[Rule, ...] = (same_rows, select_before)
