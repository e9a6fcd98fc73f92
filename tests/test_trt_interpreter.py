"""The network interpreter itself: single layers against torch's own functions, and what it must refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from trtc.core.targets.tensorrt.build_log import build_log
from trtc.tests.trt_interpreter import NetworkInterpreter, run_ranks
from trtc.tests.trt_layers import InterpreterError

trt = pytest.importorskip("tensorrt_rtx")
pytestmark = pytest.mark.tensorrt_rtx

DTYPES = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.int32: "int32",
}


class Bench:
    """A network under construction; keeps alive what TensorRT only points to."""

    def __init__(self) -> None:
        self.builder = trt.Builder(build_log(trt).logger)  # TensorRT has one logger a process: share it
        self.network = self.builder.create_network(0)
        self.kept: list[torch.Tensor] = []
        self.feed: dict[str, torch.Tensor] = {}

    def input(self, value: torch.Tensor, shape: tuple[int, ...] | None = None) -> Any:
        name = f"input{len(self.feed)}"
        self.feed[name] = value
        return self.network.add_input(name, getattr(trt, DTYPES[value.dtype]), shape or tuple(value.shape))

    def constant(self, value: torch.Tensor) -> Any:
        value = value.contiguous()
        self.kept.append(value)
        weights = trt.Weights(getattr(trt, DTYPES[value.dtype]), value.data_ptr(), value.numel())
        return self.network.add_constant(tuple(value.shape), weights).get_output(0)

    def interpreter(self, *outputs: Any) -> NetworkInterpreter:
        for i, tensor in enumerate(outputs):
            tensor.name = f"output{i}"
            self.network.mark_output(tensor)
        return NetworkInterpreter(self.network, trt)

    def run(self, output: Any) -> torch.Tensor:
        return self.interpreter(output).run(self.feed)["output0"]


@pytest.fixture
def bench() -> Bench:
    torch.manual_seed(0)
    return Bench()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_matrix_multiply_rounds_once(bench: Bench, dtype: torch.dtype) -> None:
    """Oracle: the product in float64, rounded once to the declared dtype. The weight is read back from TensorRT."""
    x, w = torch.randn(5, 7).to(dtype), torch.randn(3, 7).to(dtype)
    none, transpose = trt.MatrixOperation.NONE, trt.MatrixOperation.TRANSPOSE
    y = bench.network.add_matrix_multiply(bench.input(x, (-1, 7)), none, bench.constant(w), transpose)
    assert torch.equal(bench.run(y.get_output(0)), (x.double() @ w.double().T).to(dtype))


def test_layer_norm(bench: Bench) -> None:
    """Oracle: torch.nn.functional.layer_norm."""
    x, w, b = torch.randn(4, 6), torch.randn(6), torch.randn(6)
    layer = bench.network.add_normalization_v2(
        bench.input(x), bench.constant(w.unsqueeze(0)), bench.constant(b.unsqueeze(0)), 1 << 1
    )
    layer.epsilon = 1e-3
    expected = F.layer_norm(x.double(), (6,), w.double(), b.double(), 1e-3)
    torch.testing.assert_close(bench.run(layer.get_output(0)).double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "function"),
    [
        ("RELU", F.relu),
        ("GELU_ERF", F.gelu),
        ("GELU_TANH", lambda x: F.gelu(x, approximate="tanh")),
        ("SIGMOID", torch.sigmoid),
    ],
)
def test_activation(bench: Bench, kind: str, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Oracle: torch's activation functions."""
    x = torch.randn(20)
    layer = bench.network.add_activation(bench.input(x), getattr(trt.ActivationType, kind))
    torch.testing.assert_close(bench.run(layer.get_output(0)), function(x.double()).float())


def test_shuffle_with_shape_computed_in_the_network(bench: Bench) -> None:
    """Oracle: reshape and permute. The new shape comes from Shape and Concatenation layers, as in attention."""
    rows, ids = torch.randn(6, 4), torch.zeros(2, 3, dtype=torch.int32)
    shape = bench.network.add_shape(bench.input(ids, (-1, -1))).get_output(0)
    tail = bench.network.add_constant((2,), trt.Weights(np.array([2, 2], np.int64))).get_output(0)
    layer = bench.network.add_shuffle(bench.input(rows, (-1, 4)))
    layer.set_input(1, bench.network.add_concatenation([shape, tail]).get_output(0))
    layer.second_transpose = trt.Permutation([0, 2, 1, 3])
    assert torch.equal(bench.run(layer.get_output(0)), rows.reshape(2, 3, 2, 2).permute(0, 2, 1, 3))


def test_slice_of_one_axis_leaves_the_others_whole(bench: Bench) -> None:
    """Oracle: indexing. Axis 0 has no size that the network knows."""
    x = torch.randn(3, 6)
    layer = bench.network.add_slice(bench.input(x, (-1, 6)), (2,), (3,), (1,))
    layer.axes = (1,)
    assert torch.equal(bench.run(layer.get_output(0)), x[:, 2:5])


def test_slice_gather_select(bench: Bench) -> None:
    """Oracle: indexing."""
    table, index = torch.randn(5, 4), torch.tensor([4, 0, 2], dtype=torch.int32)
    rows = bench.network.add_gather(bench.constant(table), bench.input(index, (-1,)), 0).get_output(0)
    part = bench.network.add_slice(rows, (1, 1), (2, 2), (1, 2)).get_output(0)
    zero = bench.constant(torch.zeros(1, 1))
    positive = bench.network.add_elementwise(part, zero, trt.ElementWiseOperation.GREATER).get_output(0)
    picked = bench.network.add_select(positive, part, zero).get_output(0)
    assert torch.equal(bench.run(picked), table[[0, 2]][:, 1::2].clamp(min=0))


def attention(bench: Bench, q: Any, k: Any, v: Any, causal: str, lengths: torch.Tensor | None = None) -> Any:
    tensors = [bench.input(t) for t in (q, k, v)]
    layer = bench.network.add_attention_v2(
        *tensors, trt.AttentionNormalizationOp.SOFTMAX, getattr(trt.CausalMaskKind, causal)
    )
    if lengths is not None:
        layer.key_value_lengths = bench.input(lengths)
    return layer.get_output(0)


@pytest.mark.parametrize(
    ("causal", "is_causal"), [("NONE", False), ("UPPER_LEFT", True), ("LOWER_RIGHT", True)]
)
def test_square_attention(bench: Bench, causal: str, is_causal: bool) -> None:
    """Oracle: scaled_dot_product_attention with grouped keys and scale 1; for square scores both causal kinds agree."""
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    expected = F.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), is_causal=is_causal, scale=1.0, enable_gqa=True
    )
    torch.testing.assert_close(bench.run(attention(bench, q, k, v, causal)), expected.float())


def test_attention_lower_right_ends_at_the_length_of_each_sequence(bench: Bench) -> None:
    """Oracle: scaled_dot_product_attention of each sequence alone, cut to its length, with the mask written out."""
    q, k, v = torch.randn(3, 2, 3, 8), torch.randn(3, 2, 10, 8), torch.randn(3, 2, 10, 8)
    lengths = torch.tensor([3, 7, 10], dtype=torch.int32)
    out = bench.run(attention(bench, q, k, v, "LOWER_RIGHT", lengths))
    for b, length in enumerate(lengths.tolist()):
        mask = torch.arange(length) <= torch.arange(3).view(3, 1) + length - 3
        expected = F.scaled_dot_product_attention(
            q[b], k[b, :, :length], v[b, :, :length], attn_mask=mask, scale=1.0
        )
        torch.testing.assert_close(out[b], expected)


def cache_update(bench: Bench, cache: torch.Tensor, update: torch.Tensor, write: list[int]) -> Any:
    index = torch.tensor(write, dtype=torch.int32)
    layer = bench.network.add_kv_cache_update(
        bench.input(cache), bench.input(update), bench.input(index), trt.KVCacheMode.LINEAR
    )
    return layer.get_output(0)


def test_kv_cache_update(bench: Bench) -> None:
    """Oracle: slice assignment. The caller's cache stays as it was."""
    cache, update = torch.zeros(2, 1, 6, 2), torch.randn(2, 1, 3, 2)
    out = bench.run(cache_update(bench, cache, update, [0, 3]))
    expected = cache.clone()
    expected[0, :, 0:3], expected[1, :, 3:6] = update[0], update[1]
    assert torch.equal(out, expected)
    assert not cache.any()


def test_write_beyond_the_cache_is_refused(bench: Bench) -> None:
    output = cache_update(bench, torch.zeros(2, 1, 6, 2), torch.randn(2, 1, 3, 2), [0, 4])
    with pytest.raises(InterpreterError, match=r"sequence 1 writes \[4:7\] into 6 tokens"):
        bench.run(output)


def test_unknown_layer_names_layer_and_type(bench: Bench) -> None:
    layer = bench.network.add_topk(bench.input(torch.randn(4)), trt.TopKOperation.MAX, 2, 1)
    layer.name = "best"
    with pytest.raises(InterpreterError, match="layer 'best': type TOPK is not emulated"):
        bench.interpreter(layer.get_output(0))


def test_option_that_is_not_emulated_is_refused(bench: Bench) -> None:
    x = bench.input(torch.randn(4))
    layer = bench.network.add_slice(x, (0,), (8,), (1,))
    layer.mode = trt.SampleMode.WRAP
    with pytest.raises(InterpreterError, match=r"mode is SampleMode\.WRAP"):
        bench.run(layer.get_output(0))


@pytest.mark.parametrize("value", [torch.randn(2, 3), torch.randn(2, 4).half()])
def test_input_that_does_not_fit_is_refused(bench: Bench, value: torch.Tensor) -> None:
    output = bench.network.add_identity(bench.input(torch.randn(2, 4), (-1, 4))).get_output(0)
    bench.feed["input0"] = value
    with pytest.raises(InterpreterError, match="input 'input0' is"):
        bench.run(output)


def collective_rank(
    kind: str, value: torch.Tensor, layer_name: str = "exchange"
) -> tuple[Bench, NetworkInterpreter]:
    bench = Bench()
    x = bench.input(value, (-1, 4))
    operation, reduction = {
        "all_reduce_sum": (trt.CollectiveOperation.ALL_REDUCE, trt.ReduceOperation.SUM),
        "all_gather": (trt.CollectiveOperation.ALL_GATHER, trt.ReduceOperation.NONE),
    }[kind]
    layer = bench.network.add_dist_collective(x, operation, reduction, -1, [0, 1])
    layer.num_ranks, layer.name, layer.metadata = 2, layer_name, kind
    return bench, bench.interpreter(layer.get_output(0))


@pytest.mark.parametrize("kind", ["all_reduce_sum", "all_gather"])
def test_ranks_run_together(kind: str) -> None:
    """Oracle: sum and concatenation of the ranks' tensors; every rank gets the result."""
    parts = [torch.randn(3, 4), torch.randn(3, 4)]
    ranks = [collective_rank(kind, part) for part in parts]
    outputs = run_ranks([interpreter for _, interpreter in ranks], [bench.feed for bench, _ in ranks])
    expected = torch.cat(parts) if kind == "all_gather" else (parts[0].double() + parts[1].double()).float()
    assert all(torch.equal(output["output0"], expected) for output in outputs)


def test_ranks_that_meet_at_different_collectives_are_refused() -> None:
    ranks = [collective_rank("all_reduce_sum", torch.randn(3, 4), name) for name in ("one", "two")]
    with pytest.raises(InterpreterError, match="'one', all_reduce_sum 'two'"):
        run_ranks([interpreter for _, interpreter in ranks], [bench.feed for bench, _ in ranks])
