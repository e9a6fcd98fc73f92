"""Nothing damaged is ever opened: an engine directory that was changed is refused, in one line that says what and where."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from trtc import __version__
from trtc.core.engine import Engine
from trtc.core.engine_files import DESCRIPTION, FORMAT_VERSION
from trtc.core.errors import EngineError
from trtc.core.ops import registry
from trtc.core.plugin_registry import PluginRegistry
from trtc.core.safetensors_io import SafetensorsFile, write_file


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
