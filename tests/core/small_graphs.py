"""Small graphs for tests of rewrites, and the check that a rewrite keeps a graph's value."""

from __future__ import annotations

from typing import Any

from trtc.core.dtypes import DType
from trtc.core.graph import Graph, GraphBuilder
from trtc.core.passes.rewrite import Rule, rewrite
from trtc.tests.tolerances import FLOAT64_ABS, max_error
from trtc.tests.toy_decoder import random_weights, weight_rows

from .graph_values import evaluate, three_rows


def ops_of(graph: Graph) -> list[str]:
    """The ops in order, without inputs and weights."""
    return [node.op for node in graph.nodes if node.op not in ("input", "weight")]


def check(before: Graph, *rules: Rule, communicator: Any = None) -> Graph:
    """`before` rewritten; it verifies and has the value it had."""
    after = rewrite(before, rules).verify()
    given = random_weights(before), three_rows(11), communicator
    assert max_error(evaluate(after, *given), evaluate(before, *given)) <= FLOAT64_ABS
    return after


def unchanged(before: Graph, *rules: Rule) -> bool:
    """Whether no rule applies anywhere."""
    return rewrite(before, rules) == before


def small(**shapes: tuple[int, ...]) -> tuple[GraphBuilder, str]:
    """A builder with these weights, and x: [T, 8]."""
    g = GraphBuilder(DType.FLOAT32, weight_rows(table=(11, 8), **shapes))
    return g, g.add("embedding", "token_ids", g.weight("table"), name="x", offset=0)


def linear(g: GraphBuilder, x: str, name: str, *, bias: bool = False, **attrs: Any) -> str:
    """x times the weight `name`_w, and with `bias` plus `name`_b."""
    inputs = [x, g.weight(f"{name}_w"), *([g.weight(f"{name}_b")] if bias else [])]
    return g.add("linear", *inputs, name=name, **attrs)
