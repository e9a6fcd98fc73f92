"""Safetensors files: we and the official library read what the other writes; bad headers are refused."""

import json
import struct
import threading
import warnings

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trtc.core.dtypes import DType, to_torch
from trtc.core.errors import CheckpointError
from trtc.core.safetensors_io import SafetensorsFile, SafetensorsWriter, read_header, write_file


def one_of_each_dtype() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    data = torch.randn((5, 7), generator=generator)
    tensors = {dtype.value: data.mul(10).to(to_torch(dtype)) for dtype in DType}
    return {**tensors, "scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4, dtype=torch.float16)}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), (
            name
        )


def test_official_library_reads_what_we_write(tmp_path):
    """Oracle: safetensors.torch.load_file."""
    tensors = one_of_each_dtype()
    write_file(tmp_path / "ours", tensors)
    assert_same(safetensors.torch.load_file(tmp_path / "ours"), tensors)


def test_we_read_what_the_official_library_writes(tmp_path):
    """Oracle: the tensors given to safetensors.torch.save_file."""
    tensors = one_of_each_dtype()
    safetensors.torch.save_file(tensors, tmp_path / "official", {"format": "pt"})
    with SafetensorsFile(tmp_path / "official") as file:
        assert_same({name: file.read(name) for name in file.tensors}, tensors)
        assert_same({name: file.map(name) for name in file.tensors}, tensors)


def test_every_tensor_we_write_is_aligned(tmp_path):
    write_file(tmp_path / "x", one_of_each_dtype())
    for entry in read_header(tmp_path / "x").values():
        assert entry.offset % entry.dtype.itemsize == 0


def test_map_is_a_view_of_the_file_without_warnings(tmp_path):
    """Oracle: a byte changed in the file shows in a tensor that was mapped before."""
    write_file(tmp_path / "x", {"w": torch.zeros(4, dtype=torch.uint8)})
    with SafetensorsFile(tmp_path / "x") as file, warnings.catch_warnings():
        warnings.simplefilter("error")
        mapped, copied = file.map("w"), file.read("w")
        offset = file.tensors["w"].offset
    with open(tmp_path / "x", "r+b") as raw:
        raw.seek(offset)
        raw.write(b"\x07")
    assert mapped.tolist() == [7, 0, 0, 0]
    assert copied.tolist() == [0, 0, 0, 0]


def test_map_copies_a_misaligned_tensor(tmp_path):
    """A foreign file may put a float after one byte."""
    header = {
        "byte": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "float": {"dtype": "F32", "shape": [1], "data_offsets": [1, 5]},
    }
    write_raw(tmp_path / "x", json.dumps(header), b"\x01" + struct.pack("<f", 2.5))
    with SafetensorsFile(tmp_path / "x") as file:
        assert file.map("float").tolist() == [2.5]


def test_rows_are_read_and_written_on_their_own(tmp_path):
    """Oracle: slices of the whole."""
    whole = torch.arange(24.0).reshape(6, 4)
    with SafetensorsWriter(tmp_path / "x", {"w": (DType.FLOAT32, (6, 4))}) as writer:
        writer.write_rows("w", 4, whole[4:])
        writer.write_rows("w", 0, whole[:4])
    with SafetensorsFile(tmp_path / "x") as file:
        assert torch.equal(file.read("w"), whole)
        assert torch.equal(file.read_rows("w", 1, 5), whole[1:5])


def test_threads_write_in_any_order(tmp_path):
    """Oracle: the official library reads every tensor as it was given, views included."""
    tensors = {f"w{i}": torch.full((100, 50), float(i)).t() for i in range(8)}
    specs = {name: (DType.FLOAT32, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with SafetensorsWriter(tmp_path / "x", specs) as writer:
        threads = [threading.Thread(target=writer.write, args=item) for item in reversed(tensors.items())]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert_same(safetensors.torch.load_file(tmp_path / "x"), tensors)


def test_a_file_that_is_not_filled_is_our_bug(tmp_path):
    writer = SafetensorsWriter(tmp_path / "x", {"w": (DType.FLOAT32, (2,))})
    with pytest.raises(AssertionError, match="not written completely: w"):
        writer.close()


@pytest.mark.parametrize("read", [SafetensorsFile.read, SafetensorsFile.map])
def test_an_unknown_tensor_is_named(tmp_path, read):
    write_file(tmp_path / "x", {"w": torch.zeros(1)})
    with (
        SafetensorsFile(tmp_path / "x") as file,
        pytest.raises(CheckpointError, match="holds no tensor 'nope'"),
    ):
        read(file, "nope")


def test_a_file_cut_after_it_was_opened_is_named(tmp_path):
    write_file(tmp_path / "x", {"w": torch.zeros(1000)})
    with SafetensorsFile(tmp_path / "x") as file:
        with open(tmp_path / "x", "r+b") as raw:
            raw.truncate(500)
        with pytest.raises(CheckpointError, match="tensor 'w': truncated: ends at byte 500"):
            file.read("w")


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere.*cannot be written: No such file"):
        SafetensorsWriter(tmp_path / "nowhere" / "x", {})
    with pytest.raises(CheckpointError, match=r"nowhere.*cannot be read: No such file"):
        read_header(tmp_path / "nowhere")


# ---- bad headers: the official library refuses every one of them too ----


def write_raw(path, header: str | bytes, data: bytes) -> None:
    text = header.encode() if isinstance(header, str) else header
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


BAD_HEADERS = {
    "not JSON": ("{not json", "not valid JSON"),
    "JSON list": ("[]", "must be a JSON object, is list"),
    "entry is no object": ({"w": 3}, "tensor 'w' must have exactly the keys"),
    "no dtype": ({"w": {"shape": [2], "data_offsets": [0, 8]}}, "tensor 'w' must have exactly the keys"),
    "unknown dtype": ({"w": entry(dtype="F33")}, "tensor 'w' has the dtype 'F33'"),
    "dtype is a list": ({"w": entry(dtype=[])}, "tensor 'w' has the dtype"),
    "NaN shape": ('{"w":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', "NaN is not a JSON number"),
    "float shape": ({"w": entry(shape=[2.0])}, "tensor 'w' has the shape"),
    "negative shape": ({"w": entry(shape=[-2])}, "tensor 'w' has the shape"),
    "shape is no list": ({"w": entry(shape=2)}, "tensor 'w' has the shape"),
    "shape does not fit": ({"w": entry(shape=[3])}, "8 bytes of data do not fit F32"),
    "offsets reversed": ({"w": entry(offsets=[8, 0])}, "data_offsets"),
    "one offset": ({"w": entry(offsets=[8])}, "data_offsets"),
    "overlap": ({"a": entry(offsets=[0, 8]), "b": entry(shape=[1], offsets=[4, 8])}, "'b' overlaps"),
    "hole": ({"w": entry(shape=[1], offsets=[4, 8])}, "'w' leaves a hole"),
    "beyond the end": ({"w": entry(shape=[4], offsets=[0, 16])}, "truncated"),
    "bytes left over": ({"w": entry(shape=[1], offsets=[0, 4])}, "bytes after the last tensor"),
    "metadata is no object": ({"__metadata__": 1, "w": entry()}, "__metadata__"),
    "metadata holds numbers": ({"__metadata__": {"a": 1}, "w": entry()}, "__metadata__"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_bad_headers_are_refused_with_file_and_reason(tmp_path, case):
    """Oracle: the official library, which must refuse the same file."""
    header, reason = BAD_HEADERS[case]
    write_raw(
        tmp_path / "bad.safetensors", header if isinstance(header, str) else json.dumps(header), b"\0" * 8
    )
    with pytest.raises(CheckpointError, match=r"bad\.safetensors.*" + reason) as caught:
        read_header(tmp_path / "bad.safetensors")
    assert "\n" not in str(caught.value)
    with pytest.raises(safetensors.SafetensorError):
        safetensors.torch.load_file(tmp_path / "bad.safetensors")


def test_duplicate_names_are_refused(tmp_path):
    tensor = json.dumps(entry())
    write_raw(tmp_path / "x", f'{{"w": {tensor}, "w": {tensor}}}', b"\0" * 8)
    with pytest.raises(CheckpointError, match="'w' occurs twice"):
        read_header(tmp_path / "x")


@pytest.mark.parametrize(
    "content", [b"", b"\1\2\3", struct.pack("<Q", 2**63) + b"{}", struct.pack("<Q", 100) + b"{}"]
)
def test_files_too_short_for_their_header(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        read_header(tmp_path / "x")


@settings(max_examples=150, deadline=None)
@given(position=st.integers(0, 200), value=st.integers(0, 255), cut=st.integers(0, 300))
def test_damaged_bytes_give_a_checkpoint_error_or_a_file_the_official_library_reads_too(
    tmp_path_factory, position, value, cut
):
    """Oracle: the official library; we may be stricter, never laxer."""
    path = tmp_path_factory.mktemp("damaged") / "x"
    tensors = {"a": torch.ones(3, 2), "b": torch.ones(4, dtype=torch.int8)}
    safetensors.torch.save_file(tensors, path, {"k": "v"})
    content = bytearray(path.read_bytes())
    content[position % len(content)] = value
    path.write_bytes(content[: max(0, len(content) - max(0, cut - 250))])
    try:
        read_header(path)
    except CheckpointError:
        return
    safetensors.torch.load_file(path)
