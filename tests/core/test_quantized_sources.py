"""Sources of quantized weights, rank by rank: of float weights, with zero points, and dummies.

Oracle: the weights of one rank, quantized at once and cut by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from trtc.core import weight_source
from trtc.core.checkpoint import TrtcCheckpoint, convert
from trtc.core.dtypes import DType, to_torch
from trtc.core.errors import CheckpointError, ConfigError
from trtc.core.quantize import dummy as dummy_module
from trtc.core.quantize import source as source_module
from trtc.core.quantize.dummy import DummyQuantizedWeights
from trtc.core.quantize.integers import Quantized, dequantize, round_to_nearest, unpack_int4
from trtc.core.quantize.scheme import QuantizeOptions, WeightFormat
from trtc.core.quantize.source import QuantizedWeights, nearest
from trtc.core.sharding import ShardingOptions
from trtc.core.weight_source import DummyWeights
from trtc.tests.asymmetric import with_zeros
from trtc.tests.opt_models import OptCheckpoint

from .quantized_weights import FORMATS, INT4, INT8, by_definition, parts_of, quantized


@pytest.mark.parametrize("block_bytes", [1000, weight_source.BLOCK_BYTES])
@pytest.mark.parametrize(
    ("precision", "tp_size"), [("int8", 1), ("int8", 2), ("int8", 4), ("int4", 1), ("int4", 2)]
)
def test_shards_are_parts_of_one_quantized_model(
    precision: str, tp_size: int, block_bytes: int, opt_checkpoint: Callable[[str], OptCheckpoint], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Oracle: the whole weight quantized at once and cut by hand: rows of integers and scales, or columns of integers and
    their groups' scales. An odd vocabulary's head is padded with rows of zeros. The file holds what the view gives."""
    monkeypatch.setattr(weight_source, "BLOCK_BYTES", block_bytes)
    how, checkpoint = FORMATS[precision], opt_checkpoint("vocabulary_odd")
    floats = checkpoint.weights(DType.BFLOAT16)
    view = quantized(checkpoint, how, DType.BFLOAT16, lm_head=True, tp_size=tp_size)
    assert view.quantization == QuantizeOptions(how, True).choose(floats.weights())
    assert not view.aliases
    for name in view.quantization.weights:
        whole = round_to_nearest(floats.read(0, name), how, name=name)
        axis = 1 if name.endswith((".attention.out.weight", ".mlp.fc2.weight")) else 0
        integers, scales = zip(*(parts_of(view, rank, name) for rank in range(tp_size)), strict=True)
        rows = whole.integers.shape[0]
        assert torch.equal(torch.cat(integers, axis)[:rows], whole.integers), name
        if axis == 1 and how.group_size is None:
            assert all(torch.equal(scale, whole.scale) for scale in scales)
        else:
            assert torch.equal(torch.cat(scales, axis)[:rows], whole.scale), name
        if axis == 0:
            assert not torch.cat(integers)[rows:].any()
    convert(
        checkpoint.hf, checkpoint.family.weight_table(checkpoint.config), checkpoint.config, tmp_path / "out",
        dtype=DType.BFLOAT16, sharding=view.sharding, quantize=nearest(QuantizeOptions(how, True)), workers=2,
    )  # fmt: skip
    stored = TrtcCheckpoint.open(tmp_path / "out")
    assert stored.quantization == view.quantization
    assert set(stored.names(0)) == set(view.names(0))
    for name in view.names(0):
        for rank in range(tp_size):
            value = view.read(rank, name)
            assert torch.equal(stored.read(rank, name), value), name
            assert stored.dtype(rank, name) == view.dtype(rank, name)
            assert stored.shape(rank, name) == view.shape(rank, name) == tuple(value.shape)
    stored.close()


def places(part: torch.Tensor, whole: torch.Tensor, axis: int) -> torch.Tensor:
    """Which rows (axis 0) or columns (1) of `whole` those of `part` are, found by their values; -1: zeros."""
    mine, all_of_it = (tensor.transpose(0, axis) for tensor in (part, whole))
    same = (mine[:, None] == all_of_it[None]).all(-1)
    found = torch.where(same.any(1), same.int().argmax(1), -1)
    assert not mine[found < 0].any()
    return found


def numbers(source: QuantizedWeights, rank: int, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every element of a weight, its integer (or e4m3 number) and its scale."""
    integers, scale = parts_of(source, rank, name)
    values = unpack_int4(integers) if integers.dtype == torch.uint8 else integers.float()
    by_group = scale.reshape(len(scale), -1)
    return values, by_group.repeat_interleave(values.shape[1] // by_group.shape[1], 1)


@pytest.mark.parametrize(
    ("precision", "variant", "tp_size"),
    [
        *((precision, variant, 2) for precision in ("int8", "fp8") for variant in ("odd_sizes", "gpt2", "llama")),
        *(("int8", variant, 4) for variant in ("gpt2", "llama_one_kv_head", "llama_two_kv_heads")),
        *(("int4", variant, 2) for variant in ("vocabulary_odd", "gpt2_groups", "llama_groups")),
    ],
)  # fmt: skip
def test_ranks_hold_the_integers_and_scales_of_one_bit_for_bit(
    precision: str, variant: str, tp_size: int, family_checkpoint: Callable[[str], OptCheckpoint]
) -> None:
    """Of every family. Oracle: the integers and scales of one rank, where the float weights' values say that a rank's rows or
    columns come from. Together the ranks have all of them; what is added is zeros."""
    checkpoint = family_checkpoint(variant)
    how, sharding = FORMATS[precision], ShardingOptions(tp_size=tp_size)
    whole, floats = checkpoint.weights(), checkpoint.weights(sharding=sharding)
    one, ranks = (quantized(checkpoint, how, lm_head=True, tp_size=size) for size in (1, tp_size))
    split = set()
    for name in one.quantization.weights:
        value, integers, scale = whole.read(0, name), *numbers(one, 0, name)
        met: set[int] = set()
        for rank in range(tp_size):
            part = floats.read(rank, name)
            axis = 0 if part.shape[1] == value.shape[1] else 1
            found = places(part, value, axis)
            met.update(found.tolist())
            mine, its_scale = numbers(ranks, rank, name)
            kept, zeros = (mask.nonzero().flatten() for mask in (found >= 0, found < 0))
            origin = found[kept]
            assert torch.equal(mine.index_select(axis, kept), integers.index_select(axis, origin)), name
            assert torch.equal(its_scale.index_select(axis, kept), scale.index_select(axis, origin)), name
            assert not mine.index_select(axis, zeros).any(), name
            split |= {axis} if part.shape != value.shape else set()
        assert met - {-1} == set(range(value.shape[axis])), name
    assert split == {0, 1}


def test_weights_are_quantized_block_by_block(
    opt_checkpoint: Callable[[str], OptCheckpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is that of a block of rows, whatever the size of the weight."""
    sizes: list[int] = []

    def recorded(weight: torch.Tensor, how: WeightFormat, *, name: str) -> Quantized:
        sizes.append(weight.numel() * 4)
        return round_to_nearest(weight, how, name=name)

    monkeypatch.setattr(weight_source, "BLOCK_BYTES", 2048)
    monkeypatch.setattr(source_module, "round_to_nearest", recorded)
    view = quantized(opt_checkpoint("pre_norm"), INT8)
    for name in view.quantization.weights:
        view.read(0, name)
    assert len(sizes) > 100
    assert max(sizes) <= 2048


def test_a_head_that_is_not_quantized_stays_tied(opt_checkpoint: Callable[[str], OptCheckpoint]) -> None:
    view = quantized(opt_checkpoint("pre_norm"), INT8)
    assert view.aliases == {"lm_head.weight": "embed.tokens.weight"}
    assert torch.equal(view.read(0, "lm_head.weight"), view.read(0, "embed.tokens.weight"))
    with pytest.raises(CheckpointError, match="there is no weight 'x'"):
        view.shape(0, "x")


def test_groups_must_fill_rows_and_keep_to_a_rank(opt_checkpoint: Callable[[str], OptCheckpoint]) -> None:
    with pytest.raises(ConfigError, match=r"layers.0.mlp.fc2.weight: 72 columns are not whole groups of 32"):
        quantized(opt_checkpoint("ffn_not_4x"), INT4)
    message = r"attention.out.weight: tp_size 2 gives each rank 32 columns, which are not whole groups of 64"
    with pytest.raises(ConfigError, match=message):
        quantized(opt_checkpoint("pre_norm"), WeightFormat("int4", 64), tp_size=2)


def test_zero_points_are_split_as_their_weights_are(opt_checkpoint: Callable[[str], OptCheckpoint]) -> None:
    """Oracle: the parts of one rank, cut; rows that sharding adds to an odd vocabulary's head are zeros."""
    checkpoint, how = opt_checkpoint("vocabulary_odd"), WeightFormat("int4", 32, zero_point=True)
    whole = checkpoint.weights()
    one = with_zeros(whole, how, lm_head=True)
    floats = checkpoint.weights(sharding=ShardingOptions(tp_size=2, use_parallel_embedding=True))
    two = with_zeros(floats, how, lm_head=True, whole=whole)

    def value(source: QuantizedWeights, rank: int, name: str) -> torch.Tensor:
        return dequantize(*(source.read(rank, name + suffix) for suffix in ("", ".scale", ".zero")))

    for name in one.quantization.weights:
        expected, (first, second) = value(one, 0, name), (value(two, rank, name) for rank in range(2))
        axis = 1 if first.shape[1] < expected.shape[1] else 0
        together = torch.cat((first, second), axis)
        assert torch.equal(together[: len(expected)], expected), name
        assert not together[len(expected) :].any() and len(together) - len(expected) == (
            name == "lm_head.weight"
        )


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def dummy(checkpoint: OptCheckpoint, how: WeightFormat, **sharding: Any) -> DummyQuantizedWeights:
    table = checkpoint.family.weight_table(checkpoint.config)
    options = ShardingOptions(**sharding)
    floats = DummyWeights(table, checkpoint.config, dtype=DType.BFLOAT16, sharding=options)
    return DummyQuantizedWeights(floats, QuantizeOptions(how, lm_head=True))


@pytest.mark.parametrize("block_bytes", [1000, weight_source.BLOCK_BYTES])
@pytest.mark.parametrize("precision", FORMATS)
def test_dummy_shards_are_parts_of_one_model(
    precision: str, block_bytes: int, opt_checkpoint: Callable[[str], OptCheckpoint], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Oracle: the rows and columns of one rank's weights; an odd vocabulary's head is padded with zeros. No float weight that
    is quantized is drawn."""
    monkeypatch.setattr(dummy_module, "BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(DummyWeights, "_read_rows", None)
    checkpoint = opt_checkpoint("vocabulary_odd")
    one, two = (dummy(checkpoint, FORMATS[precision], tp_size=size) for size in (1, 2))
    assert one.quantization.method == "dummy"
    for name in one.quantization.weights:
        whole, scale = parts_of(one, 0, name)
        integers, scales = zip(*(parts_of(two, rank, name) for rank in range(2)), strict=True)
        axis = 1 if name.endswith((".attention.out.weight", ".mlp.fc2.weight")) else 0
        assert same_bits(torch.cat(integers, axis)[: len(whole)], whole), name
        assert not torch.cat(integers, axis)[len(whole) :].any()
        if axis == 0:
            assert torch.equal(torch.cat(scales)[: len(scale)], scale)
        assert whole.shape == one.shape(0, name) and whole.dtype == to_torch(one.dtype(0, name))


@pytest.mark.parametrize("precision", FORMATS)
def test_dummy_integers_are_distributed_as_promised(
    precision: str, opt_checkpoint: Callable[[str], OptCheckpoint]
) -> None:
    """A standard deviation of about 0.02 and the whole range of integers, but for -128."""
    source = dummy(opt_checkpoint("pre_norm"), FORMATS[precision])
    integers, scale = parts_of(source, 0, "layers.0.mlp.fc1.weight")
    values = (unpack_int4(integers) if precision == "int4" else integers).double()
    ranges = {"int8": (-127, 127), "int4": (-8, 7), "fp8": (-448, 448)}
    assert (float(values.min()), float(values.max())) == ranges[precision]
    assert 0.012 < float(by_definition(integers, scale).std()) < 0.028
    again, _ = parts_of(source, 0, "layers.1.mlp.fc1.weight")
    assert not same_bits(again, integers)
