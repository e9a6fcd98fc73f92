"""Quantized weights in TensorRT networks. Oracle: the ops' references on the same integers, executed by `core.interpreter`,
against the network definition executed layer by layer; and the real builder for the GPUs it builds for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from trtc.core.dtypes import DType, to_torch
from trtc.core.errors import BuildError
from trtc.core.interpreter import interpret
from trtc.core.ops import ReferenceContext
from trtc.core.quantize.integers import Quantized, pack_int4, round_to_nearest
from trtc.core.quantize.scheme import QuantizeOptions, WeightFormat
from trtc.core.quantize.source import nearest
from trtc.core.sharding import ShardingOptions
from trtc.core.targets.tensorrt import TARGET
from trtc.core.targets.tensorrt.flavour import find_flavour
from trtc.core.targets.tensorrt.lower import LoweringOptions, lower_graph
from trtc.tests.core.targets.tensorrt_cases import Composer
from trtc.tests.core.targets.tensorrt_opt import BUILD, CAPACITY, Rank, Session, ranks_of
from trtc.tests.opt_models import OptCheckpoint
from trtc.tests.packed_steps import PagedSequences, filled_cache
from trtc.tests.tolerances import logits_tolerance, max_error
from trtc.tests.trt_interpreter import NetworkInterpreter

trt = pytest.importorskip("tensorrt_rtx")
pytestmark = pytest.mark.tensorrt_rtx

OPTIONS = LoweringOptions(kv_capacity=CAPACITY)
Checkpoints = Callable[[str], OptCheckpoint]


def with_zeros(rows: int, columns: int, group: int, dtype: torch.dtype) -> Quantized:
    generator = torch.Generator().manual_seed(5)
    integers = torch.randint(-8, 8, (rows, columns), generator=generator).to(torch.int8)
    scale = torch.rand(rows, columns // group, generator=generator) + 0.1
    zero = torch.randint(-8, 8, scale.shape, generator=generator).to(torch.int8)
    return Quantized(pack_int4(integers), scale.to(dtype), zero)


@pytest.mark.parametrize("dtype", [DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16], ids=str)
@pytest.mark.parametrize("form", ["int8", "int4", "int4, one group", "int4 with zero points"])
def test_a_weight_is_what_its_integers_stand_for(form: str, dtype: DType) -> None:
    """Exactly: both round integer * scale once."""
    c = Composer(dtype)
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(4)).to(to_torch(dtype))
    if form == "int4 with zero points":
        whole = with_zeros(6, 64, 32, to_torch(dtype))
    else:
        how = WeightFormat("int8") if form == "int8" else WeightFormat("int4", 64 if "one" in form else 32)
        whole = round_to_nearest(weight, how, name="w")
    names = []
    for suffix, part in whole.parts().items():
        c.values[f"w{suffix}"] = part
        names.append(
            c.add(
                f"w{suffix}", "weight", dtype=str(part.dtype).removeprefix("torch."), shape=tuple(part.shape)
            )
        )
    x = c.activation(64)
    graph = c.graph(c.add("y", "linear", x, c.add("w.float", "dequantize", *names)))
    network = lower_graph(
        graph, {n.name: c.values[n.name] for n in graph.weights}, find_flavour("tensorrt_rtx"), OPTIONS
    )
    layers = [network.definition.get_layer(i) for i in range(network.definition.num_layers)]
    (constant,) = (layer for layer in layers if layer.name == "w")
    assert constant.get_output(0).dtype.name == (
        "INT8" if form in ("int8", "int4 with zero points") else "INT4"
    )
    network.mark_output(next(layer for layer in layers if layer.name == "w.float").get_output(0))
    found = NetworkInterpreter(network.definition, trt).run({"token_ids": c.values["token_ids"].unsqueeze(0)})
    expected = interpret(graph, c.values, ReferenceContext(), None)
    weights = {node.name: c.values[node.name] for node in graph.weights}
    dequantized = interpret(
        replace(graph, outputs=("w.float",)), {**weights, "token_ids": c.values["token_ids"]}
    )
    assert torch.equal(found["w.float"], dequantized)
    assert max_error(found["y"], expected) <= logits_tolerance(dtype, expected)


def quantized(checkpoint: OptCheckpoint, dtype: DType, precision: str, tp_size: int = 1) -> list[Rank]:
    how = WeightFormat(precision, 32 if precision == "int4" else None)
    floats = checkpoint.weights(dtype, ShardingOptions(tp_size))
    return ranks_of(checkpoint, dtype, source=nearest(QuantizeOptions(how, lm_head=True))(floats))


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_network_computes_with_its_own_dequantized_weights(
    precision: str, tp_size: int, opt_checkpoint: Checkpoints
) -> None:
    """Prompts, then decode steps through the caches. Oracle: one rank's graph by the ops' references in float64."""
    checkpoint = opt_checkpoint("vocabulary_odd")
    (one,) = quantized(checkpoint, DType.FLOAT32, precision)
    networks = [
        lower_graph(rank.graph, rank.weights, find_flavour("tensorrt_rtx"), OPTIONS)
        for rank in quantized(checkpoint, DType.FLOAT32, precision, tp_size)
    ]
    session = Session([NetworkInterpreter(network.definition, trt) for network in networks], 2)
    wide = {name: t.double() if t.is_floating_point() else t for name, t in one.weights.items()}
    pages = PagedSequences(page_size=16, num_pages=8)
    context = ReferenceContext(filled_cache(one.graph, 16, 8, torch.float64))
    for new in ([[3, 14, 15, 92], [65, 35]], [[8], [97]], [[9], [3]]):
        inputs = pages.step(dict(zip("ab", new, strict=True)), last_rows_only=True)
        expected = interpret(one.graph, {**inputs, **wide}, context)
        found = session.step(new)[..., : expected.shape[-1]]
        assert max_error(found, expected) <= logits_tolerance(DType.FLOAT32, expected)


@pytest.mark.parametrize("capability", ["8.0", "8.6", "8.9", "12.0"])
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_plans_for_each_gpu(
    precision: str, capability: str, opt_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    """The real builder takes them."""
    (rank,) = quantized(opt_checkpoint("cuda_pre_norm"), DType.FLOAT16, precision)
    options = {"flavour": "tensorrt_rtx", "compute_capabilities": [capability]}
    TARGET.compile(rank.graph, replace(BUILD, target_options=options), tmp_path, 0, rank.weights)
    assert (tmp_path / "rank0.plan").exists()


def test_plans_are_smaller_by_the_bits(opt_checkpoint: Checkpoints, tmp_path: Path) -> None:
    """Four bits reach the plan as four bits. Oracle: the linear layers' weights, counted by hand. A float plan is no measure:
    its kernels are others."""
    sizes = {}
    options = {"flavour": "tensorrt_rtx", "compute_capabilities": ["8.9"]}
    for kind in ("int8", "int4"):
        (rank,) = quantized(opt_checkpoint("cuda_pre_norm"), DType.FLOAT16, kind)
        TARGET.compile(rank.graph, replace(BUILD, target_options=options), tmp_path, 0, rank.weights)
        sizes[kind] = (tmp_path / "rank0.plan").stat().st_size
    hidden, ffn = 256, 256
    elements = 2 * (4 * hidden * hidden + 2 * ffn * hidden)
    assert sizes["int8"] - sizes["int4"] > 0.3 * elements


def test_an_old_gpu_is_refused_four_bits_with_the_reason(opt_checkpoint: Checkpoints, tmp_path: Path) -> None:
    (rank,) = quantized(opt_checkpoint("cuda_pre_norm"), DType.FLOAT16, "int4")
    options = {"flavour": "tensorrt_rtx", "compute_capabilities": ["7.5"]}
    with pytest.raises(BuildError, match="sm75, because the model contains HW-specific datatypes: int4"):
        TARGET.compile(rank.graph, replace(BUILD, target_options=options), tmp_path, 0, rank.weights)
