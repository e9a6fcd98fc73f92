"""A graph as an ONNX model, for viewers: ops keep their names in a domain of their own, and weights have no values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..dtypes import DType
from ..errors import TargetError
from ..graph import Graph, Node
from ..spec import TensorSpec

DOMAIN = "trtc"
_TYPES = {
    DType.FLOAT32: "FLOAT", DType.FLOAT16: "FLOAT16", DType.BFLOAT16: "BFLOAT16", DType.FLOAT8_E4M3: "FLOAT8E4M3FN",
    DType.INT64: "INT64", DType.INT32: "INT32", DType.INT8: "INT8", DType.UINT8: "UINT8", DType.BOOL: "BOOL",
}  # fmt: skip


def onnx_bytes(graph: Graph, title: str, facts: Mapping[str, str]) -> bytes:
    """The serialized model. No runtime can execute it. Raises TargetError when the package onnx is not installed."""
    try:
        import onnx
    except ImportError as error:
        raise TargetError(
            f"onnx is not installed ({error}); install it with: pip install 'trtc[onnx]'"
        ) from None
    helper = onnx.helper
    inputs = [_value(onnx, node.name, node.outputs[0]) for node in graph.nodes
              if node.op in ("input", "weight") and graph.users.get(node.name)]  # fmt: skip
    nodes = [_node(helper, node) for node in graph.nodes if node.op not in ("input", "weight")]
    outputs = [_value(onnx, name, graph.specs[name]) for name in graph.outputs]
    between = [_value(onnx, tensor, spec) for node in graph.nodes if node.op not in ("input", "weight")
               for tensor, spec in zip(node.tensors, node.outputs, strict=True) if tensor not in graph.outputs]  # fmt: skip
    model = helper.make_model(
        helper.make_graph(nodes, title, inputs, outputs, value_info=between),
        producer_name="trtc",
        opset_imports=[helper.make_opsetid(DOMAIN, 1)],
    )
    helper.set_model_props(model, dict(facts))
    return bytes(model.SerializeToString())


def _value(onnx: Any, name: str, spec: TensorSpec) -> Any:
    kind = getattr(onnx.TensorProto, _TYPES[spec.dtype])
    return onnx.helper.make_tensor_value_info(name, kind, list(spec.shape))


def _node(helper: Any, node: Node) -> Any:
    attributes = {key: _plain(value) for key, value in node.attrs.items()}
    inputs = ["" if name is None else name for name in node.inputs]
    return helper.make_node(node.op, inputs, list(node.tensors), name=node.name, domain=DOMAIN, **attributes)


def _plain(value: Any) -> Any:
    """What ONNX has a type of attribute for; the rest, as shapes with symbols, as text."""
    if isinstance(value, bool):
        return int(value)
    numbers = isinstance(value, tuple) and value and all(isinstance(item, int) for item in value)
    return list(value) if numbers else value if isinstance(value, int | float | str) else str(value)
