"""Conversion: shards are parts of the whole, outputs are atomic. Damage: see test_checkpoint_damage."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import safetensors.torch
import torch
from trtc.core import weight_source
from trtc.core.checkpoint import TrtcCheckpoint
from trtc.core.config import ModelConfig
from trtc.core.dtypes import DType, to_torch
from trtc.core.errors import CheckpointError, ConfigError, PluginError
from trtc.core.hf import HFCheckpoint
from trtc.core.sharding import ShardingOptions
from trtc.core.weight_source import DummyWeights, HFWeights
from trtc.core.weights import WeightRule, WeightTable

from .small_checkpoints import (
    CONFIG,
    HIDDEN,
    VOCAB,
    convert_folder,
    expected_whole,
    make_table,
    make_tensors,
    write_folder,
)


def put_together(source, name: str, axis: int | None) -> torch.Tensor:
    shards = [source.read(rank, name) for rank in range(source.sharding.tp_size)]
    if axis is None:
        assert all(torch.equal(shard, shards[0]) for shard in shards)
        return shards[0]
    return torch.cat(shards, dim=axis)


def axis_of(name: str, embedding_axis: int | None) -> int | None:
    """How each weight of the fake model is split over several ranks, by hand."""
    if name == "embed.weight":
        return embedding_axis
    if name == "positions.weight" or "norm" in name:
        return None
    return 1 if "down" in name else 0


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_folder(tmp_path / "hf", make_tensors())


EMBEDDING_AXES = [None, 0, 1]


def embedding_options(axis: int | None) -> dict:
    return {"use_parallel_embedding": axis is not None, "embedding_sharding_dim": axis or 0}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("embedding_axis", EMBEDDING_AXES)
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("block_bytes", [100, weight_source.BLOCK_BYTES])
def test_shards_put_together_are_the_whole(tmp_path, monkeypatch, tp, embedding_axis, tied, block_bytes):
    """Oracle: the tensors themselves, rearranged by hand; blocks of three rows and of whole tensors."""
    monkeypatch.setattr(weight_source, "BLOCK_BYTES", block_bytes)
    tensors = make_tensors(tied)
    write_folder(tmp_path / "hf", tensors)
    convert_folder(
        tmp_path / "hf", tmp_path / "out", tp, tied=tied, workers=2, **embedding_options(embedding_axis)
    )
    checkpoint = TrtcCheckpoint.open(tmp_path / "out")
    checkpoint.verify()
    whole = expected_whole(tensors)
    assert {*checkpoint.names(0), *checkpoint.aliases} == whole.keys()
    for name, tensor in whole.items():
        found = put_together(checkpoint, name, axis_of(name, embedding_axis) if tp > 1 else None)
        assert torch.equal(found[: len(tensor)], tensor), name
        assert not found[len(tensor) :].any(), name
        assert checkpoint.shape(0, name) == tuple(checkpoint.read(0, name).shape)
    shared = tied and (tp == 1 or embedding_axis == 0)
    assert checkpoint.aliases == ({"head.weight": "embed.weight"} if shared else {})


@pytest.mark.parametrize("embedding_axis", EMBEDDING_AXES)
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_the_view_without_a_file_equals_the_converted_file(folder, tmp_path, tp, embedding_axis):
    """Oracle: the file on disk, written block by block."""
    sharding = ShardingOptions(tp, **embedding_options(embedding_axis))
    convert_folder(folder, tmp_path / "out", tp, DType.BFLOAT16, **embedding_options(embedding_axis))
    checkpoint = TrtcCheckpoint.open(tmp_path / "out")
    with HFCheckpoint.open(folder) as source:
        weights = HFWeights(source, make_table(), CONFIG, dtype=DType.BFLOAT16, sharding=sharding)
        assert set(weights.names(0)) == set(checkpoint.names(0))
        assert weights.aliases == checkpoint.aliases
        for rank in range(tp):
            for name in [*weights.names(rank), *weights.aliases]:
                assert weights.shape(rank, name) == checkpoint.shape(rank, name)
                assert weights.dtype(rank, name) is checkpoint.dtype(rank, name) is DType.BFLOAT16
                assert torch.equal(weights.read(rank, name), checkpoint.read(rank, name))


@pytest.mark.parametrize("dtype", [DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16])
def test_values_are_cast_like_torch(folder, tmp_path, dtype):
    """Oracle: Tensor.to; the official library reads the file."""
    convert_folder(folder, tmp_path / "out", dtype=dtype)
    found = safetensors.torch.load_file(tmp_path / "out" / "rank0.safetensors")
    for name, tensor in expected_whole(make_tensors()).items():
        if name != "head.weight":
            assert torch.equal(found[name], tensor.to(to_torch(dtype)))


def test_the_description_says_what_was_converted(folder, tmp_path):
    convert_folder(folder, tmp_path / "out", 2, DType.FLOAT16)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["format"] == "trtc-checkpoint"
    assert config["hf_config"] == {}
    assert config["sharding"] == ShardingOptions(2).to_json()
    assert ModelConfig.from_json(config["model"]).dtype is DType.FLOAT16
    assert ModelConfig.from_json(config["model"]).vocab_size == VOCAB
    assert config["files"].keys() == {"rank0.safetensors", "rank1.safetensors"}


def test_tokenizer_files_are_copied_also_through_links(folder, tmp_path):
    """The folders of the hub's cache are links."""
    (folder / "tokenizer.json").rename(tmp_path / "blob")
    (folder / "tokenizer.json").symlink_to(tmp_path / "blob")
    (folder / "unknown.txt").touch()
    convert_folder(folder, tmp_path / "out")
    copied = tmp_path / "out" / "tokenizer.json"
    assert copied.read_text() == '{"a": "tokenizer"}'
    assert not copied.is_symlink()
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "rank0.safetensors", "tokenizer.json"]


def test_progress_counts_every_weight_once(folder, tmp_path):
    calls = []
    convert_folder(folder, tmp_path / "out", workers=2, progress=lambda *call: calls.append(call))
    names = TrtcCheckpoint.open(tmp_path / "out").names(0)
    assert [call[0] for call in calls] == list(range(1, len(names) + 1))
    assert {call[1] for call in calls} == {len(names)}
    assert {call[2] for call in calls} == set(names)


# ---- what cannot be converted ----


@pytest.mark.parametrize("workers", [1, 3])
def test_an_overflow_of_float16_names_the_tensor_and_leaves_nothing(tmp_path, workers):
    tensors = make_tensors()
    tensors["transformer.h.1.up.weight"][3, 2] = 1e5
    write_folder(tmp_path / "hf", tensors)
    with pytest.raises(CheckpointError, match=r"h\.1\.up\.weight': values up to 1e\+05 do not fit float16"):
        convert_folder(tmp_path / "hf", tmp_path / "out", dtype=DType.FLOAT16, workers=workers)
    assert os.listdir(tmp_path) == ["hf"]
    convert_folder(tmp_path / "hf", tmp_path / "out", dtype=DType.BFLOAT16)


def test_an_infinity_in_the_source_is_kept(tmp_path):
    tensors = make_tensors()
    tensors["transformer.h.1.up.weight"][3, 2] = float("inf")
    write_folder(tmp_path / "hf", tensors)
    convert_folder(tmp_path / "hf", tmp_path / "out", dtype=DType.FLOAT16)
    assert TrtcCheckpoint.open(tmp_path / "out").read(0, "layers.1.up.weight")[3, 2] == float("inf")


def test_integer_weights_are_refused(tmp_path):
    tensors = make_tensors()
    tensors["transformer.h.0.norm.weight"] = torch.ones(HIDDEN, dtype=torch.int32)
    write_folder(tmp_path / "hf", tensors)
    with pytest.raises(CheckpointError, match=r"transformer\.h\.0\.norm\.weight is int32; accepted: float32"):
        convert_folder(tmp_path / "hf", tmp_path / "out")


@dataclass(frozen=True)
class LastRow:
    """A transform of a family's own that does not do what it says."""

    raises: bool

    def describe(self):
        return "last row"

    def apply(self, tensor):
        return tensor.nothing if self.raises else tensor[-2:]

    def source_shape(self, shape):
        return (VOCAB, *shape[1:])


@pytest.mark.parametrize(
    ("raises", "named"),
    [(True, "raised AttributeError: 'Tensor'"), (False, r"gave \[2, 8\], expected \[1, 8\]")],
)
def test_a_transform_that_fails_is_named(tmp_path, raises, named):
    row = WeightRule("wte.weight", "row", (1, "hidden_size"), transform=LastRow(raises))
    table = WeightTable((row,), prefixes=("transformer.",), ignore=("*",))
    write_folder(tmp_path / "hf", make_tensors())
    with HFCheckpoint.open(tmp_path / "hf") as source:
        weights = HFWeights(source, table, CONFIG, dtype=DType.FLOAT32, sharding=ShardingOptions())
        with pytest.raises(PluginError, match=rf"'row': transform \(last row\) of \[13, 8\] {named}"):
            weights.read(0, "row")


@pytest.mark.parametrize(("tp", "named"), [(8, "layers.0.q.weight: 4 heads .* tp_size 8"), (3, "tp_size 3")])
def test_a_size_that_cannot_be_split_is_refused(folder, tmp_path, tp, named):
    with pytest.raises(ConfigError, match=named):
        convert_folder(folder, tmp_path / "out", tp)


def test_no_workers_are_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match="workers is 0"):
        convert_folder(folder, tmp_path / "out", workers=0)


def test_a_file_that_cannot_grow_is_named(folder, tmp_path):
    """Oracle: the limit of the system on the size of a file, as a full disk would end the write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"rank0\.safetensors: cannot be written: File too large"):
            convert_folder(folder, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "out").exists()


def test_a_folder_of_somebody_else_is_not_replaced(folder, tmp_path):
    with pytest.raises(ConfigError, match="is not an output of trtc"):
        convert_folder(folder, folder)
    assert (folder / "model.safetensors").exists()


# ---- dummy weights ----


def dummy(tp: int = 1, seed: int = 0, dtype=DType.FLOAT32, **embedding) -> DummyWeights:
    return DummyWeights(
        make_table(), CONFIG, dtype=dtype, sharding=ShardingOptions(tp, **embedding), seed=seed
    )


@pytest.mark.parametrize("embedding_axis", EMBEDDING_AXES)
@pytest.mark.parametrize("tp", [2, 4])
def test_dummy_shards_are_slices_of_the_same_whole(monkeypatch, tp, embedding_axis):
    """Oracle: one rank. Blocks of three rows, so that shards begin inside a block."""
    monkeypatch.setattr(weight_source, "BLOCK_BYTES", 100)
    one, many = dummy(), dummy(tp, **embedding_options(embedding_axis))
    for name in [*one.names(0), *one.aliases]:
        whole = one.read(0, name)
        found = put_together(many, name, axis_of(name, embedding_axis))
        assert torch.equal(found[: len(whole)], whole)
        assert not found[len(whole) :].any()


def test_dummy_values_depend_on_seed_and_name_only():
    assert torch.equal(dummy().read(0, "layers.0.up.weight"), dummy().read(0, "layers.0.up.weight"))
    assert not torch.equal(dummy().read(0, "layers.0.up.weight"), dummy(seed=1).read(0, "layers.0.up.weight"))
    assert not torch.equal(dummy().read(0, "layers.0.up.weight"), dummy().read(0, "layers.1.up.weight"))


def test_dummy_values_are_distributed_as_promised():
    """Oracle: mean 0 (norms 1) and standard deviation 0.02, within five standard errors."""
    large = ModelConfig.from_json(CONFIG.to_json() | {"vocab_size": 5000})
    weights = DummyWeights(make_table(), large, dtype=DType.FLOAT16, sharding=ShardingOptions())
    values = weights.read(0, "embed.weight").float()
    assert abs(values.mean()) < 5 * 0.02 / values.numel() ** 0.5
    assert abs(values.std() - 0.02) < 5 * 0.02 / (2 * values.numel()) ** 0.5
    assert (weights.read(0, "layers.0.norm.weight").float() - 1).abs().max() < 0.2


# ---- kill ----

CONVERT_FOREVER = textwrap.dedent(
    """
    import itertools, sys
    from pathlib import Path
    import torch
    from trtc.core.checkpoint import convert
    from trtc.core.config import ModelConfig
    from trtc.core.hf import HFCheckpoint
    from trtc.core.dtypes import DType
    from trtc.core.safetensors_io import write_file
    from trtc.core.sharding import Shard, ShardingOptions
    from trtc.core.weights import WeightRule, WeightTable

    root = Path(sys.argv[1])
    sizes = dict.fromkeys(ModelConfig.__dataclass_fields__, 1)
    config = ModelConfig.from_json(
        sizes | {"family": "x", "architecture": "x", "dtype": "float32", "tie_word_embeddings": False,
                 "num_layers": 40, "eos_token_ids": []})
    table = WeightTable((WeightRule("w.{i}", "w.{i}", (64, 64), Shard.COLUMN),))
    for round in itertools.count():
        tensors = {f"w.{i}": torch.full((64, 64), float(round)) for i in range(40)}
        write_file(root / "hf" / "model.safetensors", tensors)
        with HFCheckpoint.open(root / "hf") as source:
            sharding = ShardingOptions(2)
            convert(source, table, config, root / "out", dtype=DType.FLOAT16, sharding=sharding, workers=2)
        print("there is one", flush=True)
    """
)


def test_kill_leaves_the_old_output_or_the_new_one(tmp_path):
    """Oracle: after every SIGKILL the output verifies, and its values are of one round."""
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    moments = random.Random(0)
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", CONVERT_FOREVER, str(tmp_path)], stdout=subprocess.PIPE
        )
        assert process.stdout.readline() == b"there is one\n"
        time.sleep(0.2 + 0.6 * moments.random())
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        checkpoint = TrtcCheckpoint.open(tmp_path / "out")
        checkpoint.verify()
        values = {
            value
            for rank in (0, 1)
            for name in checkpoint.names(rank)
            for value in checkpoint.read(rank, name).unique()
        }
        assert len({float(value) for value in values}) == 1
