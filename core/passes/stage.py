"""Cuts a graph into the stages of a pipeline: each rank of it computes some of the layers.

A stage ends where a single tensor is all that later layers need of what came before; it is the output of one stage and the
input `STAGE_INPUT` of the next. What depends on no layer (inputs, weights, ops on them) is not sent: stages that need it have
it. Each stage numbers its cache slots from 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

from ..errors import BuildError
from ..graph import Graph, Node, make_node
from .rewrite import reading, remove_dead

STAGE_INPUT = "stage.input"
"""Name of the input node of every stage but the first."""


def stage(graph: Graph, count: int, index: int) -> Graph:
    """Stage `index` of `count`, which have equally many layers as nearly as can be; the first ones have one more.

    Raises BuildError when there are more stages than layers, or no place for a cut.
    """
    if count == 1:
        return graph
    attention = [i for i, node in enumerate(graph.nodes) if node.op == "attention"]
    if count > len(attention):
        raise BuildError(
            f"pp_size {count}: the model has {len(attention)} layers; accepted: 1 to {len(attention)}"
        )
    ends = list(accumulate(layers_of(len(attention), count)))
    crossing = [_crossing(graph, attention, end) for end in ends[:-1]]
    nodes = list(graph.nodes)
    if index:
        source = crossing[index - 1]
        spec = graph.specs[source]
        entry = make_node(STAGE_INPUT, "input", (), {"dtype": spec.dtype.value, "shape": spec.shape}, {})
        nodes = [entry, *(reading(node, {source: STAGE_INPUT}) for node in nodes)]
    outputs = graph.outputs if index == count - 1 else (crossing[index],)
    part = remove_dead(Graph(tuple(nodes), outputs))
    return Graph(tuple(_renumbered(part.nodes)), part.outputs)


def layers_of(layers: int, stages: int) -> list[int]:
    """How many layers each stage has. The last has the head to compute and is never one of the larger ones."""
    return [layers // stages + (i < layers % stages) for i in range(stages)]


def _crossing(graph: Graph, attention: Sequence[int], end: int) -> str:
    """The tensor that crosses between the attention nodes end - 1 and end: of all places for a cut, the last."""
    before, after = attention[end - 1], attention[end]
    last_use = {name: i for i, node in enumerate(graph.nodes) for name in node.used}
    last_use |= dict.fromkeys(graph.outputs, len(graph.nodes))
    alive: set[str] = set()
    dependent: set[str] = set()
    found = None
    for i, node in enumerate(graph.nodes[:after]):
        if node.op == "attention" or not dependent.isdisjoint(node.used):
            dependent.update(node.tensors)
            alive.update(node.tensors)
        alive = {name for name in alive if last_use.get(name, -1) > i}
        if i >= before and len(alive) == 1:
            (found,) = alive
    if found is None or not _can_travel(graph, found):
        raise BuildError(
            f"a pipeline cannot be cut between attention slots {end - 1} and {end}: more than one tensor "
            f"[T, features] crosses there; use pp_size 1"
        )
    return found


def _can_travel(graph: Graph, tensor: str) -> bool:
    """Whether a receiver knows the size of a tensor from the number of tokens."""
    shape = graph.specs[tensor].shape
    return shape[0] == "T" and all(isinstance(d, int) for d in shape[1:])


def _renumbered(nodes: Sequence[Node]) -> list[Node]:
    slots = sorted(node.attrs["layer"] for node in nodes if node.op == "attention")
    new = {slot: i for i, slot in enumerate(slots)}
    return [
        replace(node, attrs={**node.attrs, "layer": new[node.attrs["layer"]]})
        if node.op == "attention"
        else node
        for node in nodes
    ]
