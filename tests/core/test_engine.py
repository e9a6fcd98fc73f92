"""The engine directory. Oracles: what was built, and for damage the rule that nothing damaged is ever opened."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
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
from trtc.core.engine_files import DESCRIPTION, FORMAT_VERSION, is_engine, sha256
from trtc.core.errors import BuildError, ConfigError, EngineError
from trtc.core.graph import Graph, GraphBuilder
from trtc.core.interpreter import interpret
from trtc.core.ops import Op, registry
from trtc.core.passes import optimize
from trtc.core.plugin_registry import PluginRegistry
from trtc.core.safetensors_io import SafetensorsFile, write_file
from trtc.core.sharding import ShardingOptions
from trtc.core.targets.cpu import TARGET, CpuProgram
from trtc.tests.opt_models import BUILD, OptCheckpoint, hf_logits
from trtc.tests.packed_steps import PagedSequences, filled_cache
from trtc.tests.thread_group import RankCommunicator, run_ranks
from trtc.tests.tolerances import LOGITS_FLOAT32_ABS, max_error
from trtc.tests.toy_decoder import weight_rows

VARIANT = "post_norm_projected"


@pytest.fixture(scope="module")
def checkpoint(opt_checkpoint: Callable[[str], OptCheckpoint]) -> OptCheckpoint:
    return opt_checkpoint(VARIANT)


@pytest.fixture(scope="module")
def built(checkpoint: OptCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine with two weight files and two tokenizer files."""
    source = tmp_path_factory.mktemp("text")
    (source / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    (source / "tokenizer.json").write_text("{}")
    folder = tmp_path_factory.mktemp("built") / "engine"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_module, "FILE_BYTES", 300_000)
        build_module.build_engine(
            checkpoint.family,
            checkpoint.config,
            checkpoint.weights(),
            BUILD,
            folder,
            text_files=source,
            workers=2,
        )
    return folder


@pytest.fixture
def engine_dir(built: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(built, tmp_path / "engine"))


def refused(folder: Path, file: str, reason: str) -> None:
    """Opening must fail with one line that names the file and the reason."""
    with pytest.raises(EngineError) as error:
        Engine.open(folder)
    assert str(folder / file) in str(error.value)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def change_description(
    folder: Path, change: Callable[[dict[str, Any]], None], *, signed: bool = False
) -> None:
    """Edits engine.json; with `signed`, as someone who computes the digest anew."""
    data = json.loads((folder / DESCRIPTION).read_text())
    change(data)
    if signed:
        data.pop("digest")
        text = json.dumps(data, sort_keys=True, separators=(",", ":"))
        data["digest"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / DESCRIPTION).write_text(json.dumps(data, separators=(",", ":")) + "\n")


def first_node(data: dict[str, Any], op: str) -> dict[str, Any]:
    """The first node of `op` in the graph of rank 0 of a description."""
    return next(node for node in data["ranks"][0]["graph"]["nodes"] if node["op"] == op)


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


# ---- damage ------------------------------------------------------------------------------------------


def positions(size: int, count: int, seed: int) -> Iterator[int]:
    """The first and last sixteen bytes of a file, and `count` between."""
    edges = {*range(min(16, size)), *range(max(0, size - 16), size)}
    yield from sorted(edges | {random.Random(seed).randrange(size) for _ in range(count)})


def flipped_and_accepted(folder: Path, name: str, places: Iterator[int]) -> list[int]:
    """Those of `places` where an inverted bit of the file does not keep the engine from opening."""
    accepted = []
    content = (folder / name).read_bytes()
    for place in places:
        bit = 1 << place % 8
        damaged = content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :]
        (folder / name).write_bytes(damaged)
        with suppress(EngineError):
            Engine.open(folder)
            accepted.append(place)
    (folder / name).write_bytes(content)
    return accepted


def test_a_flipped_bit_anywhere_is_refused(engine_dir: Path) -> None:
    for seed, entry in enumerate(sorted(engine_dir.iterdir())):
        size = entry.stat().st_size
        count = 120 if entry.name == DESCRIPTION else 30
        assert flipped_and_accepted(engine_dir, entry.name, positions(size, count, seed)) == [], entry.name
    Engine.open(engine_dir)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"e-05", b"E-05"),
        (b"\n", b" "),
        (b"0.3535533905932738", b"0.3535533905932737"),
        (b'"T"', b'"\\u0054"'),
    ],
)
def test_an_edit_that_leaves_the_values_is_refused_too(old: bytes, new: bytes, engine_dir: Path) -> None:
    """Spellings of the same JSON value, or nearly the same number."""
    text = (engine_dir / DESCRIPTION).read_bytes()
    if old.startswith(b"0."):
        scale = json.loads(text)["ranks"][0]["graph"]["nodes"]
        old = repr(next(node["attrs"]["scale"] for node in scale if node["op"] == "attention")).encode()
        new = old[:-1] + bytes([old[-1] ^ 1])
    assert old in text
    (engine_dir / DESCRIPTION).write_bytes(text.replace(old, new, 1))
    refused(engine_dir, DESCRIPTION, "does not match its digest: the file was damaged or edited")


@pytest.mark.parametrize("keep", [0, 1, 0.5, -1], ids=["empty", "one byte", "half", "all but one byte"])
def test_a_truncated_file_is_refused(keep: float, built: Path, tmp_path: Path) -> None:
    for name in sorted(entry.name for entry in built.iterdir()):
        folder = Path(shutil.copytree(built, tmp_path / name))
        content = (folder / name).read_bytes()
        size = int(len(content) * keep) if 0 < keep < 1 else int(keep) % len(content)
        (folder / name).write_bytes(content[:size])
        what = (
            "" if name == DESCRIPTION else f"has {size} bytes, expected {len(content)}: truncated or replaced"
        )
        refused(folder, name, what)


def test_a_missing_file_is_refused(built: Path, tmp_path: Path) -> None:
    for name in sorted(entry.name for entry in built.iterdir()):
        folder = Path(shutil.copytree(built, tmp_path / name))
        (folder / name).unlink()
        if name == DESCRIPTION:
            with pytest.raises(EngineError, match=r"not an engine directory: it has no engine.json"):
                Engine.open(folder)
        else:
            refused(folder, name, "file of the engine is missing")


def test_no_folder_and_a_file_are_refused(tmp_path: Path) -> None:
    refused(tmp_path / "none", "", "no such folder; `trtc build` makes an engine directory")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "", "no such folder")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "not valid JSON"),
        ("[]", "must be a JSON object, is list"),
        ("{}", "format is None, not 'trtc-engine': not an engine of trtc"),
        ('{"version": "0.10", "pretrained_config": {}}', "format is None"),
        ('{"format": "trtc-checkpoint"}', "format is 'trtc-checkpoint'"),
        ('{"format": "trtc-engine", "format": "trtc-engine"}', "occurs twice"),
        (f'{{"format": "trtc-engine", "format_version": {FORMAT_VERSION}}}', "keys are"),
        ("\x00\xff", "not valid JSON"),
    ],
)
def test_a_foreign_description_is_refused(content: str, reason: str, engine_dir: Path) -> None:
    (engine_dir / DESCRIPTION).write_bytes(content.encode("latin-1"))
    refused(engine_dir, DESCRIPTION, reason)


@pytest.mark.parametrize("version", [0, FORMAT_VERSION + 1, "1", None])
def test_another_format_version_is_refused(version: object, engine_dir: Path) -> None:
    """Even if all else is sound; the message says which trtc wrote it and what to do."""
    change_description(
        engine_dir, lambda data: data.update(format_version=version, trtc_version="9.8.7"), signed=True
    )
    refused(engine_dir, DESCRIPTION, f"written by trtc 9.8.7 in engine format {version!r}")
    refused(engine_dir, DESCRIPTION, "build the engine again")


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data["build"].update(max_batch_size=64),
        lambda data: data["model"].update(eos_token_ids=[3]),
        lambda data: data["ranks"][0]["graph"]["outputs"].clear(),
        lambda data: data.update(digest="0" * 64),
        lambda data: data["files"].pop("tokenizer.json"),
    ],
    ids=["build option", "model", "graph", "digest", "file list"],
)
def test_an_edited_description_is_refused(change: Callable[[dict[str, Any]], None], engine_dir: Path) -> None:
    change_description(engine_dir, change)
    refused(engine_dir, DESCRIPTION, "does not match its digest: the file was damaged or edited")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: data["model"].pop("vocab_size"), "missing: vocab_size"),
        (lambda data: data["build"].update(page_size=17), "page_size: 17 is not supported"),
        (lambda data: data["build"].update(target="tpu"), "built for target 'tpu'; this is trtc"),
        (lambda data: data["ranks"][0].pop("graph"), "'graph'"),
        (
            lambda data: data["ranks"][0]["graph"]["nodes"][-1].update(op="frobnicate"),
            "nor a plugin that it loaded has the op frobnicate",
        ),
        (lambda data: data["ranks"][0]["graph"]["nodes"].pop(0), "is not defined before it is used"),
        (lambda data: data["ranks"].clear(), "holds 0 ranks for tp_size 1"),
        (lambda data: data["ranks"][0]["weights"].clear(), "rank 0 has no weight"),
        (
            lambda data: data["model"].update(eos_token_ids=[[2]]),
            "eos_token_ids is [[2]]; accepted: a list",
        ),
        (
            lambda data: data["model"].update(bos_token_id=True),
            "bos_token_id is True; accepted: a whole number or null",
        ),
        (
            lambda data: data["build"].update(target_options="fast"),
            "target_options is 'fast'; accepted: an object",
        ),
        (lambda data: data["ranks"][0].update(artifacts="page_table"), "dictionary update sequence"),
        (lambda data: data["ranks"][0]["graph"]["outputs"].clear(), "the graph has no output"),
        (
            lambda data: first_node(data, "embedding")["inputs"].extend(["positions"] * 3),
            "has 7 inputs; accepted: at most 4",
        ),
        (
            lambda data: first_node(data, "embedding")["attrs"].update(offset="x"),
            "attribute offset is 'x'; accepted",
        ),
        (
            lambda data: data["ranks"][0].update(weights=["tokenizer_config.json", "x", "a"]),
            "weights are in ['a', 'x'], which is not among the files",
        ),
        (
            lambda data: data["files"].update({"../x": {"bytes": 1, "sha256": ""}}),
            "KeyError('../x') in files",
        ),
    ],
    ids=lambda value: None if callable(value) else value[:30],
)
def test_a_signed_description_that_makes_no_sense_is_refused(
    change: Callable[[dict[str, Any]], None], reason: str, engine_dir: Path
) -> None:
    """As a bug, or another program, could write it."""
    change_description(engine_dir, change, signed=True)
    with pytest.raises(EngineError) as error:
        Engine.open(engine_dir).map_weights(0)
    assert str(engine_dir) in str(error.value)
    assert reason in str(error.value)


def renamed_op(data: dict[str, Any]) -> None:
    """The first layer norm becomes an op of a plugin."""
    next(node for node in data["ranks"][0]["graph"]["nodes"] if node["op"] == "layer_norm")["op"] = (
        "their_norm"
    )


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("opt", "`trtc plugins` lists those that there are"),
        ("gone", "no plugin provides model family 'gone'"),
    ],
)
def test_an_engine_without_the_plugin_of_its_ops_says_which(
    family: str, reason: str, engine_dir: Path
) -> None:
    def change(data: dict[str, Any]) -> None:
        renamed_op(data)
        data["model"]["family"] = family

    change_description(engine_dir, change, signed=True)
    refused(
        engine_dir,
        DESCRIPTION,
        f"neither trtc {__version__} nor a plugin that it loaded has the op their_norm",
    )
    refused(engine_dir, DESCRIPTION, reason)


def test_opening_an_engine_loads_the_plugins(engine_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no command has to think of it: a plugin registers an op when it is loaded."""
    change_description(engine_dir, renamed_op, signed=True)

    def load() -> PluginRegistry:
        op = dataclasses.replace(registry.get_op("layer_norm"), name="their_norm")
        monkeypatch.setitem(registry._OPS, "their_norm", op)
        return PluginRegistry(())

    monkeypatch.setattr("trtc.core.engine.plugins", load)
    assert "their_norm" in {node.op for node in Engine.open(engine_dir).ranks[0].graph.nodes}


def test_weights_that_do_not_fit_the_graph_are_refused(engine_dir: Path) -> None:
    """Without hashes compared; the size of the file is right."""
    name = "rank0-0.safetensors"
    with SafetensorsFile(engine_dir / name) as file:
        tensors = {key: file.read(key) for key in file.tensors}
    victim = next(key for key, tensor in tensors.items() if tensor.ndim == 2)
    changes = {
        "shape": tensors[victim].reshape(-1),
        "dtype": tensors[victim].view(torch.int32),
    }
    for changed in changes.values():
        write_file(engine_dir / name, tensors | {victim: changed.clone()})
        content = (engine_dir / name).read_bytes()
        change_description(
            engine_dir, lambda data: data["files"][name].update(bytes=len(content)), signed=True
        )
        engine = Engine.open(engine_dir, verify=False)
        with pytest.raises(EngineError, match=f"rank 0 has no weight '{victim}' of type float32"):
            engine.map_weights(0)


def test_a_damaged_weight_header_is_refused_without_hashes(engine_dir: Path) -> None:
    name = "rank0-0.safetensors"
    content = bytearray((engine_dir / name).read_bytes())
    content[3] ^= 0x10
    (engine_dir / name).write_bytes(content)
    engine = Engine.open(engine_dir, verify=False)
    with pytest.raises(EngineError, match=name):
        engine.map_weights(0)


def test_unverified_opening_still_compares_sizes(engine_dir: Path) -> None:
    with (engine_dir / "rank0-1.safetensors").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(EngineError, match=r"rank0-1.safetensors: has \d+ bytes, expected"):
        Engine.open(engine_dir, verify=False)


def test_the_graph_of_an_engine_is_a_graph(built: Path) -> None:
    """`print(graph)` names every tensor; the JSON in the file is the graph's own."""
    graph = Engine.open(built).ranks[0].graph
    stored = json.loads((built / DESCRIPTION).read_text())["ranks"][0]["graph"]
    assert Graph.from_json(stored) == graph
    assert all(f"%{node.name}: " in str(graph) for node in graph.nodes)
