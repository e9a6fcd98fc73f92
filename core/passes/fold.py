"""Moves work from run time to build time: ops on weights become weights of their own.

A rule makes the runtime part smaller by writing an op on weights (a concatenation, a product of two weights).
`partition` then takes every such expression out of the graph; the build evaluates it once, with the ops' reference
implementations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..graph import Graph, Node, make_node
from ..ops import get_op
from .rewrite import Rewrite, Rule, only_reader, remove_dead


def projection_into_embedding(graph: Graph, node: Node) -> Rewrite | None:
    """linear(embedding(ids, E), W) -> embedding(ids, E W^T)

    A row of the wider table costs the same read as a row of the projection's result, so that the projection's matrix
    product and its read of W vanish from every step, for a larger table in memory. A quantized W stays where it is: the
    table would be made of the float weights that quantization saved.
    """
    if node.op != "linear" or len(node.inputs) != 2 or node.attrs:
        return None
    lookup = graph.producers[node.used[0]]
    if lookup.op != "embedding" or not only_reader(graph, lookup.name):
        return None
    ids, table = lookup.used
    weight = node.used[1]
    if not {graph.producers[table].op, graph.producers[weight].op} <= {"weight"}:
        return None
    result = Rewrite(graph, (node, lookup))
    (wide,) = result.add("linear", table, weight, name=f"{lookup.name}.projected")
    (tensor,) = result.add("embedding", ids, wide, name=node.name, **lookup.attrs)
    result.replace(node.name, tensor)
    return result


RULES: tuple[Rule, ...] = (projection_into_embedding,)


@dataclass(frozen=True)
class Partition:
    """A graph whose weights are all stored ones, and how the build makes those that the checkpoint does not have.

    recipes: stored weight -> a graph of weights and ops whose one output is its value.
    """

    graph: Graph
    recipes: Mapping[str, Graph]


def partition(graph: Graph) -> Partition:
    """Splits `graph` into what runs at build time and what runs at run time."""
    constant: set[str] = set()
    for node in graph.nodes:
        if node.op == "weight" or (node.inputs and get_op(node.op).folds and constant.issuperset(node.used)):
            constant.update(node.tensors)
    recipes: dict[str, Graph] = {}
    nodes: list[Node] = []
    for node in graph.nodes:
        if node.op == "weight" or constant.isdisjoint(node.tensors):
            nodes.append(node)
            continue
        for tensor, spec in zip(node.tensors, node.outputs, strict=True):
            if any(constant.isdisjoint(reader.tensors) for reader in graph.users[tensor]):
                recipes[tensor] = _only(graph, tensor)
                nodes.append(
                    make_node(tensor, "weight", (), {"dtype": spec.dtype.value, "shape": spec.shape}, {})
                )
    return Partition(remove_dead(Graph(tuple(nodes), graph.outputs)), recipes)


def _only(graph: Graph, output: str) -> Graph:
    """The part of `graph` that makes `output`."""
    needed = remove_dead(Graph(graph.nodes, (output,)))
    return Graph(tuple(node for node in needed.nodes if node.op != "input"), (output,))
