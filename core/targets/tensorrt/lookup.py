"""The embedding lookup of a model whose table is split by vocabulary, made ready for the lookup plugin."""

from __future__ import annotations

from functools import partial

from ...graph import Graph, Node
from ...passes.rewrite import Rewrite, only_reader, rewrite


def fuse_positions_before_all_reduce(graph: Graph, rank: int) -> Graph:
    """all_reduce(embedding(ids, E)) + embedding(positions, P) -> all_reduce(embedding(ids, E, positions, P))

    On rank 0; on the others the positions are left out, for the sum over the ranks takes them once.
    """
    return rewrite(graph, (partial(_positions_into_lookup, rank),)).verify("lookup")


def _positions_into_lookup(rank: int, graph: Graph, node: Node) -> Rewrite | None:
    if node.op != "add":
        return None
    reduce, positions = (graph.producers[name] for name in node.used)
    if reduce.op != "all_reduce" or positions.op != "embedding" or len(positions.inputs) != 2:
        return None
    lookup = graph.producers[reduce.used[0]]
    alone = all(only_reader(graph, one.name) for one in (reduce, positions, lookup))
    if lookup.op != "embedding" or len(lookup.inputs) != 2 or not alone:
        return None
    result = Rewrite(graph, (node, reduce, positions, lookup))
    more = {"position_offset": positions.attrs["offset"]} if rank == 0 else {}
    inputs = (*lookup.inputs, *(positions.inputs if rank == 0 else ()))
    (part,) = result.add("embedding", *inputs, name=lookup.name, **lookup.attrs, **more)
    (whole,) = result.add("all_reduce", part, name=node.name, **reduce.attrs)
    result.replace(node.name, whole)
    return result
