"""Stages of a pipeline. Oracle: the graph that was cut, in float64; for engines, transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from trtc.core.build import build_engine
from trtc.core.config import BuildConfig
from trtc.core.dtypes import DType
from trtc.core.engine import Engine
from trtc.core.errors import BuildError, ConfigError
from trtc.core.graph import Graph, GraphBuilder
from trtc.core.interpreter import interpret
from trtc.core.ops import ReferenceContext
from trtc.core.passes.stage import STAGE_INPUT, layers_of, stage
from trtc.core.sharding import ShardingOptions
from trtc.core.targets.cpu import CpuProgram
from trtc.tests.opt_models import BUILD, OptCheckpoint, hf_logits
from trtc.tests.packed_steps import PagedSequences, filled_cache
from trtc.tests.thread_group import RankCommunicator, run_ranks
from trtc.tests.tolerances import FLOAT64_ABS, LOGITS_FLOAT32_ABS, max_error
from trtc.tests.toy_decoder import random_weights, weight_rows

Tensors = Mapping[str, torch.Tensor]


def layered(layers: int, *, skip: bool = False) -> Graph:
    """Residual attention layers over an embedding, whose rows every layer scales by those of `scale`, looked up once.

    skip: the head also sees what the first layer gave.
    """
    names = [f"w{i}" for i in range(layers)]
    rows = weight_rows(table=(11, 8), scale=(11, 8), head=(11, 8), **dict.fromkeys(names, (8, 8)))
    g = GraphBuilder(DType.FLOAT32, rows)
    x = g.add("embedding", "token_ids", g.weight("table"), name="x", offset=0)
    scale = g.add("embedding", "token_ids", g.weight("scale"), name="scales", offset=0)
    results = []
    for i, name in enumerate(names):
        scaled = g.add("mul", x, scale, name=f"scaled{i}")
        q = g.add("linear", scaled, g.weight(name), name=f"q{i}")
        heads = g.add("reshape", q, name=f"heads{i}", shape=("T", 2, 4))
        mixed = g.add(
            "attention", heads, heads, heads, "query_start", "kv_length", "page_table",
            name=f"attention{i}", layer=i, scale=0.5,
        )  # fmt: skip
        flat = g.add("reshape", mixed, name=f"flat{i}", shape=("T", 8))
        x = g.add("add", x, flat, name=f"layer{i}")
        results.append(x)
    if skip:
        x = g.add("add", x, results[0], name="skip")
    return g.finish(g.add("linear", x, g.weight("head"), name="logits"))


def inputs() -> dict[str, torch.Tensor]:
    return PagedSequences(16, 4).step({"a": [5, 10, 3], "b": [1, 0, 9, 9]})


def value(graph: Graph, weights: Tensors, fed: Tensors) -> torch.Tensor:
    context = ReferenceContext(filled_cache(graph, 16, 4, torch.float64))
    result: torch.Tensor = interpret(graph, {**weights, **fed}, context)
    return result


@pytest.mark.parametrize(("layers", "count"), [(2, 2), (5, 2), (5, 3), (3, 3)])
def test_stages_one_after_the_other_are_the_whole(layers: int, count: int) -> None:
    whole = layered(layers)
    weights, fed = random_weights(whole), inputs()
    parts = [stage(whole, count, i).verify() for i in range(count)]
    assert [part.num_cache_layers for part in parts] == layers_of(layers, count)
    x = value(parts[0], weights, fed)
    for part in parts[1:]:
        assert [node.name for node in part.nodes if node.name == STAGE_INPUT] == [STAGE_INPUT]
        x = value(part, weights, {**fed, STAGE_INPUT: x})
    assert max_error(x, value(whole, weights, fed)) <= FLOAT64_ABS


def test_a_stage_has_what_it_needs_and_no_more() -> None:
    """What no layer makes, here the scales, is not sent: every stage has it. What crosses is the end of a layer."""
    first, second = (stage(layered(4), 2, i) for i in range(2))
    assert {node.name for node in first.weights} == {"table", "scale", "w0", "w1"}
    assert {node.name for node in second.weights} == {"scale", "head", "w2", "w3"}
    assert first.outputs == ("layer1",)
    assert second.specs[STAGE_INPUT] == first.specs["layer1"]


def test_one_stage_is_the_graph_itself() -> None:
    graph = layered(2)
    assert stage(graph, 1, 0) is graph


@pytest.mark.parametrize(
    ("layers", "stages", "expected"),
    [(4, 2, [2, 2]), (5, 2, [3, 2]), (7, 3, [3, 2, 2]), (3, 3, [1, 1, 1])],
)
def test_layers_are_dealt_out_evenly(layers: int, stages: int, expected: list[int]) -> None:
    assert layers_of(layers, stages) == expected


def test_where_two_tensors_cross_no_cut_is_made() -> None:
    graph = layered(3, skip=True)
    with pytest.raises(
        BuildError, match="cannot be cut between attention slots 1 and 2: more than one tensor"
    ):
        stage(graph, 2, 0)


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(BuildError, match="pp_size 3: the model has 2 layers; accepted: 1 to 2"):
        stage(layered(2), 3, 0)
    with pytest.raises(ConfigError, match="pp_size 3: the model has 2 layers; accepted: 1 to 2"):
        ShardingOptions(pp_size=3).check_layers(2)


@pytest.mark.parametrize(
    ("variant", "sharding"),
    [
        ("pre_norm", ShardingOptions(pp_size=2)),
        ("vocabulary_odd", ShardingOptions(tp_size=2, pp_size=2, use_parallel_embedding=True)),
        ("post_norm_projected", ShardingOptions(tp_size=2, pp_size=2)),
    ],
)
def test_an_engine_of_stages_gives_the_logits_of_transformers(
    variant: str, sharding: ShardingOptions, opt_checkpoint: Callable[[str], OptCheckpoint], tmp_path: Path
) -> None:
    """With a head that is tied to the embedding, which lies on another stage."""
    checkpoint = opt_checkpoint(variant)
    ranks = {"tp_size": sharding.tp_size, "pp_size": sharding.pp_size}
    build = BuildConfig(**{**vars(BUILD), **ranks})
    weights = checkpoint.weights(sharding=sharding)
    build_engine(checkpoint.family, checkpoint.config, weights, build, tmp_path / "engine")
    engine = Engine.open(tmp_path / "engine")
    assert len(engine.ranks) == sharding.num_ranks
    tokens = [5, 90, 50, 51, 0, 95, 1]
    fed = PagedSequences(16, 4).step({"a": tokens})

    def run(position: int, received: list[torch.Tensor]) -> list[torch.Tensor]:
        def member(index: int, communicator: RankCommunicator) -> torch.Tensor:
            rank = position * sharding.tp_size + index
            graph = engine.ranks[rank].graph
            cache = filled_cache(graph, 16, 4, torch.float32)
            program = CpuProgram(graph, engine.map_weights(rank), cache, communicator=communicator)
            return program.run(fed | ({STAGE_INPUT: received[index]} if received else {}))

        return run_ranks(sharding.tp_size, member)

    for logits in run(1, run(0, [])):
        assert max_error(logits, hf_logits(variant, tokens)) <= LOGITS_FLOAT32_ABS
