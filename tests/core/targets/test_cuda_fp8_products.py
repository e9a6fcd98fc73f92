"""Products of e4m3 numbers by e4m3 numbers in steps of many rows of target cuda, without a GPU: torch's own product, and the
references of kernels. Oracle: the interpreter in float64, whose product rounds its rows as the op says."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from trtc.core.dtypes import DType
from trtc.core.errors import ConfigError
from trtc.core.graph import Graph
from trtc.core.interpreter import interpret
from trtc.core.ops import ReferenceContext
from trtc.core.targets.base import CacheShape
from trtc.core.targets.cuda import large_products
from trtc.core.targets.cuda.code import kernel_sources
from trtc.core.targets.cuda.variants import prefill_graph
from trtc.core.targets.program import Kernel, Program
from trtc.kernels.quantize_rows.reference import quantize_rows
from trtc.tests.fp8_products import planned, products
from trtc.tests.packed_steps import PagedSequences, filled_cache
from trtc.tests.tolerances import LOGITS_FP8_ACTIVATIONS_FLOAT32_RELATIVE, max_error


class Launches:
    """Stands for the launchers, which need a GPU."""

    capability = 90

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.relu: list[bool] = []
        self.dequantized = 0
        monkeypatch.setattr(large_products, "Dequantize", lambda library: self._dequantize)
        monkeypatch.setattr(large_products, "QuantizeRows", lambda library: self._quantize_rows)

    def _dequantize(self, integers: torch.Tensor, scale: torch.Tensor, *, out: torch.Tensor) -> None:
        self.dequantized += 1
        out.copy_(integers[:, : out.shape[1]].to(scale.dtype) * scale[:, None])

    def _quantize_rows(self, x: torch.Tensor, *, out: torch.Tensor, scale: torch.Tensor, relu: bool) -> None:
        self.relu.append(relu)
        numbers, scales = quantize_rows(x, relu=relu)
        out.view(torch.uint8).zero_()
        out[:, : x.shape[1]] = numbers
        scale.copy_(scales)


@pytest.mark.parametrize("variant", ["cuda_pre_norm", "cuda_post_norm_projected", "cuda_bias_free_gelu"])
def test_prompts(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ReLU in the product that follows, or GELU after the product; no weight is dequantized. In float32, so that what is
    rounded to eight bits is the same but for numbers next to the middle of two."""
    graph, weights = planned(variant, DType.FLOAT16, tmp_path)
    prefill, launches = prefill_graph(graph), Launches(monkeypatch)
    floats = {name for name, tensor in weights.items() if tensor.dtype is torch.float16}
    narrow, wide = (
        {name: tensor.to(dtype) if name in floats else tensor for name, tensor in weights.items()}
        for dtype in (torch.float32, torch.float64)
    )
    made, large = products(prefill, narrow, launches)  # type: ignore[arg-type]

    def factory(node: Any) -> Kernel:
        kernel = large.kernel(prefill, node)
        return lambda x, integers, scale, zero=None, bias=None, residual=None: kernel(
            x, integers, scale, bias, residual
        )

    cache = filled_cache(prefill, 16, 32, torch.float32)
    program = Program(prefill, made, {"quantized_linear": factory}, ReferenceContext(cache))
    context = ReferenceContext(filled_cache(graph, 16, 32, torch.float64))
    sequences = PagedSequences(16, 32)
    for work in ({"a": list(range(3, 40)), "b": [5, 6, 7]}, {"b": list(range(50, 60)), "a": [9, 8]}):
        inputs = sequences.step(work)
        expected = interpret(graph, wide | inputs, context)
        tolerance = LOGITS_FP8_ACTIVATIONS_FLOAT32_RELATIVE * float(expected.abs().max())
        assert max_error(program.run(inputs), expected) <= tolerance
    rounded = [node for node in prefill.nodes if node.op == "quantized_linear"]
    assert len(launches.relu) == 2 * len(rounded) == 16 and launches.dequantized == 0
    assert sum(launches.relu) == (0 if variant == "cuda_bias_free_gelu" else 4)


def test_sizes_that_no_library_multiplies_are_dequantized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head of 101 rows; and all of them on a GPU that has no such product. Room is for the largest of those weights."""
    graph, weights = planned("cuda_head_dim_80_odd_vocabulary", DType.FLOAT16, tmp_path, lm_head=True)
    launches = Launches(monkeypatch)
    _, large = products(graph, weights, launches)  # type: ignore[arg-type]
    nodes = [node for node in graph.nodes if node.op == "quantized_linear"]
    assert [large.takes_fp8(node) for node in nodes] == [True] * (len(nodes) - 1) + [False]
    assert large._scratch is not None and large._scratch.numel() == 101 * 240
    monkeypatch.setattr(Launches, "capability", 89)
    _, large = products(graph, weights, launches)  # type: ignore[arg-type]
    assert not any(large.takes_fp8(node) for node in nodes)
    assert large._scratch is not None and large._scratch.numel() == 720 * 240 < 256 * 240 * 3 + 1


def test_an_engine_carries_the_kernel_that_rounds_rows(tmp_path: Path) -> None:
    graph, _ = planned("cuda_pre_norm", DType.FLOAT16, tmp_path)
    sources = kernel_sources(graph, CacheShape.of(graph, 16), 1, "sm_90", "float16")
    names = {source.name for source in sources}
    assert "quantize_rows/quantize_rows.cu" in names
    plain = Graph(
        tuple(
            dataclasses.replace(
                node, attrs={name: v for name, v in node.attrs.items() if name != "activations"}
            )
            for node in graph.nodes
        ),
        graph.outputs,
    )
    others = kernel_sources(plain, CacheShape.of(graph, 16), 1, "sm_90", "float16")
    assert "quantize_rows/quantize_rows.cu" not in {source.name for source in others}


def test_target_tensorrt_refuses_it(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="target tensorrt does not run fp8 with fp8 activations weights yet"
    ):
        planned("pre_norm", DType.FLOAT16, tmp_path, "tensorrt")
