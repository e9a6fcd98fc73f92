"""Graph -> Graph rewrites, and the order in which a build applies them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from ..dtypes import DType
from ..graph import Graph
from ..quantize.scheme import Quantization
from ..sharding import ShardingOptions
from . import fold, fuse, rows, simplify
from .cache import cache_type
from .fold import Partition, partition
from .quantize import quantize, round_activations
from .rewrite import Rule, reading, remove_dead, rewrite
from .shard import shard
from .stage import stage

__all__ = ["Partition", "Pass", "optimize", "pipeline"]


@dataclass(frozen=True)
class Pass:
    """One named step of the pipeline."""

    name: str
    run: Callable[[Graph], Graph]


def pipeline(
    sharding: ShardingOptions,
    rank: int,
    aliases: Mapping[str, str],
    fusions: frozenset[str],
    quantization: Quantization | None = None,
    cache_dtype: DType | None = None,
) -> Iterator[Pass]:
    """The steps from a family's composition to what a target lowers, in order.

    aliases: weight -> the weight that holds its data; fusions: what the target can run as one op (`fuse.FUSIONS`);
    quantization: which weights are stored as integers; cache_dtype: what the KV cache holds, None: k and v as they are.
    """
    # First, while every weight is still the checkpoint's own, so that sharding rules apply to it.
    position, member = sharding.place(rank)
    yield Pass("shard", lambda graph: shard(graph, sharding, member))
    # After sharding, which looks at all of a graph. Before weights are shared or made: that is for each stage to do.
    yield Pass("stage", lambda graph: stage(graph, sharding.pp_size, position))
    # After sharding: a head and an embedding are the same weight only if their shards are.
    yield Pass("share tied weights", lambda graph: share_tied_weights(graph, aliases))
    # After sharding, which follows float weights, and before anything is made of weights.
    yield Pass("quantize", lambda graph: quantize(graph, quantization))
    yield Pass("cache type", lambda graph: cache_type(graph, cache_dtype))
    yield Pass("simplify", lambda graph: rewrite(graph, simplify.RULES))
    # Before norms are fused with sums: a fused sum has two readers' results and no longer is one row-wise op.
    yield Pass("select rows early", lambda graph: rewrite(graph, rows.RULES))
    yield Pass("fold projections", lambda graph: rewrite(graph, fold.RULES))
    for fusion, rule in fuse.RULES.items():
        if fusion in fusions:
            yield Pass(f"fuse {fusion}", _rewriter(rule))
    # Last: only now is it known which products read integers.
    yield Pass("round activations", lambda graph: round_activations(graph, quantization))


def _rewriter(rule: Rule) -> Callable[[Graph], Graph]:
    return lambda graph: rewrite(graph, (rule,))


def optimize(
    graph: Graph,
    *,
    sharding: ShardingOptions,
    rank: int,
    aliases: Mapping[str, str],
    fusions: frozenset[str],
    ops: frozenset[str],
    quantization: Quantization | None = None,
    cache_dtype: DType | None = None,
    trace: Callable[[str, Graph], None] | None = None,
) -> Partition:
    """Runs the pipeline and splits off what the build computes. Every step's result is verified.

    ops: the ops the target runs; trace: told the name and result of every step that changed the graph.
    Raises GraphError naming the step and node, when a pass breaks a rule or an op is left that the target lacks.
    """
    for step in pipeline(sharding, rank, aliases, fusions, quantization, cache_dtype):
        result = step.run(graph).verify(f"after pass '{step.name}'")
        if trace is not None and result != graph:
            trace(step.name, result)
        graph = result
    parts = partition(graph)
    parts.graph.verify("lowering", ops | {"input", "weight"})
    return parts


def share_tied_weights(graph: Graph, aliases: Mapping[str, str]) -> Graph:
    """Reads every alias from the weight that holds its data, where the graph has that weight: a stage may have only one of
    them."""
    aliases = {alias: owner for alias, owner in aliases.items() if owner in graph.producers}
    nodes = tuple(reading(node, aliases) for node in graph.nodes if node.name not in aliases)
    return remove_dead(Graph(nodes, graph.outputs))
