"""A graph as one HTML page without anything from outside: blocks that open and close, each with a drawing of its nodes.

Nodes stand in rows by their longest path from what the block reads. Blocks that repeat an earlier one are closed at first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape

from ..graph import Graph, Node
from .blocks import HIDDEN, Block, attributes_of, blocks, weights_of

WIDTH, HEIGHT, GAP_X, GAP_Y, MARGIN = 210, 62, 26, 46, 16
_COLOURS = {
    "input": "#e8eef7", "embedding": "#dff3e4", "linear": "#fdeccf", "attention": "#f9d9d3", "layer_norm": "#e9e2f5",
    "rms_norm": "#e9e2f5", "add_layer_norm": "#e9e2f5", "all_reduce": "#ffd8ec", "all_gather": "#ffd8ec",
}  # fmt: skip
_OTHER = "#f1f1f1"
_STYLE = """
body { font: 14px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1100px; padding: 0 1rem; color: #1b1b1b; }
table { border-collapse: collapse; margin-bottom: 1.5rem; } td { padding: .15rem .8rem .15rem 0; vertical-align: top; }
td:first-child { color: #666; } details { border: 1px solid #d5d5d5; border-radius: 8px; margin: .5rem 0; }
summary { cursor: pointer; padding: .5rem .8rem; font-weight: 600; } summary span { font-weight: 400; color: #666; }
.drawing { overflow-x: auto; padding: 0 .8rem .8rem; } svg text { font-size: 12px; } .op { font-weight: 700; }
.type, .more { fill: #555; } .edge { fill: none; stroke: #8a8a8a; } .outside { fill: #777; font-style: italic; }
rect { stroke: #9a9a9a; } g:hover rect { stroke: #000; stroke-width: 2; }
"""


def html(graph: Graph, title: str, facts: Mapping[str, str]) -> str:
    """The page. facts: label -> text, in a table above the graph."""
    table = "".join(f"<tr><td>{escape(k)}</td><td>{escape(v)}</td></tr>" for k, v in facts.items())
    body = "".join(_block(graph, block) for block in blocks(graph))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{escape(title)}</h1><table>{table}</table>{body}"
        f"<p>Output: {escape(', '.join(f'{name} {graph.specs[name]}' for name in graph.outputs))}</p></body></html>\n"
    )


def _block(graph: Graph, block: Block) -> str:
    count = f"{len(block.nodes)} nodes" + (f", as {block.like}" if block.like else "")
    opened = "" if block.like else " open"
    return (
        f"<details{opened}><summary>{escape(block.name)} <span>{escape(count)}</span></summary>"
        f'<div class="drawing">{_drawing(graph, block)}</div></details>\n'
    )


def _drawing(graph: Graph, block: Block) -> str:
    rows = _rows(graph, block)
    places = {
        node.name: (MARGIN + column * (WIDTH + GAP_X), MARGIN + GAP_Y // 2 + row * (HEIGHT + GAP_Y))
        for row, nodes in enumerate(rows)
        for column, node in enumerate(nodes)
    }
    width = MARGIN * 2 + max(map(len, rows)) * (WIDTH + GAP_X)
    height = MARGIN * 2 + GAP_Y // 2 + len(rows) * (HEIGHT + GAP_Y)
    parts = [*_edges(graph, block, places), *(_box(graph, block, node, places) for node in block.nodes)]
    return f'<svg width="{width}" height="{height}" role="img">{"".join(parts)}</svg>'


def _rows(graph: Graph, block: Block) -> list[list[Node]]:
    """Nodes by depth; within a row, near the middle of what they read."""
    depth: dict[str, int] = {}
    columns: dict[str, float] = {}
    rows: list[list[Node]] = []
    for node in block.nodes:
        before = [graph.producers[name].name for name in node.used]
        depth[node.name] = max((depth[name] + 1 for name in before if name in depth), default=0)
        while len(rows) <= depth[node.name]:
            rows.append([])
        rows[depth[node.name]].append(node)
    for nodes in rows:
        nodes.sort(key=lambda node: _middle([columns[graph.producers[t].name] for t in node.used
                                             if graph.producers[t].name in columns]))  # fmt: skip
        columns.update((node.name, float(i)) for i, node in enumerate(nodes))
    return rows


def _middle(columns: list[float]) -> float:
    return sum(columns) / len(columns) if columns else 0.0


def _edges(graph: Graph, block: Block, places: Mapping[str, tuple[int, int]]) -> Iterator[str]:
    for node in block.nodes:
        x, y = places[node.name]
        outside = []
        for tensor in node.used:
            producer = graph.producers[tensor]
            if producer.name in places:
                px, py = places[producer.name]
                a, b, c, d = px + WIDTH // 2, py + HEIGHT, x + WIDTH // 2, y
                bend = (b + d) // 2
                yield (f'<path class="edge" d="M{a},{b} C{a},{bend} {c},{bend} {c},{d}">'
                       f"<title>{escape(f'{tensor} {graph.specs[tensor]}')}</title></path>")  # fmt: skip
            elif producer.op not in HIDDEN:
                outside.append(tensor)
        if outside:
            yield f'<text class="outside" x="{x + 6}" y="{y - 5}">{escape("↓ " + _clip(", ".join(outside), 30))}</text>'


def _box(graph: Graph, block: Block, node: Node, places: Mapping[str, tuple[int, int]]) -> str:
    x, y = places[node.name]
    weights = weights_of(graph, node)
    details = "\n".join([str(node), *weights])
    types = ", ".join(map(str, node.outputs))
    more = " · ".join(filter(None, [attributes_of(node), *(text.split(" ", 1)[1] for text in weights)]))
    lines = [("op", f"{node.op}  {block.short(node.name)}"), ("type", types), ("more", more)]
    text = "".join(f'<text class="{kind}" x="{x + 8}" y="{y + 19 + 16 * i}">{escape(_clip(line, 31))}</text>'
                   for i, (kind, line) in enumerate(lines))  # fmt: skip
    colour = _COLOURS.get(node.op, _OTHER)
    return (f'<g><title>{escape(details)}</title><rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="6" '
            f'fill="{colour}"/>{text}</g>')  # fmt: skip


def _clip(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
