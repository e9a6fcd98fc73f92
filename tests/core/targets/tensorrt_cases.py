"""Small graphs, one for each use of an op that the TensorRT lowering has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from trtc.core.dtypes import DType, to_torch
from trtc.core.graph import GRAPH_INPUTS, Graph, Node, make_node
from trtc.core.spec import TensorSpec

T = 5


class Composer:
    """A graph of few nodes. Activations are rows of a table, so that T is known at run time only."""

    def __init__(self, dtype: DType) -> None:
        self.dtype = dtype
        self.nodes: list[Node] = []
        self.specs: dict[str, TensorSpec] = {}
        self.values: dict[str, torch.Tensor] = {
            "token_ids": torch.arange(T, dtype=torch.int32),
            "positions": torch.arange(T, dtype=torch.int32) + 3,
            "logits_index": torch.tensor([4, 0], dtype=torch.int32),
        }
        for name in GRAPH_INPUTS:
            self.add(name, "input", dtype=GRAPH_INPUTS[name].dtype.value, shape=GRAPH_INPUTS[name].shape)

    def add(self, name: str, op: str, *inputs: str | None, **attrs: Any) -> str:
        node = make_node(name, op, inputs, attrs, self.specs)
        self.nodes.append(node)
        self.specs.update(zip(node.tensors, node.outputs, strict=True))
        return node.tensors[0]

    def weight(self, *shape: int) -> str:
        name = f"w{len(self.nodes)}"
        self.values[name] = torch.randn(shape).to(to_torch(self.dtype))
        return self.add(name, "weight", dtype=self.dtype.value, shape=shape)

    def activation(self, *shape: int) -> str:
        """[T, *shape]"""
        size = int(torch.Size(shape).numel())
        rows = self.add(f"rows{len(self.nodes)}", "embedding", "token_ids", self.weight(T, size), offset=0)
        if len(shape) == 1:
            return rows
        return self.add(f"{rows}.shaped", "reshape", rows, shape=("T", *shape))

    def graph(self, output: str) -> Graph:
        return Graph(tuple(self.nodes), (output,)).verify("test")


Case = tuple[str, Sequence[Sequence[int] | str], Mapping[str, Any]]
"""Op, its inputs (shape without T of an activation, (0, ...) for a weight of shape ..., or a graph input) and attrs."""
CASES: Mapping[str, Case] = {
    "embedding": ("embedding", ["token_ids", (0, T, 6)], {"offset": 0}),
    "embedding, offset": ("embedding", ["token_ids", (0, T + 2, 6)], {"offset": 2}),
    "embedding, masked": ("embedding", ["positions", (0, 3, 6)], {"offset": -4, "masked": True}),
    "linear": ("linear", [(6,), (0, 4, 6)], {}),
    "linear, bias": ("linear", [(6,), (0, 4, 6), (0, 4)], {}),
    "linear, activation": ("linear", [(6,), (0, 4, 6)], {"activation": "relu"}),
    "linear, bias, activation": ("linear", [(6,), (0, 4, 6), (0, 4)], {"activation": "gelu"}),
    "linear of rank 3": ("linear", [(2, 6), (0, 4, 6), (0, 4)], {}),
    "relu": ("activation", [(6,)], {"kind": "relu"}),
    "gelu": ("activation", [(6,)], {"kind": "gelu"}),
    "gelu_tanh": ("activation", [(6,)], {"kind": "gelu_tanh"}),
    "silu": ("activation", [(6,)], {"kind": "silu"}),
    "add": ("add", [(6,), (6,)], {}),
    "add a vector": ("add", [(6,), (0, 6)], {}),
    "mul": ("mul", [(2, 6), (0, 6)], {}),
    "layer_norm": ("layer_norm", [(6,), (0, 6), (0, 6)], {"eps": 1e-5}),
    "layer_norm, bare": ("layer_norm", [(6,)], {"eps": 1e-3}),
    "layer_norm of rank 3": ("layer_norm", [(2, 6), (0, 6)], {"eps": 1e-5}),
    "rms_norm": ("rms_norm", [(6,), (0, 6)], {"eps": 1e-5}),
    "rms_norm, bare": ("rms_norm", [(6,)], {"eps": 1e-2}),
    "add_layer_norm": ("add_layer_norm", [(6,), (6,), (0, 6), (0, 6)], {"eps": 1e-5}),
    "add_rms_norm": ("add_rms_norm", [(6,), (6,), (0, 6)], {"eps": 1e-5}),
    "rotary": ("rotary", [(2, 8), "positions"], {"theta": 10000.0}),
    "reshape": ("reshape", [(6,)], {"shape": ("T", 3, 2)}),
    "concat": ("concat", [(6,), (2,)], {"axis": 1}),
    "split": ("split", [(6,)], {"axis": 1, "sizes": (1, 2, 3)}),
    "slice": ("slice", [(6,)], {"axis": -1, "start": 2, "stop": 5}),
    "transpose": ("transpose", [(0, 4, 6)], {}),
    "cast": ("cast", [(6,)], {"dtype": "float32"}),
    "select_rows": ("select_rows", [(6,), "logits_index"], {}),
}
SEPARATELY = {"attention", "all_reduce", "all_gather", "dequantize"}
"""Tested with their state and their ranks, in test_tensorrt_numerics.py; with its formats, in test_tensorrt_quantized.py."""


def add_case(c: Composer, case: Case) -> Node:
    op, inputs, attrs = case
    names = []
    for item in inputs:
        if isinstance(item, str):
            names.append(item)
        else:
            names.append(c.weight(*item[1:]) if item[0] == 0 else c.activation(*item))
    c.add("result", op, *names, **attrs)
    return c.nodes[-1]
