"""The rewriter: applies small rules to a graph until none fires.

A rule looks at one node and returns a `Rewrite`, or None. A rewrite names new nodes, which tensors they replace,
and which nodes it looked at; two rewrites of one sweep never share a node, so rules need not think about each
other.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..graph import Graph, Node, make_node
from ..spec import TensorSpec


@dataclass
class Rewrite:
    """New nodes for old ones, written down with `add` and `replace`."""

    graph: Graph
    matched: tuple[Node, ...]
    """The nodes that the rule relies on staying as they are."""
    nodes: list[Node] = field(default_factory=list)
    replacements: dict[str, str] = field(default_factory=dict)
    _specs: dict[str, TensorSpec] = field(default_factory=dict)

    def add(self, op: str, *inputs: str | None, name: str, **attrs: Any) -> tuple[str, ...]:
        """Adds a node and returns its tensors. The name may be that of a node the rewrite makes dead."""
        node = make_node(name, op, inputs, attrs, {**{i: self._spec(i) for i in inputs if i is not None}})
        self.nodes.append(node)
        self._specs.update(zip(node.tensors, node.outputs, strict=True))
        return node.tensors

    def replace(self, old: str, new: str) -> None:
        """Readers of tensor `old` read `new` instead."""
        self.replacements[old] = new

    def _spec(self, tensor: str) -> TensorSpec:
        return self._specs[tensor] if tensor in self._specs else self.graph.specs[tensor]


Rule = Callable[[Graph, Node], Rewrite | None]


def rewrite(graph: Graph, rules: Sequence[Rule]) -> Graph:
    """`graph` with `rules` applied until none fires, dead nodes removed."""
    while found := _sweep(graph, rules):
        graph = remove_dead(_apply(graph, found))
    return graph


def _sweep(graph: Graph, rules: Sequence[Rule]) -> list[Rewrite]:
    """Rewrites, found in node order, that have no node in common."""
    taken: set[str] = set()
    found = []
    for node in graph.nodes:
        for rule in rules:
            result = rule(graph, node)
            if result is not None and taken.isdisjoint(n.name for n in result.matched):
                taken.update(n.name for n in result.matched)
                found.append(result)
                break
    return found


def _apply(graph: Graph, rewrites: Sequence[Rewrite]) -> Graph:
    replacements: dict[str, str] = {}
    new_nodes: dict[str, list[Node]] = {}  # by the matched node at whose place they stand
    for one in rewrites:
        replacements |= one.replacements
        new_nodes[one.matched[0].name] = one.nodes
    new_names = {node.name for nodes in new_nodes.values() for node in nodes}
    # A new node may take the name of a node it makes dead. Any other namesake stays, for `verify` to find.
    given_up = new_names & {node.name for one in rewrites for node in one.matched}
    nodes: list[Node] = []
    for node in graph.nodes:
        nodes += new_nodes.get(node.name, [])
        if node.name not in given_up:
            nodes.append(node)
    outputs = tuple(_final(name, replacements) for name in graph.outputs)
    return Graph(in_order([reading(node, replacements) for node in nodes]), outputs)


def reading(node: Node, replacements: Mapping[str, str]) -> Node:
    """`node`, reading instead of a tensor the one that `replacements` has for it."""
    inputs = tuple(None if name is None else _final(name, replacements) for name in node.inputs)
    return node if inputs == node.inputs else replace(node, inputs=inputs)


def _final(name: str, replacements: Mapping[str, str]) -> str:
    """What stands for tensor `name` in the end: replacements may be replaced in turn."""
    while replacements.get(name, name) != name:
        name = replacements[name]
    return name


def in_order(nodes: Sequence[Node]) -> tuple[Node, ...]:
    """`nodes` such that every one follows what it reads, otherwise in the order given."""
    producer = {tensor: i for i, node in enumerate(nodes) for tensor in node.tensors}
    waiting = [len({producer[t] for t in node.used}) for node in nodes]
    readers: list[list[int]] = [[] for _ in nodes]
    for i, node in enumerate(nodes):
        for source in {producer[t] for t in node.used}:
            readers[source].append(i)
    ready = [i for i, count in enumerate(waiting) if count == 0]
    heapq.heapify(ready)
    result = []
    while ready:
        i = heapq.heappop(ready)
        result.append(nodes[i])
        for reader in readers[i]:
            waiting[reader] -= 1
            if waiting[reader] == 0:
                heapq.heappush(ready, reader)
    assert len(result) == len(nodes), "the nodes read each other in a circle"
    return tuple(result)


def remove_dead(graph: Graph) -> Graph:
    """`graph` without nodes that nothing reads; inputs stay."""
    alive: set[str] = set(graph.outputs)
    kept = []
    for node in reversed(graph.nodes):
        if node.op == "input" or not alive.isdisjoint(node.tensors):
            kept.append(node)
            alive.update(node.used)
    return Graph(tuple(reversed(kept)), graph.outputs)


def only_reader(graph: Graph, tensor: str) -> bool:
    """Whether exactly one node reads `tensor` and it is not a result of the graph."""
    return len(graph.users[tensor]) == 1 and tensor not in graph.outputs
