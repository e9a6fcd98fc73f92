"""A graph cut into the blocks that its names speak of: `layers.0`, `layers.1`, ..., and what stands between them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from ..graph import Graph, Node

HIDDEN = ("weight",)
"""Ops that are drawn as part of the nodes that read them."""


@dataclass(frozen=True)
class Block:
    """Neighbouring nodes of one scope. `like`: an earlier block with the same structure, if there is one."""

    name: str
    nodes: tuple[Node, ...]
    like: str | None = None

    def short(self, tensor: str) -> str:
        """The name of one of its tensors inside the block."""
        return tensor.removeprefix(f"{self.name}.")


def scope(name: str) -> str:
    """`layers.3.mlp.fc1` -> `layers.3`: names up to their first number; empty where there is none."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: i + 1])
    return ""


def blocks(graph: Graph) -> tuple[Block, ...]:
    """The graph's nodes, weights left out, in order; inputs come first, in a block of their own."""
    shown = [node for node in graph.nodes if node.op not in HIDDEN]
    inputs = tuple(node for node in shown if node.op == "input" and graph.users.get(node.name))
    rest = [node for node in shown if node.op != "input"]
    made = [Block("inputs", inputs)]
    seen: dict[Any, str] = {}
    for number, (name, nodes) in enumerate(groupby(rest, key=lambda node: scope(node.name))):
        members = tuple(nodes)
        block = Block(name or ("begin" if number == 0 else f"end.{number}"), members)
        shape = _structure(members, graph)
        made.append(Block(block.name, members, seen.get(shape)))
        seen.setdefault(shape, block.name)
    return tuple(made)


def _structure(nodes: Iterable[Node], graph: Graph) -> Any:
    """Equal for blocks that differ in their names and cache slots only."""
    known: dict[str, int] = {}
    found = []
    for node in nodes:
        reads = tuple(
            None if tensor is None
            else known.get(tensor, "outside") if graph.producers[tensor].op not in HIDDEN
            else str(graph.specs[tensor])
            for tensor in node.inputs
        )  # fmt: skip
        attrs = tuple((key, value) for key, value in node.attrs.items() if key != "layer")
        found.append((node.op, reads, attrs, tuple(map(str, node.outputs))))
        known.update((tensor, len(known)) for tensor in node.tensors)
    return tuple(found)


def weights_of(graph: Graph, node: Node) -> list[str]:
    """`name type` of the weights that a node reads."""
    return [f"{name} {graph.specs[name]}" for name in node.used if graph.producers[name].op in HIDDEN]


def attributes_of(node: Node) -> str:
    """`key=value, ...` of those attributes that say something."""
    said = {key: value for key, value in node.attrs.items() if key not in ("shape", "dtype")}
    return ", ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in said.items()
    )
