"""The lowering of each op, and what it refuses.

Oracle: the op's reference implementation, executed by `core.interpreter`, against the network definition executed by
the network interpreter.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from trtc.core.dtypes import DType
from trtc.core.errors import BuildError
from trtc.core.interpreter import interpret
from trtc.core.ops import Op, op_names, registry
from trtc.core.plugin_registry import plugins
from trtc.core.targets.tensorrt import TARGET
from trtc.core.targets.tensorrt import lower as lower_module
from trtc.core.targets.tensorrt.flavour import find_flavour
from trtc.core.targets.tensorrt.lower import LOWERINGS, LoweringOptions, lower_graph
from trtc.core.targets.tensorrt.network import Network
from trtc.tests.core.targets.tensorrt_cases import CASES, SEPARATELY, Case, Composer, add_case
from trtc.tests.core.targets.tensorrt_opt import BUILD, dummy_rank
from trtc.tests.trt_interpreter import NetworkInterpreter

trt = pytest.importorskip("tensorrt_rtx")
pytestmark = pytest.mark.tensorrt_rtx

OPTIONS = LoweringOptions(kv_capacity=16)
TOLERANCE = {DType.FLOAT32: 1e-5, DType.FLOAT16: 5e-3, DType.BFLOAT16: 4e-2}


def computed(c: Composer, output: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The tensor `output` as the network has it, and as the ops' references have it."""
    graph = c.graph(output)
    weights = {node.name: c.values[node.name] for node in graph.weights}
    network = lower_graph(graph, weights, find_flavour("tensorrt_rtx"), OPTIONS)
    interpreter = NetworkInterpreter(network.definition, trt)
    padded = {name: c.values[name].unsqueeze(0) for name in ("token_ids", "positions")}
    given = {**padded, "logits_index": c.values["logits_index"]}
    feed = {tensor.name: given[tensor.name] for tensor in interpreter.inputs}
    return interpreter.run(feed)[output], interpret(graph, c.values)


@pytest.mark.parametrize("dtype", [DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_op(case: Case, dtype: DType) -> None:
    torch.manual_seed(0)
    c = Composer(dtype)
    for tensor in add_case(c, case).tensors:
        actual, expected = computed(c, tensor)
        assert actual.dtype == expected.dtype
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(actual.float(), expected.float(), rtol=tolerance, atol=tolerance)


def test_every_op_with_a_lowering_is_tested() -> None:
    assert {op for op, _, _ in CASES.values()} | SEPARATELY == set(LOWERINGS)


def test_every_core_op_has_a_lowering() -> None:
    """A quantized_linear and an all_reduce_norm are made by fusions that this target does not ask for."""
    assert op_names() - {"input", "weight", "quantized_linear", "all_reduce_norm"} == set(LOWERINGS)


def test_op_without_lowering_is_named_before_anything_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    op = Op("unknown", lambda sig: (sig[0],), lambda ctx, attrs, x: x)
    monkeypatch.setitem(registry._OPS, "unknown", op)
    c = Composer(DType.FLOAT32)
    output = c.add("mystery", "unknown", c.activation(4))

    def no_network(_: object) -> Network:
        raise AssertionError("a network was made")

    monkeypatch.setattr(lower_module, "Network", no_network)
    expected = r"node 'mystery': op unknown has no lowering for tensorrt_rtx \d.*; supported: activation, add"
    with pytest.raises(BuildError, match=expected):
        lower_graph(c.graph(output), c.values, find_flavour("tensorrt_rtx"), OPTIONS)


def test_op_of_a_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a plugin's hook brings makes the layers, under the graph's names, and a build accepts the op."""
    op = Op("doubled", lambda sig: (sig[0],), lambda ctx, attrs, x: x * 2)
    monkeypatch.setitem(registry._OPS, "doubled", op)
    c = Composer(DType.FLOAT32)
    output = c.add("twice", "doubled", c.activation(4))
    graph = c.graph(output)

    def lowering(network: Any, node: Any, inputs: Any) -> Any:
        return [network.add_elementwise(*inputs, *inputs, trt.ElementWiseOperation.SUM).get_output(0)]

    options = replace(OPTIONS, plugins={"doubled": lowering})
    weights = {node.name: c.values[node.name] for node in graph.weights}
    network = lower_graph(graph, weights, find_flavour("tensorrt_rtx"), options)
    interpreter = NetworkInterpreter(network.definition, trt)
    found = interpreter.run({"token_ids": c.values["token_ids"].unsqueeze(0)})["twice"]
    assert torch.equal(found, interpret(graph, c.values))
    assert list(network.plugins) == ["doubled"]
    brought = {"doubled": lowering}
    monkeypatch.setattr(type(plugins()), "tensorrt_plugins", lambda self, flavour, build: brought)
    assert "doubled" in TARGET.capabilities(BUILD).ops


@pytest.mark.parametrize(
    ("lowering", "message"),
    [
        (lambda network, node, inputs: 1 / 0, "raised ZeroDivisionError: division by zero"),
        (lambda network, node, inputs: inputs[0], "returned <.*>, not a tuple of 1 tensors"),
        (lambda network, node, inputs: (inputs[0], inputs[0]), "returned .*, not a tuple of 1 tensors"),
        (lambda network, node, inputs: (node,), "returned Node.* for %twice, not an ITensor"),
    ],
)
def test_a_lowering_of_a_plugin_that_fails_is_named(
    lowering: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        registry._OPS, "doubled", Op("doubled", lambda sig: (sig[0],), lambda ctx, attrs, x: x * 2)
    )
    c = Composer(DType.FLOAT32)
    graph = c.graph(c.add("twice", "doubled", c.activation(4)))
    options = replace(OPTIONS, plugins={"doubled": lowering})
    weights = {node.name: c.values[node.name] for node in graph.weights}
    named = rf"doubled 'twice': its lowering \(hook trtc_tensorrt_plugins\) {message}"
    with pytest.raises(BuildError, match=named):
        lower_graph(graph, weights, find_flavour("tensorrt_rtx"), options)


def test_a_lowering_to_another_type_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    op = Op("narrow", lambda sig: (sig[0].with_shape(("T", 2)),), lambda ctx, attrs, x: x[:, :2])
    monkeypatch.setitem(registry._OPS, "narrow", op)
    c = Composer(DType.FLOAT32)
    graph = c.graph(c.add("cut", "narrow", c.activation(4)))
    options = replace(OPTIONS, plugins={"narrow": lambda network, node, inputs: (inputs[0],)})
    weights = {node.name: c.values[node.name] for node in graph.weights}
    with pytest.raises(
        BuildError, match=r"narrow 'cut': lowered to DataType.FLOAT\[-1, 4\], not float32\[T, 2\]"
    ):
        lower_graph(graph, weights, find_flavour("tensorrt_rtx"), options)


def test_tensorrt_without_native_attention_is_refused() -> None:
    rank, old = (
        dummy_rank(4, 16, DType.FLOAT32),
        replace(find_flavour("tensorrt_rtx"), native_attention=False),
    )
    with pytest.raises(
        BuildError, match="has no attention layer that takes key and value lengths as a tensor"
    ):
        lower_graph(rank.graph, rank.weights, old, OPTIONS)


def test_graph_input_that_the_padded_network_lacks_is_named() -> None:
    c = Composer(DType.FLOAT32)
    output = c.add("lengths", "embedding", "kv_length", c.weight(9, 4), offset=0)
    with pytest.raises(BuildError, match="node 'lengths': op embedding reads graph input kv_length"):
        lower_graph(c.graph(output), c.values, find_flavour("tensorrt_rtx"), OPTIONS)


def test_layers_and_tensors_have_the_names_of_the_graph() -> None:
    rank = dummy_rank(4, 16, DType.FLOAT32)
    definition = lower_graph(rank.graph, rank.weights, find_flavour("tensorrt_rtx"), OPTIONS).definition
    layers = [definition.get_layer(i) for i in range(definition.num_layers)]
    tensors = {layer.get_output(0).name for layer in layers}
    unused = {"query_start", "kv_length", "page_table"}
    boundary = {"token_ids": "token_ids/packed", "positions": "positions/packed"}
    inputs = {definition.get_input(i).name for i in range(definition.num_inputs)}
    names = {boundary.get(name, name) for name in rank.graph.specs} - unused - inputs
    assert names <= tensors
    assert {layer.name for layer in layers} >= names
    assert not [layer.name for layer in layers if layer.name.startswith("(Unnamed")]


def test_invalid_layer_carries_the_reason_of_tensorrt() -> None:
    network = Network(find_flavour("tensorrt_rtx"))
    x, y = (network.input(name, DType.FLOAT32, (-1, size)) for name, size in (("x", 3), ("y", 4)))
    with pytest.raises(BuildError, match=r"tensorrt_rtx .*: layer 'sum' is not valid: .*broadcast"):
        network.binary("SUM", x, y, "sum")
