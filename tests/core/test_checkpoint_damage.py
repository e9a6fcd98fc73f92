"""A trtc checkpoint that is damaged or incomplete is refused, with the file and the reason."""

import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
from trtc.core.checkpoint import TrtcCheckpoint, is_checkpoint
from trtc.core.errors import CheckpointError
from trtc.core.safetensors_io import SafetensorsFile
from trtc.core.sharding import ShardingOptions

from .small_checkpoints import convert_folder, make_tensors, write_folder


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_folder(tmp_path / "hf", make_tensors())


def edit(path: Path, **changes) -> None:
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(
        json.dumps({key: value for key, value in config.items() if value is not None})
    )


def swap_rank_for_another(path: Path) -> None:
    safetensors.torch.save_file({"other": torch.ones(1)}, path / "rank1.safetensors")
    files = json.loads((path / "config.json").read_text())["files"]
    files["rank1.safetensors"]["size"] = (path / "rank1.safetensors").stat().st_size
    edit(path, files=files)


def damage_header(path: Path) -> None:
    with open(path / "rank0.safetensors", "r+b") as file:
        file.seek(10)
        file.write(b"\0\0\0")


DAMAGES = {
    "missing rank": (lambda path: (path / "rank1.safetensors").unlink(), r"rank1\.safetensors: is missing"),
    "truncated": (
        lambda path: os.truncate(path / "rank1.safetensors", 99),
        r"rank1\.safetensors: has 99 bytes",
    ),
    "header": (damage_header, r"rank0\.safetensors: header: not valid JSON"),
    "other tensors": (swap_rank_for_another, r"rank1\.safetensors: does not hold the same tensors"),
    "no config": (lambda path: (path / "config.json").unlink(), r"config\.json: cannot be read"),
    "config cut": (lambda path: os.truncate(path / "config.json", 50), r"config\.json: not valid JSON"),
    "foreign": (lambda path: edit(path, format=None), "is not a trtc checkpoint"),
    "version": (
        lambda path: edit(path, format_version=2),
        "has the checkpoint format 2, .*this trtc reads format 1",
    ),
    "key missing": (lambda path: edit(path, aliases=None), r"config\.json: keys missing or unknown: aliases"),
    "sharding": (lambda path: edit(path, sharding={"tp_size": 2}), r"config\.json: sharding must be"),
    "more ranks": (lambda path: edit(path, sharding=ShardingOptions(4).to_json()), "do not fit tp_size 4"),
    "alias": (lambda path: edit(path, aliases={"head.weight": "nope"}), "alias 'head.weight' of 'nope'"),
    "files": (lambda path: edit(path, files=3), r"config\.json: files must be an object"),
    "file record": (
        lambda path: edit(path, files={f"rank{r}.safetensors": 1 for r in (0, 1)}),
        "rank0.* size",
    ),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_checkpoints_are_refused_with_file_and_reason(folder, tmp_path, case):
    damage, reason = DAMAGES[case]
    convert_folder(folder, tmp_path / "out", 2)
    damage(tmp_path / "out")
    with pytest.raises(CheckpointError, match=reason) as caught:
        TrtcCheckpoint.open(tmp_path / "out")
    assert str(tmp_path / "out") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_flipped_byte_is_found_by_verify(folder, tmp_path):
    convert_folder(folder, tmp_path / "out")
    with SafetensorsFile(tmp_path / "out" / "rank0.safetensors") as file:
        offset = file.tensors["layers.0.up.weight"].offset
    with open(tmp_path / "out" / "rank0.safetensors", "r+b") as raw:
        raw.seek(offset)
        byte = raw.read(1)
        raw.seek(offset)
        raw.write(bytes([byte[0] ^ 1]))
    with pytest.raises(CheckpointError, match=r"rank0\.safetensors: damaged: sha256"):
        TrtcCheckpoint.open(tmp_path / "out").verify()


def test_a_hugging_face_folder_is_not_a_checkpoint(folder, tmp_path):
    assert not is_checkpoint(folder)
    assert not is_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="is not a trtc checkpoint; make one with `trtc convert`"):
        TrtcCheckpoint.open(folder)
    for path, what in ((tmp_path / "nowhere", "no such folder"), (folder / "config.json", "is a file")):
        with pytest.raises(CheckpointError, match=what):
            TrtcCheckpoint.open(path)


def test_unknown_ranks_and_names_are_named(folder, tmp_path):
    convert_folder(folder, tmp_path / "out")
    checkpoint = TrtcCheckpoint.open(tmp_path / "out")
    with pytest.raises(CheckpointError, match="has no rank 1; it was converted for tp_size 1"):
        checkpoint.read(1, "embed.weight")
    for ask in (checkpoint.read, checkpoint.shape, checkpoint.dtype):
        with pytest.raises(CheckpointError, match="holds no tensor 'nope'"):
            ask(0, "nope")
