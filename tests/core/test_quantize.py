"""Weight-only quantization. Oracles: the definition of the format, element by element in numpy, and the float graph with
the dequantized weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from trtc.core import weight_source
from trtc.core.build import build_engine, plan
from trtc.core.checkpoint import TrtcCheckpoint, convert
from trtc.core.dtypes import DType, to_torch
from trtc.core.engine import Engine
from trtc.core.errors import CheckpointError, ConfigError
from trtc.core.graph import Graph, GraphBuilder
from trtc.core.interpreter import interpret
from trtc.core.ops import ReferenceContext, get_op, op_names
from trtc.core.passes import Partition, fuse, optimize
from trtc.core.passes.quantize import quantize
from trtc.core.passes.rewrite import rewrite
from trtc.core.quantize import dummy as dummy_module
from trtc.core.quantize import source as source_module
from trtc.core.quantize.dummy import DummyQuantizedWeights
from trtc.core.quantize.integers import Quantized, dequantize, pack_int4, round_to_nearest, unpack_int4
from trtc.core.quantize.scheme import KINDS, Quantization, QuantizeOptions, WeightFormat
from trtc.core.quantize.source import QuantizedWeights, nearest
from trtc.core.sharding import Shard, ShardingOptions
from trtc.core.targets.base import get_target
from trtc.core.targets.cpu import CpuProgram
from trtc.core.weight_source import DummyWeights, WeightSource
from trtc.core.weights import IDENTITY, ResolvedWeight
from trtc.tests.asymmetric import with_zeros
from trtc.tests.opt_models import BUILD, VARIANTS, OptCheckpoint
from trtc.tests.packed_steps import Inputs, PagedSequences, filled_cache
from trtc.tests.thread_group import RankCommunicator, run_ranks
from trtc.tests.tolerances import (
    FLOAT64_ABS,
    LOGITS_INT8_RELATIVE,
    OP_FLOAT64_ABS,
    logits_tolerance,
    max_error,
)
from trtc.tests.toy_decoder import random_weights, toy_decoder, weight_rows

INT8, INT4 = WeightFormat("int8"), WeightFormat("int4", 32)
FP8 = WeightFormat("fp8")
FORMATS = {"int8": INT8, "int4": INT4, "fp8": FP8}
PAGE_SIZE, NUM_PAGES = 16, 12


def by_definition(
    integers: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None = None
) -> torch.Tensor:
    """(integer - zero) * scale in float64, one element after the other."""
    stored, scales = (
        (integers.double() if integers.is_floating_point() else integers).numpy(),
        scale.double().numpy(),
    )
    per_byte = 2 if integers.dtype == torch.uint8 else 1
    result = np.empty((stored.shape[0], stored.shape[1] * per_byte))
    for row in range(result.shape[0]):
        for column in range(result.shape[1]):
            value = stored[row, column // per_byte].item()
            if per_byte == 2:
                value = value // 16 if column % 2 else value % 16
                value = value - 16 if value > 7 else value
            group = (row,) if scales.ndim == 1 else (row, column * scales.shape[1] // result.shape[1])
            offset = 0 if zero is None else int(zero[group])
            result[row, column] = (value - offset) * scales[group]
    return torch.from_numpy(result)


# ---- integers ------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    how=st.sampled_from([INT8, INT4, WeightFormat("int4", 64)]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    magnitude=st.floats(-9, 4),
    seed=st.integers(0, 2**32),
    spikes=st.integers(0, 5),
)
@example(how=INT8, dtype=torch.float16, magnitude=-5.3, seed=0, spikes=0)
def test_rounding_is_off_by_half_a_scale_at_most(
    how: WeightFormat, dtype: torch.dtype, magnitude: float, seed: int, spikes: int
) -> None:
    """Also for weights so small that their scales are subnormal in float16, for rows of zeros and for outliers. The scale
    is no larger than it must be: one step of its dtype above the largest value's share."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, 128, generator=generator) * 10**magnitude
    weight[1] = 0
    weight[2, :spikes] *= 40
    weight = weight.clamp(-6e4, 6e4).to(dtype)
    found = round_to_nearest(weight, how, name="w")
    value = by_definition(found.integers, found.scale)
    columns = how.group_size or 128
    step = found.scale.double().reshape(5, -1).repeat_interleave(columns, 1)
    half = 0.5 + how.largest * 2.0**-23  # the quotient that is rounded is one of float32
    assert bool(((value - weight.double()).abs() <= step * half).all())
    largest = weight.double().unflatten(1, (-1, columns)).abs().amax(-1).reshape(found.scale.shape)
    tight = largest / how.largest
    next_up = torch.nextafter(tight.to(dtype), torch.full_like(found.scale, torch.inf))
    assert bool(((found.scale <= next_up) | (largest == 0)).all())
    assert bool((found.scale > 0).all())


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    magnitude=st.floats(-6, 4),
    seed=st.integers(0, 2**32),
)
def test_e4m3_is_off_by_half_a_step_at_most(dtype: torch.dtype, magnitude: float, seed: int) -> None:
    """A step of e4m3 is an eighth of the power of two below the number, and 2**-9 below 2**-6. Nothing is cut off at 448."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, 128, generator=generator) * 10**magnitude
    weight[1] = 0
    weight = weight.clamp(-6e4, 6e4).to(dtype)
    found = round_to_nearest(weight, FP8, name="w")
    assert found.integers.dtype is torch.float8_e4m3fn and found.scale.shape == (5,)
    step = found.scale.double().unsqueeze(1)
    exact = weight.double() / step
    power = exact.abs().clamp(min=2.0**-6).log2().floor().exp2()
    error = (by_definition(found.integers, found.scale) / step - exact).abs()
    assert bool((error <= power / 16 * (1 + 2.0**-20)).all())
    assert bool((exact.abs() <= 448 * (1 + 2.0**-22)).all()) and bool((found.scale > 0).all())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 4), st.sampled_from([2, 6, 64]))
def test_four_bits_are_packed_and_unpacked(seed: int, rows: int, columns: int) -> None:
    integers = torch.randint(-8, 8, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(
        torch.int8
    )
    packed = pack_int4(integers)
    assert packed.dtype == torch.uint8 and packed.shape == (rows, columns // 2)
    assert torch.equal(unpack_int4(packed), integers)
    assert max_error(by_definition(packed, torch.ones(rows)), integers) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_dequantization_is_the_definition(
    packed: bool, zeros: bool, groups: int | None, dtype: torch.dtype
) -> None:
    """Rounded once, to the dtype of the scales."""
    generator = torch.Generator().manual_seed(3)
    shape = (3,) if groups is None else (3, groups)
    limit = 8 if packed else 127
    integers = torch.randint(-limit, limit, (3, 8), generator=generator).to(torch.int8)
    scale = (torch.rand(shape, generator=generator) + 0.1).to(dtype)
    zero = torch.randint(-8, 8, shape, generator=generator).to(torch.int8) if zeros else None
    stored = pack_int4(integers) if packed else integers
    value = dequantize(stored, scale, zero)
    assert value.dtype == dtype
    assert torch.equal(value, by_definition(stored, scale, zero).to(dtype))


def test_values_that_are_not_finite_are_refused() -> None:
    for bad in (float("inf"), float("nan")):
        with pytest.raises(CheckpointError, match=r"weight 'a.w' has values that are not finite"):
            round_to_nearest(torch.tensor([[1.0, bad]]), INT8, name="a.w")


# ---- schemes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (("int3",), "weight precision 'int3' is not known; accepted: int8, int4, fp8"),
        (("int8", 64), "int8 weights have one scale a row"),
        (("fp8", 64), "fp8 weights have one scale a row"),
        (("int4",), "group size None is not supported; accepted: 32, 64, 128"),
        (("int4", 48), "group size 48 is not supported; accepted: 32, 64, 128"),
    ],
)
def test_unknown_formats_are_refused(fields: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WeightFormat(*fields)


def test_quantization_travels_as_json() -> None:
    quantization = Quantization(WeightFormat("int4", 64, True), ("a", "b"), "gptq")
    data = quantization.to_json() | {"weights": ["a", "b"]}
    assert Quantization.from_json(data, "x") == quantization
    for bad in (None, {}, data | {"weights": "a"}, data | {"extra": 1}, data | {"format": {"bits": 4}}):
        with pytest.raises(CheckpointError, match="x: quantization must be an object"):
            Quantization.from_json(bad, "x")
    with pytest.raises(CheckpointError, match="x: weight precision 'int2' is not known"):
        Quantization.from_json(data | {"format": {"precision": "int2"}}, "x")


def test_rounded_activations_travel_as_json() -> None:
    """Oracle: the object. What has none is written as it was before there were any."""
    quantization = Quantization(FP8, ("a",), activations="fp8")
    data = quantization.to_json() | {"weights": ["a"]}
    assert Quantization.from_json(data, "x") == quantization
    assert quantization.kind == "fp8 with fp8 activations" and quantization.kind in KINDS
    assert str(quantization) == "fp8 with fp8 activations, nearest"
    assert Quantization(FP8, ("a",)).to_json().keys() == {"format", "weights", "method"}
    for bad in ("int8", 1):
        with pytest.raises(
            CheckpointError, match=r"x: .* activations do not go with fp8 weights; accepted: fp8 with fp8"
        ):
            Quantization.from_json(data | {"activations": bad}, "x")
    with pytest.raises(ConfigError, match="fp8 activations do not go with int8 weights"):
        Quantization(INT8, ("a",), activations="fp8")


@pytest.mark.parametrize("norm", [None, "layer"])
def test_rows_are_rounded_before_they_are_multiplied(norm: str | None) -> None:
    """Oracle: by hand, in float64: a row's largest absolute value becomes 448, after a norm that is fused in. A row of zeros
    stays one."""
    generator = torch.Generator().manual_seed(8)
    x = torch.randn(3, 16, generator=generator, dtype=torch.float64) * torch.tensor([[1.0], [1e3], [1e-3]])
    x[0, :2] = torch.tensor([448.0, 0.1])
    if norm is None:
        x[2] = 0
    weight = round_to_nearest(torch.randn(4, 16, generator=generator), FP8, name="w")
    attrs = {"activations": "fp8"} | ({} if norm is None else {"norm": norm, "eps": 1e-5})
    scale = weight.scale.double()
    found = get_op("quantized_linear").reference(ReferenceContext(), attrs, x, weight.integers, scale)
    rows = x if norm is None else torch.nn.functional.layer_norm(x, (16,), eps=1e-5)
    step = rows.abs().amax(1, keepdim=True) / 448
    rounded = (rows / step.where(step > 0, 1)).to(torch.float8_e4m3fn).double() * step
    assert max_error(rounded, rows) > 0
    assert max_error(found, rounded @ by_definition(weight.integers, scale).T) <= OP_FLOAT64_ABS


def test_the_pipeline_rounds_the_rows_of_quantized_products(
    opt_checkpoint: Callable[[str], OptCheckpoint],
) -> None:
    """Oracle: the graph without, which differs in nothing else. The float head is left alone."""
    checkpoint = opt_checkpoint("pre_norm")
    composed = checkpoint.family.compose(checkpoint.config)
    plain, rounding = (
        pipeline(composed, nearest(QuantizeOptions(FP8, activations=activations))(checkpoint.weights())).graph
        for activations in (None, "fp8")
    )
    for node, other in zip(rounding.nodes, plain.nodes, strict=True):
        extra = {"activations": "fp8"} if node.op == "quantized_linear" else {}
        assert dataclasses.replace(node, attrs=other.attrs) == other and dict(node.attrs) == {
            **other.attrs,
            **extra,
        }


def table() -> list[ResolvedWeight]:
    return [
        ResolvedWeight("embed", (), (10, 64), Shard.EMBEDDING, IDENTITY),
        ResolvedWeight("up", (), (8, 64), Shard.COLUMN, IDENTITY, quantizable=True),
        ResolvedWeight("down", (), (8, 64), Shard.ROW, IDENTITY, quantizable=True),
        ResolvedWeight("head", (), (10, 64), Shard.VOCAB_HEAD, IDENTITY, tied_to="embed"),
        ResolvedWeight("head.bias", (), (10,), Shard.VOCAB_HEAD, IDENTITY),
    ]


def test_the_table_says_what_is_quantized() -> None:
    assert QuantizeOptions(INT8).choose(table()).weights == ("down", "up")
    assert QuantizeOptions(INT8, lm_head=True).choose(table()).weights == ("down", "head", "up")
    with pytest.raises(ConfigError, match="marks no weight as quantizable"):
        QuantizeOptions(INT8).choose(table()[:1])


# ---- sources and shards --------------------------------------------------------------------------


def quantized(
    checkpoint: OptCheckpoint,
    how: WeightFormat,
    dtype: DType = DType.FLOAT32,
    *,
    lm_head: bool = False,
    **sharding: Any,
) -> QuantizedWeights:
    source = checkpoint.weights(dtype, ShardingOptions(**sharding))
    return nearest(QuantizeOptions(how, lm_head))(source)


def parts_of(source: WeightSource, rank: int, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    return source.read(rank, name), source.read(rank, f"{name}.scale")


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


# ---- passes --------------------------------------------------------------------------------------


def evaluate(
    graph: Graph, weights: Mapping[str, torch.Tensor], inputs: Inputs, communicator: Any = None
) -> torch.Tensor:
    context = ReferenceContext(filled_cache(graph, PAGE_SIZE, NUM_PAGES, torch.float64), communicator)
    result: torch.Tensor = interpret(graph, {**weights, **inputs}, context)
    assert result.dtype == torch.float64
    return result


def two_prompts(vocab_size: int) -> Inputs:
    generator = torch.Generator().manual_seed(7)
    a, b = (torch.randint(vocab_size, (size,), generator=generator).tolist() for size in (5, 18))
    return PagedSequences(PAGE_SIZE, NUM_PAGES).step({"a": a, "b": b})


def wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def stored_weights(parts: Partition, source: WeightSource, rank: int) -> dict[str, torch.Tensor]:
    def read(name: str) -> torch.Tensor:
        return wide(source.read(rank, name))

    return {
        node.name: interpret(recipe, {n.name: read(n.name) for n in recipe.weights})
        if (recipe := parts.recipes.get(node.name)) is not None
        else read(node.name)
        for node in parts.graph.weights
    }


def dequantized(source: QuantizedWeights, name: str) -> torch.Tensor:
    if name not in source.quantization.weights:
        return source.read(0, name).double()
    return by_definition(*parts_of(source, 0, name))


def pipeline(
    composed: Graph, source: WeightSource, rank: int = 0, fusions: frozenset[str] = fuse.FUSIONS
) -> Partition:
    return optimize(
        composed, sharding=source.sharding, rank=rank, aliases=source.aliases, fusions=fusions, ops=op_names(),
        quantization=source.quantization,
    )  # fmt: skip


VARIANTS_OF = [
    *(("int8", name) for name in VARIANTS if name != "vocabulary_50272"),
    *(("int4", name) for name in ("pre_norm", "bias_free_non_affine_gelu", "head_dim_80", "untied_head")),
    ("fp8", "pre_norm"),
    ("fp8", "untied_head"),
]


@pytest.mark.parametrize("fusions", [frozenset(), fuse.FUSIONS], ids=["no fusions", "all fusions"])
@pytest.mark.parametrize(("precision", "variant"), VARIANTS_OF)
def test_the_pipeline_computes_with_the_dequantized_weights(
    precision: str, variant: str, fusions: frozenset[str], opt_checkpoint: Callable[[str], OptCheckpoint]
) -> None:
    """Oracle: the graph as composed, in float64, with weights dequantized by the definition. No integers are unpacked by
    the build, and with all fusions every quantized product reads its integers itself."""
    checkpoint = opt_checkpoint(variant)
    source = quantized(checkpoint, FORMATS[precision], lm_head=variant == "untied_head")
    composed = checkpoint.family.compose(checkpoint.config)
    parts = pipeline(composed, source, fusions=fusions)
    inputs = two_prompts(checkpoint.config.vocab_size)
    floats = {node.name: dequantized(source, node.name) for node in composed.weights}
    value = evaluate(parts.graph, stored_weights(parts, source, 0), inputs)
    assert max_error(value, evaluate(composed, floats, inputs)) <= FLOAT64_ABS
    ops = [node.op for node in parts.graph.nodes]
    layers, head = checkpoint.config.num_layers, variant == "untied_head"
    products = "quantized_linear" if fusions else "dequantize"
    assert ops.count(products) == layers * (4 if fusions else 6) + head
    stored = {node.name: node.outputs[0].dtype for node in parts.graph.weights}
    integers = [
        name for name, dtype in stored.items() if dtype in (DType.INT8, DType.UINT8, DType.FLOAT8_E4M3)
    ]
    assert len(integers) == ops.count(products)


@pytest.mark.parametrize("precision", FORMATS)
@pytest.mark.parametrize("embedding", [{}, {"use_parallel_embedding": True}])
def test_ranks_together_compute_what_one_does(
    precision: str, embedding: dict[str, Any], opt_checkpoint: Callable[[str], OptCheckpoint]
) -> None:
    """Oracle: the composed graph with the dequantized weights of one rank. Row-split products share their rows' scales."""
    checkpoint = opt_checkpoint("vocabulary_odd")
    composed = checkpoint.family.compose(checkpoint.config)
    one = quantized(checkpoint, FORMATS[precision], lm_head=True)
    inputs = two_prompts(checkpoint.config.vocab_size)
    expected = evaluate(
        composed, {node.name: dequantized(one, node.name) for node in composed.weights}, inputs
    )
    source = quantized(checkpoint, FORMATS[precision], lm_head=True, tp_size=2, **embedding)

    def run(rank: int, communicator: RankCommunicator) -> torch.Tensor:
        parts = pipeline(composed, source, rank)
        return evaluate(parts.graph, stored_weights(parts, source, rank), inputs, communicator)

    for logits in run_ranks(2, run):
        assert max_error(logits, expected) <= FLOAT64_ABS


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


def test_gate_and_up_are_joined_and_grouped_queries_too() -> None:
    """Oracle: the toy decoder with dequantized weights. q has three times the rows of k and v."""
    composed = toy_decoder()
    floats = {
        name: value.float()
        for name, value in random_weights(composed).items()
        if ".attention." in name or ".mlp." in name
    }
    whole = {name: round_to_nearest(value, INT8, name=name) for name, value in floats.items()}
    graph = quantize(composed, Quantization(INT8, tuple(sorted(whole)))).verify()
    stored = {name + suffix: wide(part) for name, q in whole.items() for suffix, part in q.parts().items()}
    others = {name: value for name, value in random_weights(composed).items() if name not in whole}
    expected = {**others, **{name: by_definition(q.integers, q.scale) for name, q in whole.items()}}
    inputs = two_prompts(61)
    joined = rewrite(rewrite(graph, (fuse.linear_siblings,)), (fuse.dequantize_linear,)).verify()
    value = evaluate(joined, {**others, **stored}, inputs)
    assert max_error(value, evaluate(composed, expected, inputs)) <= FLOAT64_ABS
    assert [node.op for node in joined.nodes].count("quantized_linear") == 2 * 4


def mixed_siblings(*formats: WeightFormat | None) -> Graph:
    """Products of one input, each with a weight of one of these formats."""
    g = GraphBuilder(
        DType.FLOAT32, weight_rows(table=(11, 64), **{f"w{i}": (8, 64) for i in range(len(formats))})
    )
    x = g.add("embedding", "token_ids", g.weight("table"), name="x", offset=0)
    parts = [g.add("linear", x, g.weight(f"w{i}"), name=f"y{i}") for i in range(len(formats))]
    graph = g.finish(g.add("concat", *parts, name="all", axis=1))
    for i, how in enumerate(formats):
        graph = quantize(graph, None if how is None else Quantization(how, (f"w{i}",)))
    return graph.verify()


@pytest.mark.parametrize("formats", [(INT8, None), (INT8, INT4), (INT4, WeightFormat("int4", 64)),
                                     (INT4, WeightFormat("int4", 32, True))])  # fmt: skip
def test_siblings_of_different_formats_stay_apart(formats: tuple[WeightFormat | None, ...]) -> None:
    graph = mixed_siblings(*formats)
    assert rewrite(graph, (fuse.linear_siblings,)) == graph
    same = mixed_siblings(formats[0], formats[0])
    assert rewrite(same, (fuse.linear_siblings,)) != same


def test_zero_points_are_joined_with_the_rest() -> None:
    how = WeightFormat("int4", 32, True)
    graph = rewrite(mixed_siblings(how, how), (fuse.linear_siblings, fuse.dequantize_linear)).verify()
    (node,) = (node for node in graph.nodes if node.op == "quantized_linear")
    assert [str(graph.specs[name]) for name in node.used[1:]] == [
        "uint8[16, 32]",
        "float32[16, 2]",
        "int8[16, 2]",
    ]


def test_norms_are_not_folded_into_quantized_weights(opt_checkpoint: Callable[[str], OptCheckpoint]) -> None:
    """Their weights would have to be folded before rounding. In the float graph they all are, but for the final one's."""
    checkpoint = opt_checkpoint("pre_norm")
    composed = checkpoint.family.compose(checkpoint.config)
    fusions = frozenset({fuse.AFFINE})
    norms = {
        kind: sum(len(node.inputs) > 1 for node in pipeline(composed, source, fusions=fusions).graph.nodes if "norm" in node.op)
        for kind, source in (("float", checkpoint.weights()), ("int8", quantized(checkpoint, INT8)))
    }  # fmt: skip
    # q, k and v are three readers of the attention's norm, which keeps that one from folding in either.
    assert norms["int8"] - norms["float"] == checkpoint.config.num_layers


def test_nothing_changes_without_quantization() -> None:
    graph = toy_decoder()
    assert quantize(graph, None) is graph


# ---- targets -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [DType.FLOAT32, DType.BFLOAT16])
@pytest.mark.parametrize("precision", FORMATS)
def test_a_cpu_engine_computes_with_its_own_dequantized_weights(
    precision: str, dtype: DType, opt_checkpoint: Callable[[str], OptCheckpoint], tmp_path: Path
) -> None:
    """Oracle: the float graph in float64 with the weights that the engine's integers stand for."""
    checkpoint = opt_checkpoint("pre_norm")
    model = dataclasses.replace(checkpoint.config, dtype=dtype)
    source = quantized(checkpoint, FORMATS[precision], dtype)
    build_engine(checkpoint.family, model, source, BUILD, tmp_path / "engine")
    engine = Engine.open(tmp_path / "engine")
    graph = engine.ranks[0].graph
    program = CpuProgram(
        graph, engine.map_weights(0), filled_cache(graph, PAGE_SIZE, NUM_PAGES, to_torch(dtype))
    )
    composed = checkpoint.family.compose(model)
    floats = {node.name: dequantized(source, node.name) for node in composed.weights}
    context = ReferenceContext(filled_cache(graph, PAGE_SIZE, NUM_PAGES, torch.float64))
    sequences = PagedSequences(PAGE_SIZE, NUM_PAGES)
    for work in ({"a": list(range(20)), "b": [5, 6, 7]}, {"a": [3], "b": [9]}):
        inputs = sequences.step(work)
        expected = interpret(composed, {**floats, **inputs}, context)
        tolerance = logits_tolerance(dtype, expected)
        if precision.startswith("int8"):
            tolerance = max(tolerance, LOGITS_INT8_RELATIVE * float(expected.abs().max()))
        assert max_error(program.run(inputs), expected) <= tolerance


def test_a_target_says_what_it_runs(opt_checkpoint: Callable[[str], OptCheckpoint]) -> None:
    assert get_target("cpu").capabilities(BUILD).quantized == KINDS
    assert get_target("cuda").capabilities(BUILD).quantized == KINDS
    checkpoint = opt_checkpoint("cuda_pre_norm")
    model = dataclasses.replace(checkpoint.config, dtype=DType.FLOAT16)
    build = dataclasses.replace(BUILD, target="tensorrt")
    message = (
        "target tensorrt does not run fp8 weights yet; accepted: float, int4, int4 with zero points, int8"
    )
    with pytest.raises(ConfigError, match=message):
        plan(checkpoint.family, model, quantized(checkpoint, FP8, DType.FLOAT16), build, 0)


def test_parts_are_named_after_their_weight() -> None:
    parts = Quantized(torch.zeros(1), torch.ones(1), torch.zeros(1)).parts()
    assert (
        set(parts)
        == set(WeightFormat("int4", 32, True).parts((2, 64), DType.FLOAT16))
        == {"", ".scale", ".zero"}
    )
