"""What a build leaves in an engine directory, and what cannot be built. Damage: see test_engine_damage."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from trtc import __version__
from trtc.core import build as build_module
from trtc.core import layers
from trtc.core.config import BuildConfig
from trtc.core.dtypes import DType
from trtc.core.engine import Engine
from trtc.core.engine_files import DESCRIPTION, is_engine, sha256
from trtc.core.errors import BuildError, ConfigError
from trtc.core.graph import Graph, GraphBuilder
from trtc.core.interpreter import interpret
from trtc.core.ops import Op, registry
from trtc.core.passes import optimize
from trtc.core.safetensors_io import SafetensorsFile
from trtc.core.sharding import ShardingOptions
from trtc.core.targets.cpu import TARGET, CpuProgram
from trtc.tests.opt_models import BUILD, OptCheckpoint, hf_logits
from trtc.tests.packed_steps import PagedSequences, filled_cache
from trtc.tests.thread_group import RankCommunicator, run_ranks
from trtc.tests.tolerances import LOGITS_FLOAT32_ABS, max_error
from trtc.tests.toy_decoder import weight_rows

# ---- what a build leaves -----------------------------------------------------------------------------


def test_an_engine_says_what_it_is(built: Path, checkpoint: OptCheckpoint) -> None:
    engine = Engine.open(built)
    assert engine.trtc_version == __version__
    assert engine.model == checkpoint.config.base()
    assert engine.build == BUILD
    names = {entry.name for entry in built.iterdir()}
    weights = {"rank0-0.safetensors", "rank0-1.safetensors"}
    assert names == {DESCRIPTION, "tokenizer_config.json", "tokenizer.json", *weights}
    assert set(engine.files) == names - {DESCRIPTION}
    for name, entry in engine.files.items():
        content = (built / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (rank,) = engine.ranks
    assert set(rank.weights) == weights


def test_the_graph_comes_back_as_the_passes_left_it(built: Path, checkpoint: OptCheckpoint) -> None:
    """Oracle: the pipeline, run again."""
    can = TARGET.capabilities(BUILD)
    parts = optimize(
        checkpoint.family.compose(checkpoint.config),
        sharding=ShardingOptions(),
        rank=0,
        aliases=checkpoint.weights().aliases,
        fusions=can.fusions,
        ops=can.ops,
    )
    graph = Engine.open(built).ranks[0].graph
    assert graph == parts.graph
    assert graph.hash == parts.graph.hash


def test_weights_are_mapped_as_they_were_made(built: Path, checkpoint: OptCheckpoint) -> None:
    """Oracles: the checkpoint's tensors, and the recipes of the others, evaluated here. Mapped, not copied: the tensors
    of a file lie in one range of memory, at the offsets that the file gives them."""
    engine, source = Engine.open(built), checkpoint.weights()
    parts = build_module.plan(checkpoint.family, checkpoint.config, source, BUILD, 0)
    mapped = engine.map_weights(0)
    assert {node.name for node in engine.ranks[0].graph.weights} == set(mapped)
    assert parts.recipes, "this variant has weights to compute"
    for name, tensor in mapped.items():
        recipe = parts.recipes.get(name)
        if recipe is None:
            expected = source.read(0, name)
        else:
            expected = interpret(recipe, {node.name: source.read(0, node.name) for node in recipe.weights})
        assert torch.equal(tensor, expected), name
    for file in engine.ranks[0].weights:
        entries = SafetensorsFile(built / file).tensors
        assert len({mapped[name].data_ptr() - entry.offset for name, entry in entries.items()}) == 1


def test_two_builds_are_equal(checkpoint: OptCheckpoint, tmp_path: Path) -> None:
    """Byte for byte, whatever the number of workers."""
    for name, workers in (("one", 1), ("three", 3)):
        build_module.build_engine(
            checkpoint.family,
            checkpoint.config,
            checkpoint.weights(),
            BUILD,
            tmp_path / name,
            workers=workers,
        )
    files = sorted(entry.name for entry in (tmp_path / "one").iterdir())
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "three" / file).read_bytes()


def test_an_engine_of_two_ranks_gives_the_logits_of_one(
    opt_checkpoint: Callable[[str], OptCheckpoint], tmp_path: Path
) -> None:
    """Oracle: transformers. Both ranks run their graphs on the weights mapped from the engine, and really exchange."""
    checkpoint = opt_checkpoint("vocabulary_odd")
    sharding = ShardingOptions(tp_size=2, use_parallel_embedding=True)
    build = dataclasses.replace(BUILD, tp_size=2)
    weights = checkpoint.weights(sharding=sharding)
    build_module.build_engine(checkpoint.family, checkpoint.config, weights, build, tmp_path / "engine")
    engine = Engine.open(tmp_path / "engine")
    assert [set(part.weights) for part in engine.ranks] == [{"rank0-0.safetensors"}, {"rank1-0.safetensors"}]
    tokens = [5, 100, 50, 51, 0, 99, 1]
    inputs = PagedSequences(16, 4).step({"a": tokens})

    def run(rank: int, communicator: RankCommunicator) -> torch.Tensor:
        graph = engine.ranks[rank].graph
        cache = filled_cache(graph, 16, 4, torch.float32)
        return CpuProgram(graph, engine.map_weights(rank), cache, communicator=communicator).run(inputs)

    for logits in run_ranks(2, run):
        assert max_error(logits, hf_logits("vocabulary_odd", tokens)) <= LOGITS_FLOAT32_ABS


def test_progress_counts_every_weight(checkpoint: OptCheckpoint, tmp_path: Path) -> None:
    told: list[tuple[int, int, str]] = []
    build_module.build_engine(
        checkpoint.family, checkpoint.config, checkpoint.weights(), BUILD, tmp_path / "engine",
        progress=lambda done, total, name: told.append((done, total, name)),
    )  # fmt: skip
    weights = Engine.open(tmp_path / "engine").ranks[0].graph.weights
    assert [done for done, _, _ in told] == list(range(1, len(weights) + 1))
    assert {total for _, total, _ in told} == {len(weights)}
    assert {name for _, _, name in told} == {f"rank 0: {node.name}" for node in weights}


def test_is_engine(built: Path, tmp_path: Path) -> None:
    assert is_engine(built)
    assert not is_engine(tmp_path)
    assert not is_engine(tmp_path / "none")
    (tmp_path / DESCRIPTION).write_text('{"format": "other"}')
    assert not is_engine(tmp_path)


def test_sha256_is_that_of_hashlib(tmp_path: Path) -> None:
    content = random.Random(0).randbytes(5 << 20)  # more than one block
    (tmp_path / "file").write_bytes(content)
    assert sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("value", [1.0, -65504.0, 0.0, float("inf"), float("-inf"), float("nan")])
def test_what_is_finite(dtype: torch.dtype, value: float) -> None:
    """Oracle: torch."""
    x = torch.full((3, 5), 65504.0, dtype=dtype)
    x[1, 2] = value
    assert build_module._is_finite(x) == build_module._is_finite(x.t()) == bool(torch.isfinite(x).all())


def test_the_graph_of_an_engine_is_a_graph(built: Path) -> None:
    """`print(graph)` names every tensor; the JSON in the file is the graph's own."""
    graph = Engine.open(built).ranks[0].graph
    stored = json.loads((built / DESCRIPTION).read_text())["ranks"][0]["graph"]
    assert Graph.from_json(stored) == graph
    assert all(f"%{node.name}: " in str(graph) for node in graph.nodes)


# ---- builds that cannot be ---------------------------------------------------------------------------


def test_a_failed_build_leaves_nothing(checkpoint: OptCheckpoint, tmp_path: Path) -> None:
    """Oracle: the folder's parent is as empty as before. Values beyond float16 come out of a product of two weights."""
    config = checkpoint.config
    source = checkpoint.weights(DType.FLOAT16)
    read = source.read
    source.read = lambda rank, name: read(rank, name) * (3e4 if "embed" in name else 1)  # type: ignore[method-assign]
    model = type(config)(**{**config.to_json(), "dtype": DType.FLOAT16})
    message = r"'embed.tokens.projected' is not finite once it is computed in float16"
    with pytest.raises(BuildError, match=message):
        build_module.build_engine(checkpoint.family, model, source, BUILD, tmp_path / "engine")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "workers", "message"),
    [
        ({"max_seq_len": 129}, 1, "max_seq_len 129 exceeds the 128 positions of the model"),
        ({"target": "tpu"}, 1, "target 'tpu'"),
        ({"target_options": {"sm": 90}}, 1, "target cpu has no options, found: sm"),
        ({}, 0, "workers is 0; accepted: a whole number >= 1"),
    ],
)
def test_bad_options_are_named(
    options: dict[str, Any], workers: int, message: str, checkpoint: OptCheckpoint, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        build_module.build_engine(
            checkpoint.family, checkpoint.config, checkpoint.weights(),
            BuildConfig(**{"max_input_len": 64, "max_seq_len": 128, **options}), tmp_path / "engine", workers=workers,
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def composed(change: Callable[[GraphBuilder, str], str]) -> Any:
    """A family whose graph is a lookup, changed, and a head."""
    g = GraphBuilder(DType.FLOAT32, weight_rows(embed__weight=(11, 8), lm_head__weight=(11, 8)))
    graph = g.finish(layers.lm_head(g, change(g, layers.embedding(g, "token_ids", "embed"))))
    return SimpleNamespace(compose=lambda model: graph)


def attend(g: GraphBuilder, x: str, *heads: int) -> str:
    for layer, count in enumerate(heads):
        q = g.add("reshape", x, name=f"q{layer}", shape=("T", count, 8 // count))
        starts = ("query_start", "kv_length", "page_table")
        context = g.add("attention", q, q, q, *starts, name=f"attention{layer}", layer=layer, scale=1.0)
        x = g.add("reshape", context, name=f"context{layer}", shape=("T", 8))
    return x


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ((), "there is no attention"),
        ((2, 4), r"'attention0' has float32\[T, 2, 4\], 'attention1' has float32\[T, 4, 2\]"),
    ],
)
def test_layers_that_do_not_share_a_cache_are_refused(
    heads: tuple[int, ...], message: str, checkpoint: OptCheckpoint
) -> None:
    family = composed(lambda g, x: attend(g, x, *heads))
    with pytest.raises(BuildError, match=f"every attention layer needs keys of the same type, .*: {message}"):
        build_module.plan(family, checkpoint.config, checkpoint.weights(), BUILD, 0)


def test_an_op_that_no_plugin_brings_to_the_target_is_named(
    checkpoint: OptCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless the build evaluates it."""
    monkeypatch.setitem(registry._OPS, "their_op", Op("their_op", lambda sig: (sig[0],), lambda *_: None))
    target = dataclasses.replace(TARGET.capabilities(BUILD), ops=registry.op_names() - {"their_op"})
    monkeypatch.setattr(type(TARGET), "capabilities", lambda self, build: target)
    monkeypatch.setattr(build_module, "_check_weights", lambda *_: None)

    def planned(change: Callable[[GraphBuilder, str], str]) -> Graph:
        family = composed(lambda g, x: change(g, attend(g, x, 2)))
        return build_module.plan(family, checkpoint.config, checkpoint.weights(), BUILD, 0).graph

    with pytest.raises(
        BuildError, match="target cpu does not run their_op 'mine'; the op's plugin brings it"
    ):
        planned(lambda g, x: g.add("their_op", x, name="mine"))

    def on_a_weight(g: GraphBuilder, x: str) -> str:
        table = g.add("their_op", g.weight("embed.weight"), name="mine")
        return g.add("add", x, g.add("embedding", "token_ids", table, name="again", offset=0), name="sum")

    assert "their_op" not in {node.op for node in planned(on_a_weight).nodes}
