"""The graph as a decode step or a prefill step runs it.

An engine has one graph. What is fused on top of it depends on the rows of a step: with few rows a linear layer is one read
of its weight, and everything around it (norm, bias, activation, residual) is free inside that kernel; with many rows the
product is a library's, and the sum joins the norm instead, or in a step with prompts the product's epilogue.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from ....kernels.linear import MAX_STREAM_ROWS
from ....kernels.linear.formats import int4_name
from ....kernels.linear.quantized_plan import norms_quantized_input
from ...dtypes import DType
from ...graph import Graph, Node, make_node
from ...passes import fuse
from ...passes.rewrite import Rewrite, only_reader, remove_dead, rewrite
from ...spec import TensorSpec


def prefill_graph(graph: Graph) -> Graph:
    """`graph` for steps of many rows."""
    return rewrite(rewrite(graph, (_library_residual,)), (fuse.add_norm,)).verify("prefill graph")


def _library_residual(graph: Graph, node: Node) -> Rewrite | None:
    """`fuse.linear_residual`, where the product is one of a library that adds to it in its epilogue: of float weights, with no
    activation in between."""
    products = [graph.producers[name] for name in node.used if graph.producers[name].op in fuse.PRODUCTS]
    if any(product.op != "linear" or "activation" in product.attrs for product in products):
        return None
    return fuse.linear_residual(graph, node)


def decode_graph(graph: Graph, *, rows: int, capability: int, fuse_residuals: bool = True) -> Graph:
    """`graph` for steps of one token per sequence, each wanting its logits.

    rows: tokens of a step; capability: of the GPU, 90 for sm_90. They decide which products norm their input.
    fuse_residuals: whether products of this number of rows add to their result; where they cannot, the sum joins the norm.
    """
    graph = all_rows(graph)
    if fuse_residuals:
        graph = rewrite(graph, (fuse.linear_residual,))
    graph = rewrite(graph, (partial(_norm_product, rows, capability),))
    return rewrite(graph, (fuse.add_norm,)).verify("decode graph")


def _norm_product(rows: int, capability: int, graph: Graph, node: Node) -> Rewrite | None:
    """`fuse.norm_linear`, where the kernel for this product has the norm inside."""
    if node.op not in fuse.PRODUCTS:
        return None
    features, columns = node.outputs[0].shape[-1], graph.specs[node.used[0]].shape[-1]
    assert isinstance(features, int) and isinstance(columns, int)
    if node.op == "linear":
        fits = rows <= MAX_STREAM_ROWS
    else:
        weighted = len(graph.producers[node.used[0]].inputs) > 1  # read only where a norm is in front
        fits = norms_quantized_input(
            rows, features, columns, weight_format(graph, node), capability, weighted=weighted
        )
    return fuse.norm_linear(graph, node) if fits else None


def rank_graph(graph: Graph, *, first: bool, residuals: bool) -> Graph:
    """`graph`, of a prefill or decode step, as a rank runs it; the first and the others, see `sum_on_first_rank`.

    Then sums and the norms behind them are one op: what is added is clear by now.
    """
    graph = sum_on_first_rank(graph, first=first, residuals=residuals)
    return rewrite(graph, (fuse.all_reduce_norm,)).verify("graph of a rank")


def weight_format(graph: Graph, node: Node) -> str:
    """The format of the weight of a quantized_linear, as the kernels call it."""
    integers, scale = (graph.specs[name] for name in node.used[1:3])
    columns = graph.specs[node.used[0]].shape[-1]
    assert isinstance(columns, int)
    if integers.dtype is not DType.UINT8:
        return {DType.INT8: "int8", DType.FLOAT8_E4M3: "fp8"}[integers.dtype]
    groups = scale.shape[1]
    assert isinstance(groups, int)
    return int4_name(columns // groups, zeros=len(node.inputs) > 3 and node.inputs[3] is not None)


def sum_on_first_rank(graph: Graph, *, first: bool, residuals: bool) -> Graph:
    """`graph` with what is added to a sum over the ranks added by the first rank alone, to its part of the sum.

    All ranks hold the addend, so that the sum is the same; and a product takes a bias or a residual in for nothing, where
    adding it afterwards is a kernel. residuals: also where the addend is no bias; False where a norm is there to take it in.
    """
    mine, others = _first_and_others(graph, residuals)
    if residuals and _collectives(others) != _collectives(graph):
        # The addend is itself a sum over the ranks, which nothing else on the others needs: where two blocks read one tensor.
        mine, others = _first_and_others(graph, residuals=False)
    return mine if first else others.verify("graph of another rank")


def _first_and_others(graph: Graph, residuals: bool) -> tuple[Graph, Graph]:
    """The graph of the first rank, and that of the others."""
    joined = rewrite(graph, (partial(_into_product, residuals),)).verify("graph of the first rank")
    if joined == graph:
        return graph, graph
    # The other ranks leave out just what the first has taken in: all must agree on what is in the sum.
    nodes = []
    for node in joined.nodes:
        before = graph.producers.get(node.name)
        if node.op in fuse.PRODUCTS and before is not None and before.inputs != node.inputs:
            own = zip(node.inputs, before.inputs, strict=False)
            node = replace(node, inputs=tuple(None if old is None else name for name, old in own))
        nodes.append(node)
    return joined, remove_dead(Graph(tuple(nodes), joined.outputs))


def _collectives(graph: Graph) -> list[str]:
    """What ranks do together, in order."""
    return [node.name for node in graph.nodes if node.op in ("all_reduce", "all_gather")]


def _into_product(residuals: bool, graph: Graph, node: Node) -> Rewrite | None:
    """all_reduce(linear(x, W)) + b -> all_reduce(linear(x, W, b))"""
    if node.op != "add":
        return None
    for total, addend in (node.used, node.used[::-1]):
        collective = graph.producers[total]
        product = graph.producers[collective.used[0]] if collective.op == "all_reduce" else None
        if product is None or product.op not in fuse.PRODUCTS or "activation" in product.attrs:
            continue
        residual = fuse.PRODUCTS[product.op]
        inputs = [*product.inputs, *[None] * (residual + 1 - len(product.inputs))]
        is_bias = graph.specs[addend].rank == 1
        place = residual - 1 if is_bias else residual
        if inputs[place] is not None or not (is_bias or residuals):
            continue
        if not (only_reader(graph, product.name) and only_reader(graph, total)):
            continue
        inputs[place] = addend
        if inputs[-1] is None:
            inputs.pop()
        result = Rewrite(graph, (node, collective, product))
        (part,) = result.add(product.op, *inputs, name=product.name, **product.attrs)
        (whole,) = result.add("all_reduce", part, name=collective.name, **collective.attrs)
        result.replace(node.name, whole)
        return result
    return None


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
