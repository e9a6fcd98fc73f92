"""All passes in their order, on one rank and on several, and what sharding refuses.

Oracle: the graph as composed, on one rank, run by the interpreter in float64.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

import pytest
import torch
from trtc.core.dtypes import DType
from trtc.core.errors import BuildError, ConfigError, GraphError
from trtc.core.graph import Graph, GraphBuilder, Node
from trtc.core.interpreter import interpret
from trtc.core.ops import Op, op_names, registry
from trtc.core.passes import Partition, fuse, optimize
from trtc.core.passes.shard import shard
from trtc.core.sharding import Shard, ShardingOptions, narrow_or_pad, slice_bounds
from trtc.core.weights import IDENTITY, ResolvedWeight
from trtc.tests.opt_models import VARIANTS, OptCheckpoint
from trtc.tests.thread_group import RankCommunicator, run_ranks
from trtc.tests.tolerances import FLOAT64_ABS, max_error
from trtc.tests.toy_decoder import random_weights, toy_decoder, weight_rows

from .graph_values import Weights, evaluate, three_rows
from .small_graphs import ops_of

# ---- the pipeline ---------------------------------------------------------------------------------


def optimized(
    graph: Graph, *, fusions: frozenset[str] = fuse.FUSIONS, sharding: ShardingOptions | None = None, rank: int = 0,
    aliases: Mapping[str, str] | None = None,
) -> Partition:  # fmt: skip
    return optimize(
        graph,
        sharding=sharding or ShardingOptions(),
        rank=rank,
        aliases=aliases or {},
        fusions=fusions,
        ops=op_names(),
    )


def stored_weights(parts: Partition, weights: Weights) -> dict[str, torch.Tensor]:
    """Values of the weights of `parts.graph`: those of `weights`, or made by their recipes."""
    return {
        node.name: interpret(parts.recipes[node.name], weights)
        if node.name in parts.recipes
        else weights[node.name]
        for node in parts.graph.weights
    }


ALL_FUSIONS = [frozenset(), *(frozenset({name}) for name in sorted(fuse.FUSIONS)), fuse.FUSIONS]


@pytest.mark.parametrize("fusions", [frozenset(), fuse.FUSIONS], ids=["no fusions", "all fusions"])
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "vocabulary_50272"])
def test_the_pipeline_keeps_the_value_of_every_opt(
    variant: str, fusions: frozenset[str], opt_checkpoint: Callable[[str], OptCheckpoint]
) -> None:
    checkpoint = opt_checkpoint(variant)
    source = checkpoint.weights()
    composed = checkpoint.family.compose(checkpoint.config)
    parts = optimized(composed, fusions=fusions, aliases=source.aliases)
    weights = {node.name: source.read(0, node.name).double() for node in composed.weights}
    inputs = three_rows(checkpoint.config.vocab_size)
    value = evaluate(parts.graph, stored_weights(parts, weights), inputs)
    assert max_error(value, evaluate(composed, weights, inputs)) <= FLOAT64_ABS


@pytest.mark.parametrize("fusions", ALL_FUSIONS, ids=lambda names: "+".join(sorted(names)) or "none")
def test_the_pipeline_keeps_the_value_of_another_decoder(fusions: frozenset[str]) -> None:
    composed = toy_decoder()
    parts = optimized(composed, fusions=fusions)
    weights, inputs = random_weights(composed), three_rows(61)
    value = evaluate(parts.graph, stored_weights(parts, weights), inputs)
    assert max_error(value, evaluate(composed, weights, inputs)) <= FLOAT64_ABS


def test_fusions_leave_the_ops_they_should() -> None:
    """Oracle: counted by hand. Per layer q, k, v are one product and gate and up another; every sum but the last, which
    meets the head, meets a norm. The gate comes out of a split, so its activation stays an op of its own."""
    fused = ops_of(optimized(toy_decoder(), fusions=fuse.FUSIONS - {fuse.RESIDUAL}).graph)
    counts = {op: fused.count(op) for op in ("linear", "split", "activation", "add", "add_rms_norm")}
    assert counts == {"linear": 4 * 2 + 1, "split": 2 * 2, "activation": 2, "add": 1, "add_rms_norm": 3}
    with_residual = ops_of(optimized(toy_decoder()).graph)
    assert not {"add", "add_rms_norm"} & set(with_residual)
    plain = ops_of(optimized(toy_decoder(), fusions=frozenset()).graph)
    assert plain.count("linear") == 7 * 2 + 1
    assert not {"split", "add_rms_norm"} & set(plain)


def test_an_op_that_the_target_lacks_is_named() -> None:
    with pytest.raises(GraphError, match=r"lowering: rotary '0.attention.q.rotary': op is not allowed here"):
        optimize(
            toy_decoder(), sharding=ShardingOptions(), rank=0, aliases={}, fusions=frozenset(),
            ops=op_names() - {"rotary"},
        )  # fmt: skip


def test_the_trace_tells_of_steps_that_changed_something() -> None:
    told: list[str] = []
    optimize(
        toy_decoder(), sharding=ShardingOptions(), rank=0, aliases={}, fusions=frozenset({fuse.SIBLINGS}),
        ops=op_names(), trace=lambda name, graph: told.append(name),
    )  # fmt: skip
    assert told == ["simplify", "select rows early", "fuse linear siblings"]


# ---- tensor parallelism ---------------------------------------------------------------------------


SHARDINGS = {
    "embedding whole": {},
    "embedding by vocabulary": {"use_parallel_embedding": True, "embedding_sharding_dim": 0},
    "embedding by width": {"use_parallel_embedding": True, "embedding_sharding_dim": 1},
}


RANKS = [
    *product(
        ["vocabulary_odd", "untied_head", "post_norm_projected", "bias_free_non_affine_gelu"],
        SHARDINGS,
        [2, 4],
    ),
    *product(["odd_sizes"], SHARDINGS, [2, 3]),
]


@pytest.mark.parametrize(("variant", "embedding", "tp_size"), RANKS)
def test_ranks_together_give_the_logits_of_one(
    variant: str, embedding: str, tp_size: int, opt_checkpoint: Callable[[str], OptCheckpoint]
) -> None:
    """Oracle: the composed graph on one rank. Every rank has all logits, and ids of every rank's part of the table
    occur; a vocabulary of 101 is padded, and so are five heads of 15 and a feed-forward layer of 77."""
    checkpoint = opt_checkpoint(variant)
    composed = checkpoint.family.compose(checkpoint.config)
    whole = checkpoint.weights()
    inputs = three_rows(checkpoint.config.vocab_size)
    expected = evaluate(composed, {n.name: whole.read(0, n.name).double() for n in composed.weights}, inputs)

    sharding = ShardingOptions(tp_size=tp_size, **SHARDINGS[embedding])  # type: ignore[arg-type]
    source = checkpoint.weights(sharding=sharding)

    def run(rank: int, communicator: RankCommunicator) -> torch.Tensor:
        parts = optimized(composed, sharding=sharding, rank=rank, aliases=source.aliases)
        needed = {n.name for graph in (parts.graph, *parts.recipes.values()) for n in graph.weights}
        weights = {name: source.read(rank, name).double() for name in needed - parts.recipes.keys()}
        return evaluate(parts.graph, stored_weights(parts, weights), inputs, communicator)

    for logits in run_ranks(tp_size, run):
        assert max_error(logits, expected) <= FLOAT64_ABS


def sharded(shard_rule: Shard, **shapes: tuple[int, ...]) -> tuple[GraphBuilder, str]:
    """As `small`, with weights `shapes` split by `shard_rule`."""
    table = weight_rows(table=(11, 8))
    split = [ResolvedWeight(name, (), shape, shard_rule, IDENTITY) for name, shape in shapes.items()]
    g = GraphBuilder(DType.FLOAT32, [*table, *split])
    return g, g.add("embedding", "token_ids", g.weight("table"), name="x", offset=0)


SQUARE = Op(
    "their_square", lambda sig: (sig[0],), lambda context, attrs, x: attrs["by"] * x * x, column_wise=True
)
"""An op of a plugin."""


def unusual_decoder() -> Graph:
    """One layer with what is done to heads before they attend (a norm, rotary of a part of them) and an activation of a
    plugin's own; attention and MLP read the same sum. Two heads of 4."""
    names = {"q": Shard.HEADS, "k": Shard.HEADS, "v": Shard.HEADS, "out": Shard.HEADS_ROW}
    names |= {"fc1": Shard.COLUMN, "fc2": Shard.ROW}
    rows = [ResolvedWeight(name, (), (8, 8), rule, IDENTITY, unit=4) for name, rule in names.items()]
    rows += weight_rows(table=(11, 8), norm=(4,))
    g = GraphBuilder(DType.FLOAT32, [*rows, ResolvedWeight("head", (), (11, 8), Shard.VOCAB_HEAD, IDENTITY)])

    def linear(x: str, name: str) -> str:
        return g.add("linear", x, g.weight(name), name=f"{name}.product")

    x = g.add("embedding", "token_ids", g.weight("table"), name="x", offset=0)
    q, k, v = (
        g.add("reshape", linear(x, part), name=f"{part}.heads", shape=("T", 2, 4)) for part in ("q", "k", "v")
    )
    q = g.add("rms_norm", q, g.weight("norm"), name="q.norm", eps=1e-5)
    k = g.add("mul", g.add("layer_norm", k, name="k.norm", eps=1e-5), g.weight("norm"), name="k.scaled")
    turn, keep = g.add_many("split", q, name="q.parts", axis=2, sizes=(2, 2))
    turned = g.add("rotary", turn, "positions", name="q.turned", theta=100.0)
    q = g.add("concat", turned, keep, name="q.whole", axis=-1)
    v = g.add(
        "concat",
        *(g.add("slice", v, name=f"v.{i}", axis=-1, start=i, stop=i + 2) for i in (2, 0)),
        name="v.turned",
        axis=2,
    )
    starts = ("query_start", "kv_length", "page_table")
    context = g.add("attention", q, k, v, *starts, name="attention", layer=0, scale=0.5)
    attended = linear(g.add("reshape", context, name="context", shape=("T", 8)), "out")
    hidden = linear(g.add(SQUARE.name, linear(x, "fc1"), name="square", by=0.5), "fc2")
    x = g.add("add", g.add("add", x, attended, name="sum"), hidden, name="both")
    return g.finish(linear(x, "head"))


def test_ranks_share_what_is_done_to_heads_and_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the composed graph on one rank."""
    monkeypatch.setitem(registry._OPS, SQUARE.name, SQUARE)
    composed, inputs, sharding = unusual_decoder(), three_rows(11), ShardingOptions(tp_size=2)
    weights = random_weights(composed)

    def part(node: Node, rank: int) -> torch.Tensor:
        how = {"unit": node.attrs["unit"], "name": node.name}
        rule = Shard(node.attrs["shard"])
        bounds = slice_bounds(node.attrs["shape"], rule, sharding, rank, **how)
        whole = weights[node.name]
        return whole if bounds is None else narrow_or_pad(whole, bounds)

    def run(rank: int, communicator: RankCommunicator) -> torch.Tensor:
        parts = optimized(composed, sharding=sharding, rank=rank)
        mine = {node.name: part(node, rank) for node in composed.weights}
        return evaluate(parts.graph, stored_weights(parts, mine), inputs, communicator)

    for logits in run_ranks(2, run):
        assert max_error(logits, evaluate(composed, weights, inputs)) <= FLOAT64_ABS


def test_an_op_of_a_plugin_that_does_not_say_so_is_whole_on_every_rank(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(registry._OPS, SQUARE.name, dataclasses.replace(SQUARE, column_wise=False))
    with pytest.raises(BuildError, match=r"their_square 'square' cannot .* says column_wise=True"):
        shard(unusual_decoder(), ShardingOptions(tp_size=2), 0)


@pytest.mark.parametrize(("op", "attrs"), [("slice", {"start": 0, "stop": 2}), ("split", {"sizes": (4, 4)})])
def test_parts_of_a_split_axis_are_refused(op: str, attrs: dict[str, Any]) -> None:
    g, x = sharded(Shard.COLUMN, w=(8, 8))
    y = g.add("linear", x, g.weight("w"), name="y")
    (part, *_) = g.add_many(op, y, name="part", axis=1, **attrs)
    with pytest.raises(BuildError, match=f"{op} 'part' cannot work with inputs split"):
        shard(g.finish(part), ShardingOptions(tp_size=2), 0)


def test_one_rank_is_left_as_it_is() -> None:
    graph = toy_decoder()
    assert shard(graph, ShardingOptions(), 0) is graph


def test_a_row_split_weight_needs_a_split_input() -> None:
    g, x = sharded(Shard.ROW, w=(8, 8))
    graph = g.finish(g.add("linear", x, g.weight("w"), name="y"))
    with pytest.raises(
        BuildError, match=r"tp_size 2: linear 'y' cannot work with inputs split along \(%x: None, %w: 1\)"
    ):
        shard(graph, ShardingOptions(tp_size=2), 0)


def test_an_op_over_a_split_axis_is_refused() -> None:
    """Oracle: a norm needs the whole row, and three heads are not to be had by two ranks."""
    g, x = sharded(Shard.COLUMN, w=(8, 8))
    y = g.add("linear", x, g.weight("w"), name="y")
    with pytest.raises(BuildError, match="layer_norm 'n' cannot work with inputs split"):
        shard(g.finish(g.add("layer_norm", y, name="n", eps=1e-5)), ShardingOptions(tp_size=2), 0)
    g, x = sharded(Shard.COLUMN, w=(12, 8))
    y = g.add("linear", x, g.weight("w"), name="y")
    with pytest.raises(BuildError, match="reshape 'r' cannot work with inputs split"):
        shard(g.finish(g.add("reshape", y, name="r", shape=("T", 3, 4))), ShardingOptions(tp_size=2), 0)


def test_a_size_too_small_for_the_ranks_is_named() -> None:
    g, x = sharded(Shard.COLUMN, w=(5, 8))
    graph = g.finish(g.add("linear", x, g.weight("w"), name="y"))
    with pytest.raises(
        ConfigError, match="w: a size of 5 over tp_size 4, 2 on each rank, would leave 1 without"
    ):
        shard(graph, ShardingOptions(tp_size=4), 0)


def test_a_split_sum_takes_a_split_vector_only() -> None:
    """[T, 4 of 8] + [4 of 8] fits; the whole vector does not."""
    g, x = sharded(Shard.COLUMN, w=(8, 8), b=(8,))
    y = g.add("linear", x, g.weight("w"), name="y")
    graph = g.finish(g.add("add", y, g.weight("b"), name="sum"))
    with pytest.raises(BuildError, match=r"output %sum is split .* the head is vocab_head"):
        shard(graph, ShardingOptions(tp_size=2), 0)
    g = GraphBuilder(DType.FLOAT32, [*weight_rows(table=(11, 8), b=(8,)),
                                     ResolvedWeight("w", (), (8, 8), Shard.COLUMN, IDENTITY)])  # fmt: skip
    x = g.add("embedding", "token_ids", g.weight("table"), name="x", offset=0)
    y = g.add("linear", x, g.weight("w"), name="y")
    with pytest.raises(BuildError, match="add 'sum' cannot work with inputs split"):
        shard(g.finish(g.add("add", y, g.weight("b"), name="sum")), ShardingOptions(tp_size=2), 0)
