"""Quantized graphs through the passes, on ranks and in engines.

Oracle: the float graph as composed, in float64, with weights dequantized by the definition.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from trtc.core.build import build_engine, plan
from trtc.core.dtypes import DType, to_torch
from trtc.core.engine import Engine
from trtc.core.errors import ConfigError
from trtc.core.graph import Graph, GraphBuilder
from trtc.core.interpreter import interpret
from trtc.core.ops import ReferenceContext, get_op, op_names
from trtc.core.passes import Partition, fuse, optimize
from trtc.core.passes.quantize import quantize
from trtc.core.passes.rewrite import rewrite
from trtc.core.quantize.integers import round_to_nearest
from trtc.core.quantize.scheme import KINDS, Quantization, QuantizeOptions, WeightFormat
from trtc.core.quantize.source import QuantizedWeights, nearest
from trtc.core.targets.base import get_target
from trtc.core.targets.cpu import CpuProgram
from trtc.core.weight_source import WeightSource
from trtc.tests.opt_models import BUILD, VARIANTS, OptCheckpoint
from trtc.tests.packed_steps import PagedSequences, filled_cache
from trtc.tests.thread_group import RankCommunicator, run_ranks
from trtc.tests.tolerances import (
    FLOAT64_ABS,
    LOGITS_INT8_RELATIVE,
    OP_FLOAT64_ABS,
    logits_tolerance,
    max_error,
)
from trtc.tests.toy_decoder import random_weights, toy_decoder, weight_rows

from .graph_values import NUM_PAGES, PAGE_SIZE, evaluate, two_prompts
from .quantized_weights import FORMATS, FP8, INT4, INT8, by_definition, parts_of, quantized

# ---- passes --------------------------------------------------------------------------------------


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
@pytest.mark.parametrize(
    ("variant", "embedding", "lm_head"),
    [
        ("vocabulary_odd", {}, True),
        ("vocabulary_odd", {"use_parallel_embedding": True}, True),
        ("vocabulary_odd", {"use_parallel_embedding": True}, False),  # head and embedding are one weight
        ("gpt2_groups", {"use_parallel_embedding": True, "embedding_sharding_dim": 1}, False),  # they are two
        ("llama_groups", {}, True),
    ],
)
def test_ranks_together_compute_what_one_does(
    precision: str, variant: str, embedding: dict[str, Any], lm_head: bool, family_checkpoint: Callable[[str], OptCheckpoint],
) -> None:  # fmt: skip
    """Oracle: the composed graph with the dequantized weights of one rank. Row-split products share their rows' scales."""
    checkpoint = family_checkpoint(variant)
    composed = checkpoint.family.compose(checkpoint.config)
    one = quantized(checkpoint, FORMATS[precision], lm_head=lm_head)
    inputs = two_prompts(checkpoint.config.vocab_size)
    expected = evaluate(
        composed, {node.name: dequantized(one, node.name) for node in composed.weights}, inputs
    )
    source = quantized(checkpoint, FORMATS[precision], lm_head=lm_head, tp_size=2, **embedding)

    def run(rank: int, communicator: RankCommunicator) -> torch.Tensor:
        parts = pipeline(composed, source, rank)
        return evaluate(parts.graph, stored_weights(parts, source, rank), inputs, communicator)

    for logits in run_ranks(2, run):
        assert max_error(logits, expected) <= FLOAT64_ABS


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
