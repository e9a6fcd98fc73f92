"""Bad inputs, and the one line each gives. Oracle: the table; every row names what must appear in the message.

Each row damages a copy of something sound, runs one command, and expects: exit code 1 (2 where the command line does not
parse), one line on stderr, nothing on stdout, and no output where output was to be written.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from trtc.cli.main import main
from trtc.core.errors import MAX_MESSAGE
from trtc.tests.tiny_opt import TINY_OPT


class Room:
    """What a row may damage and name in its command line."""

    def __init__(self, tmp: Path, engine: Path, checkpoint: Path) -> None:
        self.tmp = tmp
        self.output = tmp / "output"
        self._engine, self._checkpoint = engine, checkpoint

    def hf(self) -> Path:
        return shutil.copytree(TINY_OPT, self.tmp / "hf")

    def engine(self) -> Path:
        return shutil.copytree(self._engine, self.tmp / "engine")

    def checkpoint(self) -> Path:
        return shutil.copytree(self._checkpoint, self.tmp / "checkpoint")

    def hf_config(self, **changes: object) -> Path:
        """A Hugging Face folder with fields of config.json changed, or removed where the value is `...`."""
        folder = self.hf()
        edit_json(folder / "config.json", changes)
        return folder

    def hf_weights(self, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
        folder = self.hf()
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
        return folder

    def hf_narrow_ffn(self) -> Path:
        """MLPs of 96 features."""

        def narrow(tensors: dict[str, torch.Tensor]) -> None:
            for name, tensor in tensors.items():
                if ".fc1." in name:
                    tensors[name] = tensor[:96].contiguous()
                elif ".fc2.weight" in name:
                    tensors[name] = tensor[:, :96].contiguous()

        folder = self.hf_weights(narrow)
        edit_json(folder / "config.json", {"ffn_dim": 96})
        return folder

    def file(self, name: str, content: str | bytes) -> Path:
        path = self.tmp / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path


def edit_json(path: Path, changes: dict[str, object]) -> None:
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))


def cut(path: Path, keep: float = 0.5) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-100] ^= 0x10
    path.write_bytes(bytes(data))


def damaged(folder: Path, damage: Callable[[Path], object], name: str) -> Path:
    damage(folder / name)
    return folder


class Malicious:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("code ran",))


def with_pickle(room: Room) -> Path:
    folder = room.hf()
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Malicious()}, protocol=2))
    return folder


@dataclass(frozen=True)
class Row:
    name: str
    command: Callable[[Room], list[object]]
    says: tuple[str, ...]
    code: int = 1


def build(source: Callable[[Room], Path], *options: object) -> Callable[[Room], list[object]]:
    return lambda room: ["build", "--model-dir", source(room), "--output-dir", room.output, *options]


def convert(source: Callable[[Room], Path], *options: object) -> Callable[[Room], list[object]]:
    return lambda room: ["convert", "--model-dir", source(room), "--output-dir", room.output, *options]


def run(*options: object, engine: Callable[[Room], Path] = Room.engine) -> Callable[[Room], list[object]]:
    return lambda room: ["run", "--engine-dir", engine(room), *options]


def build_edited(**changes: dict[str, object]) -> Callable[[Room], list[object]]:
    """A build from a checkpoint with objects in its config.json changed."""

    def command(room: Room) -> list[object]:
        folder = room.checkpoint()
        config = json.loads((folder / "config.json").read_text())
        edit_json(folder / "config.json", {name: config[name] | change for name, change in changes.items()})
        return ["build", "--checkpoint-dir", folder, "--output-dir", room.output]

    return command


def engine_edit(**changes: object) -> Callable[[Room], Path]:
    def make(room: Room) -> Path:
        folder = room.engine()
        edit_json(folder / "engine.json", changes)
        return folder

    return make


WEIGHT_ONLY = ("--use-weight-only", "--weight-only-precision")
TEXT = ("--input-text", "hello")

ROWS = [
    # folders and files
    Row("no such folder", convert(lambda r: r.tmp / "nowhere"), ("nowhere", "no such folder")),
    Row("file instead of folder", convert(lambda r: r.file("a.bin", "x")), ("a.bin", "is a file")),
    Row("empty folder", convert(lambda r: (r.tmp / "empty").mkdir() or r.tmp / "empty"), ("is empty",)),
    Row("config.json is not JSON", build(lambda r: damaged(r.hf(), cut, "config.json")), ("config.json", "JSON")),
    Row("no weights", build(lambda r: damaged(r.hf(), Path.unlink, "model.safetensors")), ("model.safetensors",)),
    Row(
        "truncated safetensors",
        build(lambda r: damaged(r.hf(), cut, "model.safetensors")),
        ("model.safetensors", "truncated"),
    ),
    Row(
        "garbage instead of safetensors",
        build(lambda r: damaged(r.hf(), lambda p: p.write_bytes(b"\xff" * 64), "model.safetensors")),
        ("model.safetensors",),
    ),
    Row("pickle with code in it", build(with_pickle), ("pytorch_model.bin",)),
    Row("output is a file", lambda r: ["convert", "--model-dir", TINY_OPT, "--output-dir", r.file("out", "mine")],
        ("out", "not a folder")),
    Row(
        "output is a folder of something else",
        lambda r: ["build", "--model-dir", TINY_OPT, "--output-dir", r.hf()],
        ("hf",),
    ),
    Row("tokenizer.json of something else", build(lambda r: damaged(r.hf(), cut, "tokenizer.json")), ("tokenizer.json",)),
    Row("tokenizer's names are no object",
        convert(lambda r: damaged(r.hf(), lambda path: path.write_text("[]"), "tokenizer_config.json")),
        ("tokenizer_config.json", "must be a JSON object")),
    Row("folder named by escape sequences", convert(lambda r: r.tmp / "\x1b[31m\x07"), ("\\x1b[31m\\x07: no such folder",)),
    Row("folder whose name no disk takes", convert(lambda r: r.tmp / ("x" * 300)), ("xxx", "File name too long")),
    Row("folder of half a character", convert(lambda r: r.tmp / "\ud800"), ("\\ud800: no such folder",)),
    # config.json
    Row("unknown architecture", build(lambda r: r.hf_config(architectures=["MambaForCausalLM"])),
        ("MambaForCausalLM", "OPTForCausalLM")),
    Row("no architecture", build(lambda r: r.hf_config(architectures=...)), ("architectures", "--model")),
    Row("architectures that are no list", build(lambda r: r.hf_config(architectures={"a": 1}), "--model", "opt"),
        ("architectures", "a list of names")),
    Row("unknown family", build(Room.hf, "--model", "bloom"), ("bloom", "opt")),
    Row("field missing", build(lambda r: r.hf_config(ffn_dim=...)), ("ffn_dim", "missing")),
    Row("field of the wrong type", build(lambda r: r.hf_config(hidden_size="128")), ("hidden_size", "positive integer")),
    Row("field of a million characters", build(lambda r: r.hf_config(hidden_size="x" * 10**6)),
        ("hidden_size", "xx ... xx", "positive integer")),
    Row("negative size", build(lambda r: r.hf_config(num_hidden_layers=-1)), ("num_hidden_layers", "-1")),
    Row("more layers than can be listed", build(lambda r: r.hf_config(num_hidden_layers=10**7), "--dummy-weights"),
        ("num_layers 10000000", "1 to 10000")),
    Row("heads do not divide", build(lambda r: r.hf_config(num_attention_heads=5)), ("num_attention_heads 5", "128")),
    Row("unknown activation", build(lambda r: r.hf_config(activation_function="swish")), ("swish", "relu")),
    Row("unsupported dtype", build(lambda r: r.hf_config(dtype="int8", torch_dtype="int8")), ("int8", "float16")),
    Row("size beyond any file", build(lambda r: r.hf_config(ffn_dim=2**63), "--dummy-weights"),
        (".safetensors", "no file can have")),
    # tensors
    Row("missing tensor", build(lambda r: r.hf_weights(lambda t: t.pop("model.decoder.layers.0.fc1.weight"))),
        ("missing", "layers.0.fc1.weight")),
    Row("unexpected tensor", build(lambda r: r.hf_weights(lambda t: t.update(extra=torch.zeros(3)))),
        ("unexpected", "extra")),
    Row("mis-shaped tensor", build(lambda r: r.hf_config(ffn_dim=500)), ("fc1.weight", "500")),
    Row(
        "tensor of integers",
        build(lambda r: r.hf_weights(lambda t: t.update({k: v.int() for k, v in t.items() if "layers.1.fc2.w" in k}))),
        ("layers.1.fc2.weight", "int32"),
    ),
    Row(
        "value too large for float16",
        build(lambda r: r.hf_weights(lambda t: t.update({k: v.float() + 1e6 for k, v in t.items() if "fc2.b" in k})),
              "--dtype", "float16"),
        ("fc2.bias", "float16"),
    ),
    # options
    Row("wrong dtype", convert(Room.hf, "--dtype", "float8"), ("--dtype", "float8", "bfloat16")),
    Row("tp that does not divide the heads", convert(Room.hf, "--tp-size", "3"), ("heads", "tp_size 3")),
    Row("tp of zero", convert(Room.hf, "--tp-size", "0"), ("tp_size", "0")),
    Row("no workers", convert(Room.hf, "--workers", "0"), ("workers", "0")),
    Row("unknown option", convert(Room.hf, "--output-dri", "x"), ("--output-dri", "--output-dir?"), code=2),
    Row("unknown option of two lines", convert(Room.hf, "--out\nput\x1b[1m"), ("--out put\\x1b[1m",), code=2),
    Row("unknown target", build(Room.hf, "--target", "tpu"), ("tpu", "cpu"), code=2),
    Row("sequence beyond the model", build(Room.hf, "--max-seq-len", "100000"), ("max_seq_len 100000", "positions")),
    Row("prompt leaves no room", build(Room.hf, "--max-seq-len", "64", "--max-input-len", "64"), ("max_input_len 64",)),
    Row("batch of zero", build(Room.hf, "--max-batch-size", "0"), ("max_batch_size", "0")),
    Row("fewer tokens than sequences", build(Room.hf, "--max-num-tokens", "4"), ("max_num_tokens 4", "max_batch_size 8")),
    Row("more beams than sequences", build(Room.hf, "--max-beam-width", "9"), ("max_beam_width 9", "max_batch_size 8")),
    Row("dry run of what the target refuses",
        lambda r: ["build", "--model-dir", TINY_OPT, "--target", "cuda", "--dtype", "float16", "--dry-run"],
        ("target cuda", "head_dim 32")),
    Row("no output folder", lambda r: ["build", "--model-dir", TINY_OPT], ("--output-dir",)),
    # quantization
    Row("unknown precision", convert(Room.hf, *WEIGHT_ONLY, "int3"), ("--weight-only-precision", "int3", "int8"), code=2),
    Row("group size that is none", convert(Room.hf, *WEIGHT_ONLY, "int4", "--group-size", "48"), ("48", "64, 128")),
    Row("groups for int8", build(Room.hf, *WEIGHT_ONLY, "int8", "--group-size", "64"), ("int8", "group size 64")),
    Row("group size that does not divide", convert(lambda r: r.hf_narrow_ffn(), *WEIGHT_ONLY, "int4"),
        ("layers.0.mlp.fc2.weight", "96 columns", "128")),
    Row("groups that straddle ranks", convert(Room.hf, *WEIGHT_ONLY, "int4", "--tp-size", "2"),
        ("tp_size 2", "64 columns", "128")),
    Row("precision without quantization", build(Room.hf, "--weight-only-precision", "int8"),
        ("--weight-only-precision", "--use-weight-only")),
    Row("unknown quantization", build(Room.hf, "--quantization", "awq"), ("--quantization", "awq", "fp8"), code=2),
    Row("quantization two ways", build(Room.hf, "--quantization", "fp8", *WEIGHT_ONLY, "int8"),
        ("--use-weight-only", "--quantization fp8")),
    Row("quantization of a target without", build(Room.hf, "--quantization", "fp8", "--target", "tensorrt"),
        ("target tensorrt", "fp8 with fp8 activations", "accepted: float, int4")),
    Row("KV cache of integers", build(Room.hf, "--kv-cache-dtype", "int8"), ("--kv-cache-dtype", "int8", "auto"), code=2),
    Row("KV cache of a target without", build(Room.hf, "--kv-cache-dtype", "fp8", "--target", "tensorrt"),
        ("target tensorrt", "KV cache of fp8", "accepted: auto")),
    Row("calibration without quantization", convert(Room.hf, "--calibrate", "x.jsonl"), ("--calibrate", "--use-weight-only")),
    Row("calibration file missing", convert(Room.hf, *WEIGHT_ONLY, "int4", "--calibrate", "no.jsonl"), ("no.jsonl",)),
    Row("calibration file of something else",
        lambda r: convert(Room.hf, *WEIGHT_ONLY, "int4", "--calibrate", r.file("c.jsonl", '{"txt": "x"}\n'))(r),
        ("c.jsonl, line 1", "article")),
    Row("calibration with half a character",
        lambda r: convert(Room.hf, *WEIGHT_ONLY, "int4", "--calibrate", r.file("c.jsonl", '"x"\n"\\ud800"\n'))(r),
        ("c.jsonl, line 2", "UTF-8")),
    Row("calibration of random weights",
        lambda r: build(Room.hf, "--dummy-weights", *WEIGHT_ONLY, "int4", "--calibrate", r.file("c.jsonl", '"x"\n'))(r),
        ("--calibrate", "--dummy-weights")),
    Row("unknown kind of quantized checkpoint",
        build(lambda r: r.hf_config(quantization_config={"quant_method": "bitsandbytes", "bits": 4})),
        ("quantization_config", "bitsandbytes", "gptq, awq")),
    Row("GPTQ checkpoint without its tensors",
        convert(lambda r: r.hf_config(quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128})),
        ("gptq", ".qweight")),
    Row("GPTQ checkpoint without scales", build(lambda r: gptq_folder(r, "scales")), ("fc1.scales", "missing")),
    Row("GPTQ checkpoint with act-order", build(lambda r: gptq_folder(r, "g_idx")), ("fc1.g_idx", "act-order")),
    Row("quantized twice", build(lambda r: gptq_folder(r, ""), *WEIGHT_ONLY, "int8"), ("quantized already", "gptq")),
    Row("weights that are not finite",
        build(lambda r: r.hf_weights(lambda t: t["model.decoder.layers.1.fc1.weight"].fill_(float("nan"))),
              *WEIGHT_ONLY, "int8"),
        ("layers.1.mlp.fc1.weight", "not finite")),
    # trtc checkpoints
    Row("quantization of a checkpoint",
        lambda r: ["build", "--checkpoint-dir", r.checkpoint(), "--use-weight-only", "--output-dir", r.output],
        ("--use-weight-only", "--checkpoint-dir")),
    Row("not a trtc checkpoint", lambda r: ["build", "--checkpoint-dir", r.hf(), "--output-dir", r.output],
        ("not a trtc checkpoint", "trtc convert")),
    Row(
        "flipped byte in a checkpoint",
        lambda r: ["build", "--checkpoint-dir", damaged(r.checkpoint(), flip_byte, "rank0.safetensors"),
                   "--output-dir", r.output],
        ("rank0.safetensors",),
    ),
    Row(
        "dtype of a checkpoint",
        lambda r: ["build", "--checkpoint-dir", r.checkpoint(), "--dtype", "float32", "--output-dir", r.output],
        ("--dtype", "--checkpoint-dir"),
    ),
    Row("checkpoint edited to another width", build_edited(hf_config={"ffn_dim": 500}),
        ("config.json: model has ffn_size 512, hf_config gives 500",)),
    Row("checkpoint edited to fewer layers", build_edited(hf_config={"num_hidden_layers": 3}),
        ("config.json: model has num_layers 4, hf_config gives 3",)),
    Row("checkpoint edited to another width throughout",
        build_edited(hf_config={"ffn_dim": 500}, model={"ffn_size": 500}),
        ("layers.0.mlp.fc1.weight is float16[512, 128], not float16[500, 128]", "layers.3.mlp.fc2.weight")),
    Row("checkpoint with an alias of nothing", build_edited(aliases={"lm_head.weight": ["x"]}), ("alias 'lm_head", "['x']")),
    Row("checkpoint of more ranks than can be", build_edited(sharding={"tp_size": 10**15}), ("do not fit tp_size 1000",)),
    # engines
    Row("engine folder missing", run(*TEXT, engine=lambda r: r.tmp / "none"), ("none", "no such folder")),
    Row("not an engine", run(*TEXT, engine=Room.hf), ("engine.json",)),
    Row("engine of another version", run(*TEXT, engine=engine_edit(format_version=99, trtc_version="9.9")),
        ("9.9", "build the engine again")),
    Row("foreign engine.json", run(*TEXT, engine=engine_edit(format="onnx")), ("onnx",)),
    Row("edited engine.json", run(*TEXT, engine=engine_edit(trtc_version="0.0.0")), ("engine.json", "digest")),
    Row("flipped byte in weights", run(*TEXT, engine=lambda r: damaged(r.engine(), flip_byte, "rank0-0.safetensors")),
        ("rank0-0.safetensors", "sha256")),
    Row("truncated weights", run(*TEXT, engine=lambda r: damaged(r.engine(), cut, "rank0-0.safetensors")),
        ("rank0-0.safetensors", "bytes")),
    Row("weights gone", run(*TEXT, engine=lambda r: damaged(r.engine(), Path.unlink, "rank0-0.safetensors")),
        ("rank0-0.safetensors", "missing")),
    # requests
    Row("negative temperature", run(*TEXT, "--temperature", "-1"), ("temperature", "-1")),
    Row("top-p of two", run(*TEXT, "--top-p", "2"), ("top_p", "2")),
    Row("prompt too long", run("--input-ids", ",".join(["5"] * 2000)), ("prompt 0", "2000")),
    Row("token id beyond the vocabulary", run("--input-ids", "5,999999"), ("prompt 0", "999999")),
    Row("token ids that are none", run("--input-ids", "5,six"), ("--input-ids", "5,six")),
    Row("a bias without token", run(*TEXT, "--logit-bias", "five=1"), ("--logit-bias", "five=1", "2=-100")),
    Row("a bias beyond the limit", run(*TEXT, "--logit-bias", "5=1000"), ("logit_bias", "-100 to 100")),
    Row("bad words that are no ids", run(*TEXT, "--bad-words-ids", "5,six"), ("--bad-words-ids", "5,six")),
    Row("less made than shown", run(*TEXT, "-n", "3", "--best-of", "2"), ("best_of", "at least n (3)")),
    Row("two streams at once", run(*TEXT, "--stream", "-n", "2"), ("--stream", "-n is 2")),
    Row("no tokens wanted", run(*TEXT, "--max-output-len", "0"), ("max_tokens", "0")),
    Row("text without tokenizer", run(*TEXT, engine=lambda r: without_tokenizer(r)), ("tokenizer", "--input-ids")),
    Row("prompt file missing", lambda r: ["run", "--engine-dir", r.engine(), "--input-file", r.tmp / "p.txt"], ("p.txt",)),
    Row(
        "prompt file is not text",
        lambda r: ["run", "--engine-dir", r.engine(), "--input-file", r.file("p.txt", b"\xff\xfe\xff")],
        ("p.txt", "UTF-8"),
    ),
    Row(
        "bad line in jsonl",
        lambda r: ["run", "--engine-dir", r.engine(), "--input-file", r.file("p.jsonl", '"fine"\n{"promt": "x"}\n')],
        ("p.jsonl, line 2",),
    ),
    Row(
        "bottomless JSON",
        lambda r: ["run", "--engine-dir", r.engine(), "--input-file", r.file("p.json", "[" * 100_000)],
        ("p.json", "not valid JSON"),
    ),
    Row("output file that is a folder", lambda r: run(*TEXT, "--output-json", r.tmp)(r), ("--output-json", "is a folder")),
    Row("output file without a name", run(*TEXT, "--output-json", ""), ("--output-json", "is a folder")),
    Row("times to be written into no folder", lambda r: ["bench", "--engine-dir", r.engine(), "--json", "/nowhere/x.json"],
        ("--json", "/nowhere is not a folder")),
    Row("no runs of a case", lambda r: ["bench", "--engine-dir", r.engine(), "--repeat", "0"], ("repeat is 0", "1 to 1000000")),
    Row("case of more than can be listed", lambda r: ["bench", "--engine-dir", r.engine(), "--cases", f"{10**20}x4x4"],
        ("case '1000", "each 1 to 1000000")),
    Row("case of thousands of digits", lambda r: ["bench", "--engine-dir", r.engine(), "--cases", f"4x4x{'1' * 5000}"],
        ("case '4x4x11", "each 1 to 1000000")),
    Row("batch of more than can be listed", lambda r: ["bench", "--engine-dir", r.engine(), "--batch", str(10**20)],
        ("batch is 1000", "1 to 1000000")),
    Row("fewer requests than none", lambda r: ["bench", "--engine-dir", r.engine(), "--mixed", "-1"], ("mixed is -1",)),
    Row("profile to be written into a folder", lambda r: ["profile", "--engine-dir", r.engine(), "--json", r.tmp],
        ("--json", "is a folder")),
    Row("output file in no folder", run(*TEXT, "--output-json", "/nonexistent-folder/o.json"), ("nonexistent-folder",)),
    Row("cache of more than the machine has", run(*TEXT, "--kv-cache-memory-bytes", str(10**25)),
        ("KV cache", "10000000000000000000", "--kv-cache-memory-bytes")),
    Row("cache too small", run(*TEXT, "--kv-cache-memory-bytes", "1000"), ("max_seq_len", "pages")),
]  # fmt: skip


def gptq_folder(room: Room, damage: str) -> Path:
    """A GPTQ checkpoint with one quantized layer; `damage`: scales to leave them out, g_idx to shuffle it."""
    stem = "model.decoder.layers.0.fc1"

    def pack(tensors: dict[str, torch.Tensor]) -> None:
        rows, columns = tensors.pop(f"{stem}.weight").shape
        order = torch.arange(columns, dtype=torch.int32) // 64
        tensors |= {
            f"{stem}.qweight": torch.zeros(columns // 8, rows, dtype=torch.int32),
            f"{stem}.qzeros": torch.full((columns // 64, rows // 8), 0x77777777, dtype=torch.int32),
            f"{stem}.scales": torch.ones(columns // 64, rows, dtype=torch.float16),
            f"{stem}.g_idx": order.flip(0).contiguous() if damage == "g_idx" else order,
        }
        if damage == "scales":
            del tensors[f"{stem}.scales"]

    folder = room.hf_weights(pack)
    scheme = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True}
    edit_json(folder / "config.json", {"quantization_config": scheme})
    return folder


def without_tokenizer(room: Room) -> Path:
    """An engine built from a folder without tokenizer files."""
    folder = room.hf()
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
        "merges.txt",
        "special_tokens_map.json",
    ):
        (folder / name).unlink(missing_ok=True)
    assert main(["build", "--model-dir", str(folder), "--output-dir", str(room.tmp / "bare")]) == 0
    return room.tmp / "bare"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("sound")
    engine, checkpoint = folder / "engine", folder / "checkpoint"
    assert main(["convert", "--model-dir", str(TINY_OPT), "--output-dir", str(checkpoint)]) == 0
    assert main(["build", "--checkpoint-dir", str(checkpoint), "--output-dir", str(engine)]) == 0
    return engine, checkpoint


@pytest.mark.parametrize("row", ROWS, ids=[row.name.replace(" ", "-") for row in ROWS])
def test_bad_input(
    row: Row, sound: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    room = Room(tmp_path, *sound)
    command = list(map(str, row.command(room)))
    capsys.readouterr()
    try:
        code = main(command)
    except SystemExit as stop:  # argparse
        code = stop.code
    out, err = capsys.readouterr()
    assert code == row.code, err
    assert out == ""
    assert err[-1:] == "\n" and err[:-1].isprintable(), f"not one line: {err}"
    assert len(err) < MAX_MESSAGE + 100
    assert err.startswith(f"trtc {command[0]}: error: ")
    for text in row.says:
        assert text in err
    leftovers = [path.name for path in tmp_path.iterdir() if path.name.startswith((".output", "output"))]
    assert not leftovers


def test_there_are_forty_rows() -> None:
    assert len(ROWS) >= 40 and len({row.name for row in ROWS}) == len(ROWS)
