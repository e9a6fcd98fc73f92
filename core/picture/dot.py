"""A graph as Graphviz text: `dot -Tsvg`."""

from __future__ import annotations

import json
from collections.abc import Iterator

from ..graph import Graph, Node
from .blocks import HIDDEN, attributes_of, blocks, weights_of


def dot(graph: Graph, title: str) -> str:
    """One cluster a block, one box a node, tensor types on the edges."""
    return "\n".join(_lines(graph, title)) + "\n"


def _lines(graph: Graph, title: str) -> Iterator[str]:
    yield f"digraph {_quoted(title)} {{"
    yield f'  label={_quoted(title)}; rankdir=TB; node [shape=box, style="rounded,filled", fillcolor=white];'
    for number, block in enumerate(blocks(graph)):
        yield f"  subgraph cluster_{number} {{"
        yield f"    label={_quoted(block.name)}; style=filled; fillcolor=grey95;"
        for node in block.nodes:
            yield f"    {_quoted(node.name)} [label={_quoted(_label(graph, node, block.short(node.name)))}];"
        yield "  }"
    for node in graph.nodes:
        for tensor in node.used:
            producer = graph.producers[tensor]
            if producer.op not in HIDDEN:
                ends = f"{_quoted(producer.name)} -> {_quoted(node.name)}"
                yield f"  {ends} [label={_quoted(str(graph.specs[tensor]))}];"
    yield "}"


def _label(graph: Graph, node: Node, short: str) -> str:
    return "\n".join([node.op, short, *filter(None, [attributes_of(node)]), *weights_of(graph, node)])


def _quoted(text: str) -> str:
    """A Graphviz string: JSON's escapes are a subset of what it reads."""
    return json.dumps(text, ensure_ascii=False)
