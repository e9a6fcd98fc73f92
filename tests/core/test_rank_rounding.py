"""How far engines of several ranks are from that of one, on target cpu: by the order of sums, and by where int8 weights round
activations. That their weights are the same, bit for bit, is in test_quantized_sources.py.

Oracle: the engine of one rank, node by node; where said, the graph in float64 with the weights that integers stand for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from trtc.core.build import build_engine
from trtc.core.dtypes import DType, to_torch
from trtc.core.engine import Engine
from trtc.core.passes.stage import STAGE_INPUT
from trtc.core.quantize.integers import dequantize
from trtc.core.quantize.scheme import QuantizeOptions
from trtc.core.quantize.source import nearest
from trtc.core.sharding import ShardingOptions
from trtc.core.weight_source import WeightSource
from trtc.runtime.cpu_executor import CpuExecutor
from trtc.runtime.step_input import StepInput
from trtc.tests.opt_models import BUILD, OptCheckpoint
from trtc.tests.packed_steps import PagedSequences, Reference
from trtc.tests.thread_group import RankCommunicator, run_ranks
from trtc.tests.tolerances import (
    LOGITS_FP8_CACHE_RELATIVE,
    LOGITS_INT8_DECODE_RELATIVE,
    LOGITS_INT8_RELATIVE,
    RANKS_EPSILONS,
    max_error,
)

from .graph_values import NUM_PAGES, PAGE_SIZE
from .quantized_weights import FORMATS

ONE = ShardingOptions()
Work = Mapping[str, Sequence[int]]
LONG: Sequence[Work] = ({"a": range(20), "b": (5, 6, 7)}, {"a": (3,), "b": (9,)}, {"b": (4,), "a": (8,)})
"""Prompts, and decode steps behind them."""
SHORT: Sequence[Work] = ({"a": (2,), "b": (5,)}, {"a": (3,), "b": (9,)}, {"b": (4,), "a": (8,)})
"""Decode steps alone."""


def weights(model: OptCheckpoint, precision: str, dtype: DType, sharding: ShardingOptions) -> WeightSource:
    floats = model.weights(dtype, sharding)
    return floats if precision == "float" else nearest(QuantizeOptions(FORMATS[precision]))(floats)


def logits(
    model: OptCheckpoint,
    precision: str,
    folder: Path,
    work: Sequence[Work] = LONG,
    dtype: DType = DType.FLOAT32,
    sharding: ShardingOptions = ONE,
    kv_cache_dtype: str = "auto",
) -> torch.Tensor:
    """Of the last tokens of every step, [rows, vocab_size], by an engine whose ranks are threads: the last stage's first."""
    path = folder / "-".join(map(str, (precision, dtype, *sharding.to_json().values())))
    sizes = {"tp_size": sharding.tp_size, "pp_size": sharding.pp_size, "kv_cache_dtype": kv_cache_dtype}
    build = dataclasses.replace(BUILD, **sizes)
    config = dataclasses.replace(model.config, dtype=dtype)
    build_engine(model.family, config, weights(model, precision, dtype, sharding), build, path)
    engine = Engine.open(path)

    def run(member: int, communicator: RankCommunicator) -> torch.Tensor:
        ranks = range(member, sharding.num_ranks, sharding.tp_size)
        stages = [CpuExecutor(engine, rank=rank, communicator=communicator) for rank in ranks]
        found = []
        for inputs in steps(work):
            step = StepInput(**{name: tensor.numpy() for name, tensor in inputs.items()})
            received: dict[str, torch.Tensor] = {}
            for stage in stages:
                received = {STAGE_INPUT: stage.execute(step, **received)}
            found.append(received[STAGE_INPUT])
        return torch.cat(found)

    return run_ranks(sharding.tp_size, run)[0]


def steps(work: Sequence[Work]) -> Iterator[dict[str, torch.Tensor]]:
    sequences = PagedSequences(PAGE_SIZE, NUM_PAGES)
    return (sequences.step(one, last_rows_only=True) for one in work)


def float64_logits(model: OptCheckpoint, precision: str, work: Sequence[Work]) -> torch.Tensor:
    composed = model.family.compose(model.config)
    source = weights(model, precision, DType.FLOAT32, ONE)
    chosen = source.quantization.weights if source.quantization else ()

    def value(name: str) -> torch.Tensor:
        if name in chosen:
            return dequantize(source.read(0, name), source.read(0, f"{name}.scale").double())
        return source.read(0, name).double()

    reference = Reference(
        composed, {node.name: value(node.name) for node in composed.weights}, PAGE_SIZE, NUM_PAGES
    )
    return torch.cat([reference.run(inputs) for inputs in steps(work)])


def distance(value: torch.Tensor, reference: torch.Tensor) -> float:
    """The largest error, relative to the largest logit."""
    return max_error(value, reference) / float(reference.abs().max())


@pytest.mark.parametrize("dtype", [DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16])
@pytest.mark.parametrize(
    ("precision", "variant"), [("float", "pre_norm"), ("int4", "llama_groups"), ("fp8", "gpt2_groups")]
)
def test_sums_of_ranks_differ_by_a_few_units_of_the_dtype(
    precision: str,
    variant: str,
    dtype: DType,
    family_checkpoint: Callable[[str], OptCheckpoint],
    tmp_path: Path,
) -> None:
    model = family_checkpoint(variant)
    one = logits(model, precision, tmp_path, dtype=dtype)
    two = logits(model, precision, tmp_path, dtype=dtype, sharding=ShardingOptions(tp_size=2, pp_size=2))
    assert distance(two, one) <= RANKS_EPSILONS[dtype] * torch.finfo(to_torch(dtype)).eps


@pytest.mark.parametrize(("precision", "variant"), [("int8", "gpt2_groups"), ("int4", "llama_groups")])
def test_stages_of_a_pipeline_compute_the_bits_of_one_rank(
    precision: str, variant: str, family_checkpoint: Callable[[str], OptCheckpoint], tmp_path: Path
) -> None:
    model = family_checkpoint(variant)
    one = logits(model, precision, tmp_path)
    assert torch.equal(logits(model, precision, tmp_path, sharding=ShardingOptions(pp_size=2)), one)


@pytest.mark.parametrize("variant", ["pre_norm", "gpt2_groups"])
def test_int8_weights_round_the_activations_of_prompts_by_rank(
    variant: str, family_checkpoint: Callable[[str], OptCheckpoint], tmp_path: Path
) -> None:
    """Their ranks have 32 columns of a row, which are no whole 64: they round them in other steps than one rank does."""
    model = family_checkpoint(variant)
    one = logits(model, "int8", tmp_path)
    two = logits(model, "int8", tmp_path, sharding=ShardingOptions(tp_size=2, pp_size=2))
    assert distance(two, one) <= LOGITS_INT8_RELATIVE


@pytest.mark.parametrize("variant", ["pre_norm", "gpt2_groups", "llama_groups"])
def test_decode_steps_of_ranks_keep_16_bits_of_activations(
    variant: str, family_checkpoint: Callable[[str], OptCheckpoint], tmp_path: Path
) -> None:
    """As compiled steps of one rank do, also where they run node by node. Oracle: float64, and one rank."""
    model = family_checkpoint(variant)
    exact = float64_logits(model, "int8", SHORT)
    one = logits(model, "int8", tmp_path, SHORT)
    two = logits(model, "int8", tmp_path, SHORT, sharding=ShardingOptions(tp_size=2))
    assert distance(one, exact) <= LOGITS_INT8_DECODE_RELATIVE
    assert distance(two, exact) <= LOGITS_INT8_DECODE_RELATIVE
    assert distance(two, one) <= LOGITS_INT8_DECODE_RELATIVE


def test_ranks_round_keys_and_values_to_the_same_numbers(
    family_checkpoint: Callable[[str], OptCheckpoint], tmp_path: Path
) -> None:
    """A cache of e4m3 numbers, whose scale is 1 on every rank."""
    model = family_checkpoint("llama_groups")
    one = logits(model, "int4", tmp_path, kv_cache_dtype="fp8")
    sharding = ShardingOptions(tp_size=2, pp_size=2)
    two = logits(model, "int4", tmp_path, sharding=sharding, kv_cache_dtype="fp8")
    assert distance(two, one) <= LOGITS_FP8_CACHE_RELATIVE[DType.FLOAT32]
