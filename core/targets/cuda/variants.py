"""The graph as a decode step or a prefill step runs it.

An engine has one graph. What is fused on top of it depends on the rows of a step: with few rows a linear layer is one read
of its weight, and everything around it (norm, bias, activation, residual) is free inside that kernel; with many rows the
product is a library's, and the sum joins the norm instead.
"""

from __future__ import annotations

from ...graph import Graph, make_node
from ...passes import fuse
from ...passes.rewrite import remove_dead, rewrite
from ...spec import TensorSpec


def prefill_graph(graph: Graph) -> Graph:
    """`graph` for steps of many rows."""
    return rewrite(graph, (fuse.add_norm,)).verify("prefill graph")


def decode_graph(graph: Graph, *, fuse_norms: bool) -> Graph:
    """`graph` for steps of one token per sequence, each wanting its logits.

    fuse_norms: whether the linear kernel for this number of rows can norm its input.
    """
    graph = rewrite(all_rows(graph), (fuse.linear_residual,))
    if fuse_norms:
        graph = rewrite(graph, (fuse.norm_linear,))
    return rewrite(graph, (fuse.add_norm,)).verify("decode graph")


def all_rows(graph: Graph) -> Graph:
    """`graph` with select_rows(x, logits_index) -> x: right where every row's logits are wanted, in order.

    The symbol R becomes T, so that types are worked out anew.
    """
    specs: dict[str, TensorSpec] = {}
    same: dict[str, str] = {}
    nodes = []
    for node in graph.nodes:
        inputs = tuple(None if name is None else same.get(name, name) for name in node.inputs)
        if node.op == "select_rows":
            assert inputs[0] is not None
            same[node.name] = inputs[0]
            continue
        made = make_node(node.name, node.op, inputs, node.attrs, specs)
        nodes.append(made)
        specs.update(zip(made.tensors, made.outputs, strict=True))
    return remove_dead(Graph(tuple(nodes), tuple(same.get(name, name) for name in graph.outputs)))
