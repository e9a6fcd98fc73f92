"""Engines of target cpu whose decode steps are compiled code: gates, whose two halves are parts of one register; rotated
queries and keys beside values that are part of one; every activation.

Oracles: transformers in float32; for int8 the graph in float64 with the weights that integers stand for; the same program
node by node.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from trtc.core.build import build_engine
from trtc.core.dtypes import DType, to_torch
from trtc.core.engine import Engine
from trtc.core.quantize.integers import dequantize
from trtc.core.targets.cpu import CpuProgram
from trtc.core.targets.cpu_step import DecodeLimits
from trtc.core.weight_source import WeightSource
from trtc.tests.opt_models import BUILD, OptCheckpoint
from trtc.tests.packed_steps import Inputs, PagedSequences, Reference, filled_cache
from trtc.tests.tolerances import LOGITS_INT8_DECODE_RELATIVE, logits_tolerance, max_error

from .graph_values import NUM_PAGES, PAGE_SIZE
from .quantized_weights import INT8, quantized
from .test_cpu_target import needs_kernels

TOKENS = {"a": [5, 17, 1, 90, 0, 23, 64, 2, 11, *range(20, 45)], "b": [*range(50, 80), 3, 7, 8, 1]}
VARIANTS = ["llama", "llama_gelu", "bias_free_non_affine_gelu", "gpt2"]
Step = Callable[[Inputs], torch.Tensor]


def in_steps(step: Step, chunks: Sequence[int]) -> torch.Tensor:
    """[sequences, tokens, vocab_size] of both sequences, which are fed in `chunks` of so many tokens of each."""
    sequences, start, rows = PagedSequences(PAGE_SIZE, NUM_PAGES), 0, []
    for size in chunks:
        work = {name: tokens[start : start + size] for name, tokens in TOKENS.items()}
        rows.append(step(sequences.step(work)).clone().unflatten(0, (len(work), size)))
        start += size
    return torch.cat(rows, dim=1)


@torch.no_grad()
def transformers_logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    logits: torch.Tensor = model(torch.tensor(list(TOKENS.values()))).logits
    return logits


def float64_logits(model: OptCheckpoint, source: WeightSource, chunks: Sequence[int]) -> torch.Tensor:
    assert source.quantization is not None

    def value(name: str) -> torch.Tensor:
        if name in source.quantization.weights:
            return dequantize(source.read(0, name), source.read(0, f"{name}.scale").double())
        return source.read(0, name).double()

    composed = model.family.compose(model.config)
    floats = {node.name: value(node.name) for node in composed.weights}
    return in_steps(Reference(composed, floats, PAGE_SIZE, NUM_PAGES).run, chunks)


@needs_kernels
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_decode_steps_are_compiled_and_compute_what_node_by_node_does(
    variant: str, precision: str, family_checkpoint: Callable[[str], OptCheckpoint], tmp_path: Path
) -> None:
    """One token of each sequence at a time; and, to the last bit, several."""
    model = family_checkpoint(variant)
    dtype = DType.BFLOAT16 if precision == "bfloat16" else DType.FLOAT32
    source = quantized(model, INT8) if precision == "int8" else model.weights(dtype)
    config = dataclasses.replace(model.config, dtype=dtype)
    build_engine(model.family, config, source, BUILD, tmp_path / "engine")
    engine = Engine.open(tmp_path / "engine")
    graph, weights = engine.ranks[0].graph, engine.map_weights(0)

    def program() -> CpuProgram:
        pages = filled_cache(graph, PAGE_SIZE, NUM_PAGES, to_torch(dtype))
        return CpuProgram(graph, weights, pages, decode_limits=DecodeLimits(max_tokens=8, max_len=128))

    assert program().decodes_greedily
    count = len(TOKENS["a"])
    singly, several = [1] * count, [1, 4, 3, *[2] * ((count - 8) // 2)]
    compiled, nodes = in_steps(program().run, singly), in_steps(program()._run, singly)
    assert torch.equal(in_steps(program().run, several), compiled)
    if precision == "int8":
        expected = float64_logits(model, source, singly)
        tolerance = LOGITS_INT8_DECODE_RELATIVE * float(expected.abs().max())
    else:
        expected = transformers_logits(model.folder)
        tolerance = logits_tolerance(dtype, expected)
    assert max_error(compiled, expected) <= tolerance
    assert max_error(compiled, nodes) <= tolerance
