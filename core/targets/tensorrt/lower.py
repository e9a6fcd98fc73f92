"""Graph -> TensorRT network: one function per op, found in a table.

A layer that makes a graph's tensor has the tensor's name; helper layers are called `<node>/<what>`. Every tensor made
for a node is compared with the node's type, so that a wrong lowering stops here and not in a plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...dtypes import DType, from_torch
from ...errors import BuildError, TrtcError
from ...graph import Graph, Node
from ...spec import TensorSpec
from .attention import FUSED_OR_NOT, Attend, NativeAttention, PaddedBatch
from .collectives import ALL_GATHER, ALL_REDUCE, collective
from .flavour import Flavour
from .network import ITensor, Network
from .packed import PackedBatch
from .quantized import lower_dequantize

Result = Sequence[ITensor]
PluginLowering = Callable[[Any, Node, Sequence[Any]], Result]


@dataclass(frozen=True, kw_only=True)
class LoweringOptions:
    """What the network depends on besides graph and weights.

    kv_capacity: tokens of one sequence that the KV cache of native attention holds.
    attend: how native attention is computed.
    plugins: lowerings that plugins bring, by op: `(network, node, inputs) -> outputs`, see `trtc_tensorrt_plugins`. One
        for `attention` works on pages, and makes the network one over packed tokens.
    """

    kv_capacity: int
    attend: Attend = FUSED_OR_NOT
    plugins: Mapping[str, PluginLowering] = field(default_factory=dict)


def lower_graph(
    graph: Graph, weights: Mapping[str, torch.Tensor], flavour: Flavour, options: LoweringOptions
) -> Network:
    """The network of `graph`, whose inputs and outputs `attention.py` describes.

    weights: by node name, each of its node's dtype and shape. The network points to their memory and keeps them.
    Raises BuildError, before anything is built, naming node, op and flavour when something has no lowering.
    """
    require_supported(graph, flavour, options)
    lowering = Lowering(graph, weights, Network(flavour), options)
    for node in graph.nodes:
        if node.op not in _LAZY:
            lowering.lower_node(node)
    (logits,) = graph.outputs
    lowering.network.mark_output(lowering.tensors[logits])
    return lowering.network


def require_supported(graph: Graph, flavour: Flavour, options: LoweringOptions) -> None:
    """Raises BuildError, naming node, op and flavour, for the first node that has no lowering."""
    known = LOWERINGS.keys() | options.plugins.keys()
    for node in graph.nodes:
        if node.op not in known and node.op not in _LAZY:
            supported = ", ".join(sorted(known))
            raise BuildError(
                f"node '{node.name}': op {node.op} has no lowering for {flavour}; supported: {supported}"
            )
    if graph.num_cache_layers and "attention" not in options.plugins and not flavour.native_attention:
        raise BuildError(
            f"{flavour} has no attention layer that takes key and value lengths as a tensor; TensorRT 11 has"
        )


@dataclass
class Lowering:
    """State of one lowering: the network so far, and the network's tensor for every tensor of the graph."""

    graph: Graph
    weights: Mapping[str, torch.Tensor]
    network: Network
    options: LoweringOptions
    tensors: dict[str, ITensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._constants: dict[tuple[str, int, torch.dtype], ITensor] = {}
        self.batch: PaddedBatch | PackedBatch
        if "attention" in self.options.plugins:
            self.batch = PackedBatch(self.network)
        else:
            self.batch = PaddedBatch(self.network)
            self.attention = NativeAttention(
                self.network, self.batch, self.options.kv_capacity, self.options.attend
            )

    def lower_node(self, node: Node) -> None:
        lower = self._plugin if node.op in self.options.plugins else LOWERINGS[node.op]
        for name, spec, tensor in zip(node.tensors, node.outputs, lower(self, node), strict=True):
            self._check(node, spec, tensor)
            self.tensors[name] = tensor

    def _plugin(self, _: Lowering, node: Node) -> Result:
        """What a plugin makes of the node; its tensors get the graph's names."""
        inputs = [self.value(node, i) if self.given(node, i) else None for i in range(len(node.inputs))]
        self.network.plugins[node.op] = None
        where = f"{node.op} '{node.name}': its lowering (hook trtc_tensorrt_plugins)"
        try:
            made = self.options.plugins[node.op](self.network.definition, node, inputs)
        except TrtcError:
            raise
        except Exception as error:
            raise BuildError(f"{where} raised {type(error).__name__}: {error}") from error
        if made is None:
            raise self.network.log.error(
                f"{self.network.flavour}: plugin layer '{node.name}' cannot be added"
            )
        if not isinstance(made, tuple | list) or len(made) != len(node.tensors):
            raise BuildError(f"{where} returned {made!r}, not a tuple of {len(node.tensors)} tensors")
        for name, tensor in zip(node.tensors, made, strict=True):
            if not isinstance(tensor, self.network.trt.ITensor):
                raise BuildError(f"{where} returned {tensor!r} for %{name}, not an ITensor")
            tensor.name = name
        return made

    def _check(self, node: Node, spec: TensorSpec, tensor: ITensor) -> None:
        """A wrong type here is a mistake of the op's lowering, which may be a plugin's."""
        shape, wanted = tuple(tensor.shape), tuple(d if isinstance(d, int) else -1 for d in spec.shape)
        fits = len(shape) == len(wanted) and all(w in (-1, s) for s, w in zip(shape, wanted, strict=True))
        right = fits and tensor.dtype == self.network.data_type(spec.dtype)
        if not right:
            raise BuildError(f"{node.op} '{node.name}': lowered to {tensor.dtype}{list(shape)}, not {spec}")

    def spec(self, node: Node, index: int) -> TensorSpec:
        """Type of a node's input."""
        name = node.inputs[index]
        assert name is not None
        return self.graph.specs[name]

    def given(self, node: Node, index: int) -> bool:
        """Whether an optional input is there."""
        return index < len(node.inputs) and node.inputs[index] is not None

    def value(self, node: Node, index: int, rank: int | None = None) -> ITensor:
        """A node's input; with `rank`, brought to that rank by leading sizes of 1.

        Raises BuildError for a graph input that this network does not have.
        """
        name = node.inputs[index]
        assert name is not None
        producer = self.graph.producers[name]
        if producer.op == "weight":
            return self.constant(name, self.weights[name], rank)
        if producer.op == "input":
            return self._graph_input(node, name)
        tensor, spec = self.tensors[name], self.graph.specs[name]
        if rank is None or rank == spec.rank:
            return tensor
        shape = [1] * (rank - spec.rank) + [d if isinstance(d, int) else -1 for d in spec.shape]
        return self.network.reshape(tensor, shape, f"{node.name}/{name}.rank{rank}")

    def _graph_input(self, node: Node, name: str) -> ITensor:
        """Inputs come into being when something reads them: TensorRT wants no input that nothing uses."""
        if name not in self.tensors:
            if name not in self.batch.inputs:
                raise BuildError(
                    f"node '{node.name}': op {node.op} reads graph input {name}, which a network with native "
                    f"attention does not have; it has {', '.join(self.batch.inputs)}"
                )
            self.tensors[name] = self.batch.inputs[name]()
        return self.tensors[name]

    def constant(self, name: str, value: torch.Tensor, rank: int | None = None) -> ITensor:
        """A weight as a constant, made once for each rank and dtype it is wanted in; the first has its name."""
        shape = (*[1] * ((rank or 0) - value.dim()), *value.shape)
        key = (name, len(shape), value.dtype)
        if key not in self._constants:
            known = any(other == name for other, _, _ in self._constants)
            unique = f"{name}/rank{len(shape)}.{from_torch(value.dtype)}" if known else name
            self._constants[key] = self.network.constant(unique, value, shape)
        return self._constants[key]


Lower = Callable[[Lowering, Node], Result]

_LAZY = frozenset({"input", "weight"})


def _embedding(low: Lowering, node: Node) -> Result:
    net, name, rows = low.network, node.name, low.value(node, 0)
    if node.attrs["offset"]:
        rows = net.binary("SUM", rows, net.vector(DType.INT32, (node.attrs["offset"],)), f"{name}/rows")
    table = low.value(node, 1)
    if not node.attrs.get("masked", False):
        return (net.gather(table, rows, name),)
    above = net.binary("GREATER", rows, net.vector(DType.INT32, (-1,)), f"{name}/above")
    below = net.binary("LESS", rows, net.vector(DType.INT32, (table.shape[0],)), f"{name}/below")
    inside = net.binary("AND", above, below, f"{name}/inside")
    zero_row = net.vector(DType.INT32, (0,))
    rows = net.output(net.definition.add_select(inside, rows, zero_row), f"{name}/rows.inside")
    found = net.gather(table, rows, f"{name}/found")
    zero = net.vector(low.spec(node, 1).dtype, (0.0,), rank=2)
    column = net.reshape(inside, (-1, 1), f"{name}/inside.column")
    return (net.output(net.definition.add_select(column, found, zero), name),)


def _linear(low: Lowering, node: Node) -> Result:
    net, name, rank = low.network, node.name, low.spec(node, 0).rank
    has_bias, kind = low.given(node, 2), node.attrs.get("activation")
    product = f"{name}/product" if has_bias or kind else name
    y = net.matmul(low.value(node, 0), low.value(node, 1, rank), product, transpose_b=True)
    if has_bias:
        y = net.binary("SUM", y, low.value(node, 2, rank), f"{name}/sum" if kind else name)
    return (_activate(low, y, kind, name) if kind else y,)


def _activate(low: Lowering, x: ITensor, kind: str, name: str) -> ITensor:
    if kind == "silu":
        gate = low.network.activation("SIGMOID", x, f"{name}/sigmoid")
        return low.network.binary("PROD", x, gate, name)
    return low.network.activation(
        {"relu": "RELU", "gelu": "GELU_ERF", "gelu_tanh": "GELU_TANH"}[kind], x, name
    )


def _activation(low: Lowering, node: Node) -> Result:
    return (_activate(low, low.value(node, 0), node.attrs["kind"], node.name),)


def _binary(operation: str) -> Lower:
    def lower_binary(low: Lowering, node: Node) -> Result:
        return (
            low.network.binary(
                operation, low.value(node, 0), low.value(node, 1, low.spec(node, 0).rank), node.name
            ),
        )

    return lower_binary


def _affine(low: Lowering, node: Node, index: int, fill: float, rank: int, dtype: DType) -> ITensor:
    """Weight or bias of a norm as `dtype`; a constant vector where the norm has none."""
    if not low.given(node, index):
        size = node.outputs[-1].shape[-1]
        assert isinstance(size, int)
        return low.network.vector(dtype, (fill,) * size, rank)
    name = node.inputs[index]
    assert name is not None
    if low.graph.producers[name].op == "weight" and dtype == DType.FLOAT32:
        return low.constant(name, low.weights[name].float(), rank)
    value = low.value(node, index, rank)
    return (
        value
        if low.spec(node, index).dtype == dtype
        else low.network.cast(value, dtype, f"{node.name}/{name}.cast")
    )


def _layer_norm(low: Lowering, node: Node, x: ITensor, first: int, name: str) -> ITensor:
    """In float32 by casts that one can see: a strongly typed norm computes in the type of its input."""
    net, spec = low.network, node.outputs[-1]
    narrow = spec.dtype != DType.FLOAT32
    if narrow:
        x = net.cast(x, DType.FLOAT32, f"{name}/float32")
    scale = _affine(low, node, first, 1.0, spec.rank, DType.FLOAT32)
    bias = _affine(low, node, first + 1, 0.0, spec.rank, DType.FLOAT32)
    layer = net.definition.add_normalization_v2(x, scale, bias, 1 << (spec.rank - 1))
    layer.epsilon = node.attrs["eps"]
    y = net.output(layer, f"{name}/normed" if narrow else name)
    return net.cast(y, spec.dtype, name) if narrow else y


def _rms_norm(low: Lowering, node: Node, x: ITensor, first: int, name: str) -> ITensor:
    """x / sqrt(mean(x^2) + eps) in float32, rounded, then the affine part in the dtype of x."""
    net, spec = low.network, node.outputs[-1]
    wide = x if spec.dtype == DType.FLOAT32 else net.cast(x, DType.FLOAT32, f"{name}/float32")
    square = net.binary("PROD", wide, wide, f"{name}/square")
    mean = net.definition.add_reduce(square, net.trt.ReduceOperation.AVG, 1 << (spec.rank - 1), True)
    shifted = net.binary(
        "SUM",
        net.output(mean, f"{name}/mean"),
        net.vector(DType.FLOAT32, (node.attrs["eps"],), spec.rank),
        f"{name}/eps",
    )
    y = net.binary("DIV", wide, net.unary("SQRT", shifted, f"{name}/rms"), f"{name}/normed")
    y = net.cast(y, spec.dtype, f"{name}/rounded")
    weight = _affine(low, node, first, 1.0, spec.rank, spec.dtype)
    bias = _affine(low, node, first + 1, 0.0, spec.rank, spec.dtype)
    return net.binary("SUM", net.binary("PROD", y, weight, f"{name}/scaled"), bias, name)


Norm = Callable[[Lowering, Node, ITensor, int, str], ITensor]


def _norm(norm: Norm) -> Lower:
    return lambda low, node: (norm(low, node, low.value(node, 0), 1, node.name),)


def _add_norm(norm: Norm) -> Lower:
    def lower_add_norm(low: Lowering, node: Node) -> Result:
        total_name, normed_name = node.tensors
        total = low.network.binary("SUM", low.value(node, 0), low.value(node, 1), total_name)
        return total, norm(low, node, total, 2, normed_name)

    return lower_add_norm


def _rotary(low: Lowering, node: Node) -> Result:
    """(x1 cos - x2 sin, x2 cos + x1 sin) of the halves of the last axis, in float32."""
    net, name, spec = low.network, node.name, node.outputs[0]
    size = spec.shape[-1]
    assert isinstance(size, int)
    half = size // 2
    frequency = node.attrs["theta"] ** (-torch.arange(half, dtype=torch.float32) / half)
    positions = net.cast(low.value(node, 1), DType.FLOAT32, f"{name}/positions.float32")
    column = net.reshape(positions, (-1, 1, 1), f"{name}/positions.column")
    angle = net.binary("PROD", column, net.vector(DType.FLOAT32, frequency.tolist(), rank=3), f"{name}/angle")
    cos, sin = net.unary("COS", angle, f"{name}/cos"), net.unary("SIN", angle, f"{name}/sin")
    wide = low.value(node, 0)
    wide = wide if spec.dtype == DType.FLOAT32 else net.cast(wide, DType.FLOAT32, f"{name}/float32")
    one, two = (net.slice(wide, 2, i * half, half, f"{name}/half{i}") for i in range(2))
    terms = [
        net.binary(op, net.binary("PROD", a, cos, f"{name}/cos{i}"), net.binary("PROD", b, sin, f"{name}/sin{i}"),
                   f"{name}/rotated{i}")
        for i, (op, a, b) in enumerate((("SUB", one, two), ("SUM", two, one)))
    ]  # fmt: skip
    return (net.cast(net.concat(terms, 2, f"{name}/rotated"), spec.dtype, name),)


def _attention(low: Lowering, node: Node) -> Result:
    q, k, v = (low.value(node, i) for i in range(3))
    return (low.attention.lower(node, q, k, v, node.outputs[0].dtype),)


def _reshape(low: Lowering, node: Node) -> Result:
    shape = [d if isinstance(d, int) else -1 for d in node.attrs["shape"]]
    return (low.network.reshape(low.value(node, 0), shape, node.name),)


def _axis(low: Lowering, node: Node) -> int:
    return int(node.attrs["axis"]) % low.spec(node, 0).rank


def _concat(low: Lowering, node: Node) -> Result:
    parts = [low.value(node, i) for i in range(len(node.inputs))]
    return (low.network.concat(parts, _axis(low, node), node.name),)


def _split(low: Lowering, node: Node) -> Result:
    x, axis, start, parts = low.value(node, 0), _axis(low, node), 0, []
    for name, size in zip(node.tensors, node.attrs["sizes"], strict=True):
        parts.append(low.network.slice(x, axis, start, size, name))
        start += size
    return parts


def _slice(low: Lowering, node: Node) -> Result:
    start, stop = node.attrs["start"], node.attrs["stop"]
    return (low.network.slice(low.value(node, 0), _axis(low, node), start, stop - start, node.name),)


def _transpose(low: Lowering, node: Node) -> Result:
    return (low.network.transpose(low.value(node, 0), (1, 0), node.name),)


def _cast(low: Lowering, node: Node) -> Result:
    return (low.network.cast(low.value(node, 0), node.outputs[0].dtype, node.name),)


def _select_rows(low: Lowering, node: Node) -> Result:
    return (low.network.gather(low.value(node, 0), low.value(node, 1), node.name),)


def _all_reduce(low: Lowering, node: Node) -> Result:
    return (collective(low.network, low.value(node, 0), ALL_REDUCE, node.attrs["tp_size"], node.name),)


def _all_gather(low: Lowering, node: Node) -> Result:
    """TensorRT gathers along axis 0; the ranks' blocks are then moved to the axis that the graph wants."""
    net, name, tp_size, axis = low.network, node.name, node.attrs["tp_size"], _axis(low, node)
    gathered = collective(net, low.value(node, 0), ALL_GATHER, tp_size, f"{name}/gathered")
    part = [d if isinstance(d, int) else -1 for d in low.spec(node, 0).shape]
    blocks = net.reshape(gathered, [tp_size, *part], f"{name}/blocks")
    order = [*range(1, axis + 1), 0, *range(axis + 1, len(part) + 1)]
    whole = [*part[:axis], tp_size * part[axis], *part[axis + 1 :]]
    return (net.reshape(net.transpose(blocks, order, f"{name}/ordered"), whole, name),)


LOWERINGS: Mapping[str, Lower] = {
    "activation": _activation,
    "add": _binary("SUM"),
    "add_layer_norm": _add_norm(_layer_norm),
    "add_rms_norm": _add_norm(_rms_norm),
    "all_gather": _all_gather,
    "all_reduce": _all_reduce,
    "attention": _attention,
    "cast": _cast,
    "concat": _concat,
    "dequantize": lower_dequantize,
    "embedding": _embedding,
    "layer_norm": _norm(_layer_norm),
    "linear": _linear,
    "mul": _binary("PROD"),
    "reshape": _reshape,
    "rms_norm": _norm(_rms_norm),
    "rotary": _rotary,
    "select_rows": _select_rows,
    "slice": _slice,
    "split": _split,
    "transpose": _transpose,
}
"""How each op becomes layers. A function adds the node's layers and returns the node's tensors."""
