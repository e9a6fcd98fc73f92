"""Pictures of a graph that a person looks at: Graphviz text, one HTML page, an ONNX model for viewers such as Netron."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..graph import Graph
from .dot import dot
from .html import html
from .onnx_model import onnx_bytes

Facts = Mapping[str, str]
"""What is said of the engine beside its graph: label -> text."""

FORMATS: Mapping[str, Callable[[Graph, str, Facts], bytes]] = {
    "dot": lambda graph, title, facts: dot(graph, title).encode(),
    "html": lambda graph, title, facts: html(graph, title, facts).encode(),
    "onnx": lambda graph, title, facts: onnx_bytes(graph, title, facts),
}
"""Format -> `(graph, title, facts) -> content of the file`."""
