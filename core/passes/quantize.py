"""Reads the weights that are stored as integers as what they stand for."""

from __future__ import annotations

from dataclasses import replace

from ..dtypes import DType
from ..graph import Graph, Node, make_node
from ..ops.quantized import ACTIVATIONS
from ..quantize.scheme import Quantization
from .rewrite import reading

DEQUANTIZED = ".dequantized"
"""What the name of a dequantized weight ends with."""


def quantize(graph: Graph, quantization: Quantization | None) -> Graph:
    """weight W -> dequantize(integers of W, scale of W, zero of W), for the weights that `quantization` names

    The result is still a graph of float weights, so that every other pass works on it; a target that reads integers in
    the product itself asks for the fusion `dequantize + linear`.
    """
    if quantization is None:
        return graph
    chosen = {node.name for node in graph.weights} & set(quantization.weights)
    replaced = {name: name + DEQUANTIZED for name in chosen}
    nodes: list[Node] = []
    for node in graph.nodes:
        if node.name in chosen:
            nodes += _stored(node, quantization)
        else:
            nodes.append(reading(node, replaced))
    return Graph(tuple(nodes), graph.outputs)


def round_activations(graph: Graph, quantization: Quantization | None) -> Graph:
    """quantized_linear(x, ...) -> quantized_linear(rounded x, ...), where `quantization` says so: the other factor has the type
    of the weight's numbers, so that the product is one of them."""
    if quantization is None or quantization.activations is None:
        return graph
    attrs = {ACTIVATIONS: quantization.activations}
    nodes = tuple(
        replace(node, attrs={**node.attrs, **attrs}) if node.op == "quantized_linear" else node
        for node in graph.nodes
    )
    return Graph(nodes, graph.outputs)


def _stored(weight: Node, quantization: Quantization) -> list[Node]:
    (spec,) = weight.outputs
    rows, columns = spec.shape
    assert isinstance(rows, int) and isinstance(columns, int)
    parts = [
        make_node(
            weight.name + suffix, "weight", (), {**weight.attrs, "dtype": dtype.value, "shape": shape}, {}
        )
        for suffix, (dtype, shape) in quantization.format.parts((rows, columns), DType(spec.dtype)).items()
    ]
    specs = {node.name: node.outputs[0] for node in parts}
    return [*parts, make_node(weight.name + DEQUANTIZED, "dequantize", [*specs], {}, specs)]
