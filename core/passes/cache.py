"""Says what the KV cache holds."""

from __future__ import annotations

from dataclasses import replace

from ..dtypes import DType
from ..graph import Graph
from ..ops.attention import CACHE_DTYPE


def cache_type(graph: Graph, dtype: DType | None) -> Graph:
    """attention -> attention over a cache of `dtype`; None: of the type of its k and v, as it is."""
    if dtype is None:
        return graph
    nodes = tuple(
        replace(node, attrs={**node.attrs, CACHE_DTYPE: dtype.value}) if node.op == "attention" else node
        for node in graph.nodes
    )
    return Graph(nodes, graph.outputs)
