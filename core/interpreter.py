"""Executes a graph node by node with the ops' reference implementations: the oracle of passes and targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from .graph import Graph, Node
from .ops import ReferenceContext, get_op

Observer = Callable[[Node, tuple[torch.Tensor, ...]], None]


@torch.inference_mode()
def interpret(
    graph: Graph,
    tensors: Mapping[str, torch.Tensor],
    context: ReferenceContext | None = None,
    observer: Observer | None = None,
) -> Any:
    """The value of the graph's output (a tuple of values when it has several).

    tensors: a tensor for every input and weight, by name. They may be wider than the graph says (float64 weights make
    every op compute in float64).
    observer: told every node and its outputs; may raise to stop.
    """
    context = context or ReferenceContext()
    values: dict[str, torch.Tensor] = dict(tensors)
    for node in graph.nodes:
        if node.op in ("input", "weight"):
            continue
        inputs = [None if name is None else values[name] for name in node.inputs]
        result = get_op(node.op).reference(context, node.attrs, *inputs)
        outputs = (result,) if len(node.outputs) == 1 else tuple(result)
        values.update(zip(node.tensors, outputs, strict=True))
        if observer is not None:
            observer(node, outputs)
    found = tuple(values[name] for name in graph.outputs)
    return found[0] if len(found) == 1 else found
