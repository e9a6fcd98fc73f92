"""Import of GPTQ and AWQ checkpoints. Oracle: an independent dequantization, element by element, of files packed here from the
formats' definitions; no library of theirs is used."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from trtc.core.checkpoint import TrtcCheckpoint, convert
from trtc.core.dtypes import DType
from trtc.core.errors import CheckpointError, ConfigError
from trtc.core.hf import HFCheckpoint
from trtc.core.quantize.hub import HubScheme, PackedCheckpoint, import_packed
from trtc.core.quantize.integers import dequantize
from trtc.core.sharding import ShardingOptions
from trtc.core.weight_source import HFWeights
from trtc.core.weights import Chunk
from trtc.tests.opt_models import OptCheckpoint

GROUP = 32
AWQ_NIBBLE_HOLDS = (0, 2, 4, 6, 1, 3, 5, 7)
"""AutoAWQ: the four bits i of a word are those of column AWQ_NIBBLE_HOLDS[i] of its eight."""

Checkpoints = Callable[[str], OptCheckpoint]


def words(columns: np.ndarray, holds: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """[rows, n] of 0..15 -> int32 [rows, n / 8]."""
    packed = np.zeros((columns.shape[0], columns.shape[1] // 8), np.uint32)
    for word in range(packed.shape[1]):
        for nibble, column in enumerate(holds):
            packed[:, word] |= columns[:, word * 8 + column].astype(np.uint32) << np.uint32(4 * nibble)
    return torch.from_numpy(packed.view(np.int32).copy())


@dataclasses.dataclass
class Packed:
    """A layer as it was quantized: integers 0..15 [out, in], zeros and scales [out, groups]."""

    integers: np.ndarray
    zeros: np.ndarray
    scales: torch.Tensor

    @classmethod
    def random(cls, rows: int, columns: int, seed: int, *, symmetric: bool) -> Packed:
        rng = np.random.default_rng(seed)
        groups = columns // GROUP
        zeros = np.full((rows, groups), 8) if symmetric else rng.integers(1, 16, (rows, groups))
        scales = torch.from_numpy(rng.random((rows, groups)) * 0.03 + 0.002).half()
        return cls(rng.integers(0, 16, (rows, columns)), zeros, scales)

    def floats(self) -> torch.Tensor:
        """(integer - zero) * scale, float16."""
        zeros, scales = (np.repeat(x, GROUP, 1) for x in (self.zeros, self.scales.numpy()))
        return torch.from_numpy((self.integers - zeros).astype(np.float16) * scales)

    def gptq(self, *, offset: int) -> dict[str, torch.Tensor]:
        order = torch.arange(self.integers.shape[1], dtype=torch.int32) // GROUP
        return {"qweight": words(self.integers).T.contiguous(), "qzeros": words((self.zeros.T - offset) & 15),
                "scales": self.scales.T.contiguous(), "g_idx": order}  # fmt: skip

    def awq(self) -> dict[str, torch.Tensor]:
        return {"qweight": words(self.integers.T, AWQ_NIBBLE_HOLDS), "qzeros": words(self.zeros.T, AWQ_NIBBLE_HOLDS),
                "scales": self.scales.T.contiguous()}  # fmt: skip


CONFIGS: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True},
    "gptq asymmetric": {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": GROUP,
        "desc_act": False,
        "sym": False,
    },
    "gptq_v2": {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": GROUP,
        "sym": False,
        "checkpoint_format": "gptq_v2",
    },
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
}


def quantize_folder(
    checkpoint: OptCheckpoint,
    folder: Path,
    kind: str,
    *,
    layers: tuple[str, ...] = ("q_proj", "out_proj", "fc1", "fc2"),
) -> dict[str, Packed]:
    """Writes `checkpoint` with these layers quantized; what stands for each `.weight` by its name."""
    folder.mkdir()
    tensors = load_file(checkpoint.folder / "model.safetensors")
    packed = {}
    for i, name in enumerate(sorted(tensors)):
        stem = name.removesuffix(".weight")
        if name == stem or stem.rpartition(".")[2] not in layers:
            continue
        one = Packed.random(*tensors.pop(name).shape, seed=i, symmetric=kind == "gptq")
        parts = one.awq() if kind == "awq" else one.gptq(offset=0 if kind == "gptq_v2" else 1)
        tensors |= {f"{stem}.{part}": tensor for part, tensor in parts.items()}
        packed[name] = one
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((checkpoint.folder / "config.json").read_text()) | {
        "quantization_config": CONFIGS[kind]
    }
    (folder / "config.json").write_text(json.dumps(config))
    return packed


def open_packed(folder: Path) -> PackedCheckpoint:
    source = HFCheckpoint.open(folder)
    scheme = HubScheme.read(source.config, "config.json")
    assert scheme is not None
    return PackedCheckpoint(source, scheme)


def floats_of(checkpoint: OptCheckpoint, source: HFCheckpoint, tp_size: int = 1) -> HFWeights:
    table = checkpoint.family.weight_table(checkpoint.config)
    sharding = ShardingOptions(tp_size)
    return HFWeights(source, table, checkpoint.config, dtype=DType.FLOAT16, sharding=sharding)


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("kind", CONFIGS)
def test_weights_are_those_of_the_file(
    kind: str, tp_size: int, opt_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    """As floats and as integers, whole and in shards; layers that are not packed stay as they are."""
    checkpoint = opt_checkpoint("pre_norm")
    packed = quantize_folder(checkpoint, tmp_path / "hub", kind)
    with open_packed(tmp_path / "hub") as source:
        for name, one in packed.items():
            assert torch.equal(source.read(name), one.floats()), name
            assert torch.equal(source.read_rows(name, 3, 7), one.floats()[3:7])
        view = import_packed(floats_of(checkpoint, source, tp_size), source)
        assert len(view.quantization.weights) == len(packed)
        assert view.quantization.format.zero_point == (kind != "gptq")
        for name in view.quantization.weights:
            hub = name.replace("layers", "model.decoder.layers").replace("attention.q", "self_attn.q_proj")
            hub = hub.replace("attention.out", "self_attn.out_proj").replace(".mlp.", ".")
            parts = []
            for rank in range(tp_size):
                zero = view.read(rank, f"{name}.zero") if kind != "gptq" else None
                parts.append(dequantize(view.read(rank, name), view.read(rank, f"{name}.scale"), zero))
            axis = 1 if "out" in name or "fc2" in name else 0
            assert torch.equal(torch.cat(parts, axis), packed[hub].floats()), name
        plain = floats_of(checkpoint, HFCheckpoint.open(checkpoint.folder), tp_size)
        for name in ("layers.1.attention.k.weight", "embed.tokens.weight", "layers.0.mlp.fc1.bias"):
            assert torch.equal(view.read(0, name), plain.read(0, name))


def test_a_converted_checkpoint_keeps_the_integers(opt_checkpoint: Checkpoints, tmp_path: Path) -> None:
    checkpoint = opt_checkpoint("pre_norm")
    quantize_folder(checkpoint, tmp_path / "hub", "awq")
    with open_packed(tmp_path / "hub") as source:
        view = import_packed(floats_of(checkpoint, source, 2), source)
        convert(source, checkpoint.family.weight_table(checkpoint.config), checkpoint.config, tmp_path / "out",
                dtype=DType.FLOAT16, sharding=ShardingOptions(2),
                quantize=lambda floats: import_packed(floats, source))  # fmt: skip
        stored = TrtcCheckpoint.open(tmp_path / "out")
        assert stored.quantization == view.quantization
        assert str(stored.quantization) == "int4, group size 32, with zero points, awq"
        for rank in range(2):
            for name in view.names(rank):
                assert torch.equal(stored.read(rank, name), view.read(rank, name)), name
        stored.close()


def with_config(**changes: Any) -> dict[str, Any]:
    return {"quantization_config": {k: v for k, v in {**CONFIGS["gptq"], **changes}.items() if v is not ...}}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            with_config(quant_method="bitsandbytes"),
            "quant_method 'bitsandbytes' is not supported; accepted: gptq, awq",
        ),
        (with_config(quant_method=...), "quant_method None is not supported"),
        (with_config(bits=3), "bits 3 is not supported; accepted: 4"),
        (with_config(group_size=-1), "group size -1 is not supported; accepted: 32, 64, 128"),
        (
            with_config(checkpoint_format="marlin"),
            "checkpoint_format 'marlin' is not supported; accepted: gptq, gptq_v2",
        ),
        (with_config(quant_method="awq", version="gemv"), "version 'gemv' is not supported; accepted: gemm"),
        (with_config(sym="no"), "sym is 'no'; accepted: true or false"),
        (with_config(quant_method="awq", zero_point=1), "zero_point is 1; accepted: true or false"),
        ({"quantization_config": "gptq"}, "must be an object, is str"),
    ],
)
def test_schemes_that_cannot_be_imported_are_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"here: quantization_config.*{message}"):
        HubScheme.read(config, "here")


def test_a_float_checkpoint_has_no_scheme() -> None:
    assert HubScheme.read({"quantization_config": None}, "here") is None


def damage(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


STEM = "model.decoder.layers.0.fc1"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{STEM}.scales"), r"gptq tensors are missing: .*layers.0.fc1.scales"),
        (lambda t: t.pop(f"{STEM}.qzeros"), r"gptq tensors are missing: .*layers.0.fc1.qzeros"),
        (
            lambda t: t.update({f"{STEM}.scales": t[f"{STEM}.scales"][:1].clone()}),
            r"fc1: qweight int32.* with groups of 32",
        ),
        (
            lambda t: t.update({f"{STEM}.qweight": t[f"{STEM}.qweight"].float()}),
            r"fc1: qweight float32\[8, 256\].* do not fit",
        ),
        (
            lambda t: t.update({f"{STEM}.qweight": t[f"{STEM}.qweight"].flatten()}),
            r"fc1: qweight int32\[2048\].* do not fit",
        ),
        (
            lambda t: t.update({f"{STEM}.weight": torch.zeros(256, 64)}),
            r"twice, as floats and as gptq tensors: model.decoder.layers.0.fc1.weight",
        ),
        (
            lambda t: t[f"{STEM}.scales"].fill_(torch.inf),
            r"fc1.weight: has scales that are not finite in torch",
        ),
        (
            lambda t: t.update({f"{STEM}.g_idx": t[f"{STEM}.g_idx"][:32].clone()}),
            r"fc1.g_idx: columns in another order",
        ),
        (
            lambda t: t.update({f"{STEM}.g_idx": t[f"{STEM}.g_idx"].flip(0)}),
            r"fc1.g_idx: columns in another order",
        ),
        (
            lambda t: t.update({f"{STEM}.qzeros": t[f"{STEM}.qzeros"] + 1}),
            r"fc1.qzeros: config.json says .* symmetric",
        ),
    ],
)
def test_damaged_checkpoints_are_refused(
    change: Callable[[dict[str, torch.Tensor]], object],
    message: str,
    opt_checkpoint: Checkpoints,
    tmp_path: Path,
) -> None:
    checkpoint = opt_checkpoint("pre_norm")
    quantize_folder(checkpoint, tmp_path / "hub", "gptq", layers=("fc1",))
    damage(tmp_path / "hub", change)
    with pytest.raises(CheckpointError, match=message), open_packed(tmp_path / "hub") as source:
        import_packed(floats_of(checkpoint, source), source).read(0, "layers.0.mlp.fc1.weight")


def test_a_scheme_without_packed_tensors_is_refused(opt_checkpoint: Checkpoints) -> None:
    scheme = HubScheme.read(with_config(), "here")
    assert scheme is not None
    with pytest.raises(CheckpointError, match=r"config.json says gptq, but no tensor is called \.qweight"):
        PackedCheckpoint(HFCheckpoint.open(opt_checkpoint("pre_norm").folder), scheme)


def test_a_packed_weight_that_would_be_transformed_is_refused(
    opt_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    """As GPT-2's fused projection: its parts are rows of the float tensor, which the table takes apart."""
    checkpoint = opt_checkpoint("pre_norm")
    quantize_folder(checkpoint, tmp_path / "hub", "gptq", layers=("fc1",))
    table = checkpoint.family.weight_table(checkpoint.config)
    rules = tuple(
        dataclasses.replace(rule, shape=(128, "hidden_size"), transform=Chunk(0, 2))
        if "fc1.weight" in rule.name
        else rule
        for rule in table.rules
    )
    with open_packed(tmp_path / "hub") as source:
        floats = HFWeights(source, dataclasses.replace(table, rules=rules), checkpoint.config, dtype=DType.FLOAT16,
                           sharding=ShardingOptions())  # fmt: skip
        with pytest.raises(
            CheckpointError, match=r"fc1.weight is quantized, and this family takes it apart \(part 0 of 2"
        ):
            import_packed(floats, source)
