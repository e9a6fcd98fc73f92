"""Removes ops that change nothing."""

from __future__ import annotations

from ..graph import Graph, Node
from .rewrite import Rewrite, Rule


def same_type(graph: Graph, node: Node) -> Rewrite | None:
    """reshape, cast or slice to the type the tensor has already -> the tensor"""
    if node.op not in ("reshape", "cast", "slice"):
        return None
    (source,) = node.used
    if graph.specs[source] != node.outputs[0]:
        return None
    result = Rewrite(graph, (node,))
    result.replace(node.name, source)
    return result


def reshape_of_reshape(graph: Graph, node: Node) -> Rewrite | None:
    """reshape(reshape(x)) -> reshape(x)"""
    inner = graph.producers[node.used[0]] if node.op == "reshape" else None
    if inner is None or inner.op != "reshape":
        return None
    result = Rewrite(graph, (node, inner))
    (tensor,) = result.add("reshape", inner.used[0], name=node.name, **node.attrs)
    result.replace(node.name, tensor)
    return result


RULES: tuple[Rule, ...] = (same_type, reshape_of_reshape)
