"""Hugging Face folders: all layouts give the same tensors; damaged, foreign or dangerous ones are refused."""

import json
import os
import pickle
import tarfile
import zipfile

import pytest
import safetensors.torch
import torch
from trtc.core.dtypes import DType
from trtc.core.errors import CheckpointError
from trtc.core.hf import HFCheckpoint, read_config


def make_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(6, 4, generator=generator),
        "b": torch.randn(3, generator=generator).half(),
        "c": torch.randn(5, 5, generator=generator).bfloat16(),
    }


def write_folder(path, config="{}"):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(config)
    return path


def write_index(path, kind, locations):
    (path / f"{kind}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": locations}))


def save_single_safetensors(path, tensors):
    safetensors.torch.save_file(tensors, path / "model.safetensors", {"format": "pt"})


def save_sharded_safetensors(path, tensors):
    locations = {name: f"model-{i}-of-3.safetensors" for i, name in enumerate(tensors)}
    for name, file in locations.items():
        safetensors.torch.save_file({name: tensors[name]}, path / file)
    write_index(path, "model.safetensors", locations)


def save_single_bin(path, tensors):
    torch.save(tensors, path / "pytorch_model.bin")


def save_sharded_bin(path, tensors):
    locations = {name: f"pytorch_model-{i}-of-3.bin" for i, name in enumerate(tensors)}
    for name, file in locations.items():
        torch.save({name: tensors[name]}, path / file)
    write_index(path, "pytorch_model.bin", locations)


def save_legacy_bin(path, tensors):
    torch.save(tensors, path / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def save_sharded_legacy_bin(path, tensors):
    locations = {name: f"pytorch_model-{i}-of-3.bin" for i, name in enumerate(tensors)}
    for name, file in locations.items():
        torch.save({name: tensors[name]}, path / file, _use_new_zipfile_serialization=False)
    write_index(path, "pytorch_model.bin", locations)


LAYOUTS = [
    save_single_safetensors,
    save_sharded_safetensors,
    save_single_bin,
    save_sharded_bin,
    save_legacy_bin,
    save_sharded_legacy_bin,
]


@pytest.mark.parametrize("save", LAYOUTS)
def test_every_layout_gives_the_same_tensors(tmp_path, save):
    """Oracle: the tensors given to the official savers."""
    tensors = make_tensors()
    save(write_folder(tmp_path, '{"model_type": "x"}'), tensors)
    with HFCheckpoint.open(tmp_path) as checkpoint:
        assert checkpoint.config == {"model_type": "x"}
        assert checkpoint.shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        assert checkpoint.tensors["c"].dtype is DType.BFLOAT16
        for name, tensor in tensors.items():
            assert torch.equal(checkpoint.read(name), tensor)
            assert torch.equal(checkpoint.read_rows(name, 1, 3), tensor[1:3])


@pytest.mark.parametrize("legacy", [False, True])
def test_views_and_shared_storages_of_bin_files(tmp_path, legacy):
    """Oracle: the tensors themselves."""
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "transposed": base.t(),
        "slice": base[1:3, 2:5],
        "tied": base,
        "parameter": torch.nn.Parameter(base.clone()),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.0),
    }
    torch.save(
        tensors, write_folder(tmp_path) / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy
    )
    with HFCheckpoint.open(tmp_path) as checkpoint:
        for name, tensor in tensors.items():
            assert torch.equal(checkpoint.read(name), tensor.detach()), name
        assert torch.equal(checkpoint.read_rows("transposed", 2, 5), base.t()[2:5])


def test_safetensors_are_preferred(tmp_path):
    """Oracle: the order of transformers: one safetensors file, shards, one .bin, shards."""
    write_folder(tmp_path)
    found = []
    for save in reversed(
        [save_single_safetensors, save_sharded_safetensors, save_single_bin, save_sharded_bin]
    ):
        tensors = {name: torch.full_like(tensor, len(found)) for name, tensor in make_tensors().items()}
        save(tmp_path, tensors)
        with HFCheckpoint.open(tmp_path) as checkpoint:
            found.append(checkpoint.read("a")[0, 0].item())
    assert found == [0, 1, 2, 3]


def test_zip_bin_files_do_not_load_data_to_open(tmp_path):
    """A storage cut short on purpose: opening does not notice, reading says where the file ends."""
    path = write_folder(tmp_path) / "pytorch_model.bin"
    torch.save({"w": torch.ones(8)}, path)
    with HFCheckpoint.open(tmp_path) as checkpoint:
        os.truncate(path, checkpoint.tensors["w"].offset + 4)
        with pytest.raises(CheckpointError, match="'w': truncated"):
            checkpoint.read("w")


# ---- code in a pickle ----


class Attack:
    """Unpickles by calling os.mkdir."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def save_zip(value, path):
    torch.save(value, path)


def save_legacy(value, path):
    torch.save(value, path, _use_new_zipfile_serialization=False)


def save_plain_pickle(value, path):
    path.write_bytes(pickle.dumps(value, protocol=2))


@pytest.mark.parametrize("save", [save_zip, save_legacy, save_plain_pickle])
def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path, save):
    """Oracle: the folder that the code would make is not there; plain torch.load makes it."""
    path = write_folder(tmp_path / "model") / "pytorch_model.bin"
    save({"w": torch.ones(2), "evil": Attack(tmp_path / "hacked")}, path)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: ") as caught:
        HFCheckpoint.open(tmp_path / "model")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "hacked").exists()
    if save is not save_plain_pickle:
        assert "refused: its pickle holds code (posix.mkdir)" in str(caught.value)
        torch.load(path, weights_only=False)
        assert (tmp_path / "hacked").exists()


# ---- bad input ----


def a_file(path):
    path.rmdir()
    path.write_text("x")


def no_config(path):
    (path / "other").touch()


def no_weights(path):
    write_folder(path)


def config_not_json(path):
    save_single_safetensors(write_folder(path, '{\n  "a": 1,\n  oops\n}'), make_tensors())


def config_not_an_object(path):
    save_single_safetensors(write_folder(path, "[1]"), make_tensors())


def config_with_nan(path):
    save_single_safetensors(write_folder(path, '{"dropout": NaN}'), make_tensors())


def config_with_duplicates(path):
    save_single_safetensors(write_folder(path, '{"a": 1, "a": 2}'), make_tensors())


def tensorflow_only(path):
    (write_folder(path) / "tf_model.h5").touch()


def flax_only(path):
    (write_folder(path) / "flax_model.msgpack").touch()


def index_names_a_missing_file(path):
    save_sharded_safetensors(write_folder(path), make_tensors())
    (path / "model-1-of-3.safetensors").unlink()


def index_names_a_missing_bin(path):
    save_sharded_bin(write_folder(path), make_tensors())
    (path / "pytorch_model-2-of-3.bin").unlink()


def index_names_a_missing_tensor(path):
    save_sharded_safetensors(write_folder(path), make_tensors())
    write_index(path, "model.safetensors", {"a": "model-0-of-3.safetensors", "z": "model-0-of-3.safetensors"})


def index_leaves_the_folder(path):
    write_index(write_folder(path), "model.safetensors", {"a": "../model.safetensors"})


def index_without_map(path):
    (write_folder(path) / "model.safetensors.index.json").write_text("{}")


def truncated_safetensors(path):
    save_single_safetensors(write_folder(path), make_tensors())
    os.truncate(path / "model.safetensors", 200)


def truncated_bin(path):
    save_single_bin(write_folder(path), make_tensors())
    os.truncate(path / "pytorch_model.bin", 600)


def truncated_legacy_bin(path):
    save_legacy_bin(write_folder(path), make_tensors())
    os.truncate(path / "pytorch_model.bin", (path / "pytorch_model.bin").stat().st_size - 20)


def empty_bin(path):
    (write_folder(path) / "pytorch_model.bin").touch()


def text_as_bin(path):
    (write_folder(path) / "pytorch_model.bin").write_text("hello world")


def compressed_bin(path):
    save_single_bin(write_folder(path), make_tensors())
    with zipfile.ZipFile(path / "pytorch_model.bin") as old:
        content = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as new:
        for name, data in content.items():
            new.writestr(name, data)


def tar_bin(path):
    with tarfile.open(write_folder(path) / "pytorch_model.bin", "w") as archive:
        archive.add(path / "config.json")


def zip_of_something_else(path):
    with zipfile.ZipFile(write_folder(path) / "pytorch_model.bin", "w") as archive:
        archive.writestr("readme", "x")


def git_lfs_pointer(path):
    (write_folder(path) / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid x\n"
    )


def nested_state_dict(path):
    torch.save({"model": {"w": torch.ones(1)}}, write_folder(path) / "pytorch_model.bin")


def a_list(path):
    torch.save([torch.ones(1)], write_folder(path) / "pytorch_model.bin")


def double_precision(path):
    torch.save({"w": torch.ones(1).double()}, write_folder(path) / "pytorch_model.bin")


def sparse_tensor(path):
    torch.save({"w": torch.eye(3).to_sparse()}, write_folder(path) / "pytorch_model.bin")


BAD_INPUT = {
    a_file: "is a file; expected a Hugging Face checkpoint folder",
    lambda path: None: "is empty; expected",
    no_config: "has no config.json",
    no_weights: "holds no weights; accepted: model.safetensors",
    config_not_json: r"config\.json: not valid JSON: .*, line 3",
    config_not_an_object: r"config\.json: must be a JSON object, is list",
    config_with_nan: r"config\.json: not valid JSON: NaN",
    config_with_duplicates: r"config\.json: .*'a' occurs twice",
    tensorflow_only: r"holds only TensorFlow weights \(tf_model\.h5\)",
    flax_only: r"holds only Flax weights \(flax_model\.msgpack\)",
    index_names_a_missing_file: r"index\.json: names shards that are not there: model-1-of-3\.safetensors",
    index_names_a_missing_bin: r"index\.json: names shards that are not there: pytorch_model-2-of-3\.bin",
    index_names_a_missing_tensor: r"index\.json: names tensors .* do not hold: z in model-0",
    index_leaves_the_folder: r"index\.json: tensor 'a' is in '\.\./model\.safetensors'",
    index_without_map: r"index\.json: has no weight_map",
    truncated_safetensors: r"model\.safetensors: .*truncated",
    truncated_bin: r"pytorch_model\.bin: truncated or damaged",
    truncated_legacy_bin: r"pytorch_model\.bin: truncated, damaged",
    empty_bin: r"pytorch_model\.bin: truncated, damaged",
    text_as_bin: r"pytorch_model\.bin: truncated, damaged",
    compressed_bin: r"pytorch_model\.bin: is a compressed archive",
    tar_bin: r"pytorch_model\.bin: truncated, damaged",
    zip_of_something_else: r"pytorch_model\.bin: truncated, damaged",
    git_lfs_pointer: r"model\.safetensors: is a git-lfs pointer",
    nested_state_dict: r"pytorch_model\.bin: entry 'model' is of the kind dict",
    a_list: r"pytorch_model\.bin: holds a list",
    double_precision: r"pytorch_model\.bin: tensor 'w': torch dtype float64",
    sparse_tensor: r"pytorch_model\.bin: entry 'w' is of the kind torch\.sparse_coo",
}


@pytest.mark.parametrize(
    "make", BAD_INPUT, ids=lambda make: make.__name__.replace("<lambda>", "empty_folder")
)
def test_bad_input_gives_one_line_with_file_and_reason(tmp_path, make):
    folder = tmp_path / "model"
    folder.mkdir()
    make(folder)
    with (
        pytest.raises(CheckpointError, match=BAD_INPUT[make]) as caught,
        HFCheckpoint.open(folder) as checkpoint,
    ):
        assert checkpoint.config  # config.json is read when it is asked for
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    for read in (HFCheckpoint.open, read_config):
        with pytest.raises(CheckpointError, match="nowhere: no such folder"):
            read(tmp_path / "nowhere")
