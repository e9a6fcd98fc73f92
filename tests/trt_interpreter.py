"""Executes a TensorRT network definition in torch, layer by layer, from the TensorRT objects themselves.

A test tool: it shows that a lowered network computes what it should on machines where TensorRT can build but not run.
It knows nothing of our Graph, so a wrong lowering cannot hide behind a shared mistake. Every layer is computed in a
wide type (float64 unless told otherwise) and rounded to the dtype that TensorRT declares for its output; the shape is
compared with the one that TensorRT inferred. A layer type or an option that is not emulated is an `InterpreterError`.

KV caches are functional here: a KVCacheUpdate layer's output is a new tensor, which the caller feeds to the next step.
Collectives need all ranks: `run_ranks` steps several networks together.

Semantics: https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/operators/
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F

Tensor = torch.Tensor


class InterpreterError(Exception):
    """The network has something that the interpreter does not emulate, or does something that TensorRT forbids."""


@dataclass(frozen=True)
class Collective:
    """What a rank offers to the others when it reaches a collective layer, and waits for the answer to."""

    layer: str
    kind: str
    tensor: Tensor


Inputs = list[Any]
"""Tensors of a layer's inputs; None where an optional one is absent."""
Handler = Callable[["NetworkInterpreter", Any, Inputs], Tensor]

_DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "FP8": torch.float8_e4m3fn,
    "INT64": torch.int64,
    "INT32": torch.int32,
    "INT8": torch.int8,
    "INT4": torch.int8,
    "UINT8": torch.uint8,
    "BOOL": torch.bool,
}


class NetworkInterpreter:
    """One network definition, ready to be executed any number of times.

    network: an `INetworkDefinition`; `trt`: the module it is of (tensorrt or tensorrt_rtx).
    wide: the type that floating-point layers compute in before their result is rounded.
    Raises InterpreterError, naming layer and type, for a layer type that is not emulated.
    """

    def __init__(self, network: Any, trt: ModuleType, wide: torch.dtype = torch.float64) -> None:
        self.trt, self.wide = trt, wide
        layers = [self._typed(network.get_layer(i)) for i in range(network.num_layers)]
        self.inputs = [network.get_input(i) for i in range(network.num_inputs)]
        if hasattr(network, "plugin_layers"):  # a network of tensorrt_plugin_host.py
            self.inputs = network.network_inputs
            layers += [("PLUGIN", layer) for layer in network.plugin_layers]
        self.outputs = [network.get_output(i).name for i in range(network.num_outputs)]
        self.layers = _in_execution_order(layers)
        self._constants: dict[str, Tensor] = {}

    def _typed(self, layer: Any) -> tuple[str, Any]:
        """The layer as an object of its own class: `get_layer` returns plain ILayers."""
        kind = layer.type.name
        if kind not in _LAYERS:
            raise InterpreterError(
                f"layer '{layer.name}': type {kind} is not emulated; known: {', '.join(_LAYERS)}"
            )
        layer.__class__ = getattr(self.trt, _LAYERS[kind][0])
        return kind, layer

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The network's outputs by name. Raises InterpreterError for inputs that do not fit and for collectives."""
        (result,) = run_ranks([self], [inputs])
        return result

    def steps(self, inputs: Mapping[str, Tensor]) -> Generator[Collective, Tensor, dict[str, Tensor]]:
        """Executes the network; yields at every collective and goes on with the tensor it is sent."""
        values = {tensor.name: self._checked_input(tensor, inputs) for tensor in self.inputs}
        unknown = sorted(set(inputs) - set(values))
        if unknown:
            raise InterpreterError(
                f"inputs {', '.join(unknown)} are not of this network; it has {', '.join(values)}"
            )
        for kind, layer in self.layers:
            tensors = [layer.get_input(i) for i in range(layer.num_inputs)]
            arguments = [None if t is None else values[t.name] for t in tensors]
            if kind == "DIST_COLLECTIVE":
                results = [(yield self._collective(layer, arguments))]
            elif kind == "PLUGIN":
                results = layer.run(*arguments)
            else:
                results = [_LAYERS[kind][1](self, layer, arguments)]
            for i, result in enumerate(results):
                output = layer.get_output(i)
                values[output.name] = self._declared(layer, output, result)
        return {name: values[name] for name in self.outputs}

    def _checked_input(self, tensor: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        if tensor.name not in inputs:
            raise InterpreterError(f"input '{tensor.name}' is missing")
        value, dtype = inputs[tensor.name], _DTYPES[tensor.dtype.name]
        if value.dtype != dtype or not _fits(value.shape, tensor.shape):
            raise InterpreterError(
                f"input '{tensor.name}' is {value.dtype}{list(value.shape)}, not {dtype}{list(tensor.shape)}"
            )
        return value

    def _collective(self, layer: Any, arguments: Inputs) -> Collective:
        """The bindings do not tell which collective a layer is: the lowering writes it into the metadata."""
        (x,) = arguments
        if layer.metadata not in _COLLECTIVES:
            raise InterpreterError(
                f"layer '{layer.name}': metadata {layer.metadata!r} names no collective; "
                f"known: {', '.join(_COLLECTIVES)}"
            )
        return Collective(layer.name, layer.metadata, self.widen(x))

    def _declared(self, layer: Any, output: Any, value: Tensor) -> Tensor:
        """`value` rounded to the declared dtype, once it has the declared shape."""
        if not _fits(value.shape, output.shape):
            raise InterpreterError(
                f"layer '{layer.name}': computed shape {list(value.shape)}, TensorRT infers {list(output.shape)}"
            )
        return value.to(_DTYPES[output.dtype.name])

    @staticmethod
    def torch_dtype(tensor: Any) -> torch.dtype:
        """The torch dtype of an ITensor."""
        return _DTYPES[tensor.dtype.name]

    def widen(self, x: Tensor) -> Tensor:
        return x.to(self.wide) if x.is_floating_point() else x

    def constant(self, layer: Any) -> Tensor:
        """The value of a constant layer, read from TensorRT's memory once."""
        if layer.name not in self._constants:
            self._constants[layer.name] = _read_weights(layer.weights).reshape(list(layer.shape))
        return self._constants[layer.name]


def _in_execution_order(layers: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """The layers, each after the ones it reads from: a network may hold them in any order."""
    producer = {
        layer.get_output(j).name: i for i, (_, layer) in enumerate(layers) for j in range(layer.num_outputs)
    }
    sorter: TopologicalSorter[int] = TopologicalSorter()
    for i, (_, layer) in enumerate(layers):
        read = [layer.get_input(j) for j in range(layer.num_inputs)]
        sorter.add(i, *(producer[t.name] for t in read if t is not None and t.name in producer))
    return [layers[i] for i in sorter.static_order()]


def run_ranks(
    interpreters: Sequence[NetworkInterpreter], inputs: Sequence[Mapping[str, Tensor]]
) -> list[dict[str, Tensor]]:
    """Executes the networks of all ranks together, collectives included; the outputs of each rank.

    Raises InterpreterError when the ranks do not meet at the same collective in the same order.
    """
    ranks = [interpreter.steps(feed) for interpreter, feed in zip(interpreters, inputs, strict=True)]
    answers: list[Tensor | None] = [None] * len(ranks)
    while True:
        offers = [_advance(rank, answer) for rank, answer in zip(ranks, answers, strict=True)]
        finished = [offer for offer in offers if isinstance(offer, dict)]
        if len(finished) == len(ranks):
            return finished
        waiting = [offer for offer in offers if isinstance(offer, Collective)]
        if finished or len({(offer.layer, offer.kind) for offer in waiting}) != 1:
            where = sorted({f"{offer.kind} '{offer.layer}'" for offer in waiting})
            raise InterpreterError(
                f"ranks wait at different collectives: {', '.join(where)}; {len(finished)} ended"
            )
        answer = _COLLECTIVES[waiting[0].kind]([offer.tensor for offer in waiting])
        answers = [answer] * len(ranks)


def _advance(
    rank: Generator[Collective, Tensor, dict[str, Tensor]], answer: Tensor | None
) -> Collective | dict[str, Tensor]:
    try:
        return next(rank) if answer is None else rank.send(answer)
    except StopIteration as end:
        result: dict[str, Tensor] = end.value
        return result


_COLLECTIVES: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "all_reduce_sum": lambda parts: torch.stack(parts).sum(0),
    "all_gather": lambda parts: torch.cat(parts, 0),
}


def _fits(shape: Sequence[int], declared: Sequence[int]) -> bool:
    """Whether `shape` is an instance of the declared shape, whose unknown sizes are -1."""
    return len(shape) == len(declared) and all(d in (-1, s) for s, d in zip(shape, declared, strict=True))


class _WeightsStruct(ctypes.Structure):
    """`nvinfer1::Weights` of NvInferRuntimeBase.h."""

    _fields_ = (("type", ctypes.c_int32), ("values", ctypes.c_void_p), ("count", ctypes.c_int64))


def _read_weights(weights: Any) -> Tensor:
    """Values of an IConstantLayer's `weights`.

    Types that numpy knows come as arrays. For the others (bfloat16, float8, int4) the bindings give an object without a way
    to its memory: the struct it holds is read where pybind11 keeps it, and believed only if its count and type agree.
    """
    if not hasattr(weights, "nbytes") or hasattr(weights, "__array_interface__"):
        return torch.from_numpy(weights.copy())
    pybind_instance = ctypes.c_void_p.from_address(id(weights) + object.__basicsize__)
    struct = _WeightsStruct.from_address(pybind_instance.value or 0)
    if (struct.type, struct.count) != (int(weights.dtype), weights.size) or not struct.values:
        raise InterpreterError(f"cannot read constant weights of type {weights.dtype}")
    if weights.dtype.name == "INT4":
        return _unpacked(ctypes.string_at(struct.values, (weights.size + 1) // 2))[: weights.size]
    data = ctypes.string_at(struct.values, weights.nbytes)
    return torch.frombuffer(bytearray(data), dtype=_DTYPES[weights.dtype.name])


def _unpacked(data: bytes) -> Tensor:
    """Four-bit integers in two's complement, two a byte, the first in the low bits."""
    nibbles = [nibble for byte in data for nibble in (byte % 16, byte // 16)]
    return torch.tensor([n - 16 if n > 7 else n for n in nibbles], dtype=torch.int8)


def _only(layer: Any, **expected: Any) -> None:
    """Refuses options of a layer that are not emulated."""
    for name, value in expected.items():
        actual = getattr(layer, name)
        if actual != value:
            raise InterpreterError(f"layer '{layer.name}': {name} is {actual}; only {value} is emulated")


def _bits(mask: int) -> list[int]:
    return [axis for axis in range(mask.bit_length()) if mask >> axis & 1]


def _constant(ctx: NetworkInterpreter, layer: Any, _: Inputs) -> Tensor:
    return ctx.constant(layer)


def _identity(ctx: NetworkInterpreter, layer: Any, inputs: Inputs) -> Tensor:
    (x,) = inputs
    return x


def _shape(ctx: NetworkInterpreter, layer: Any, inputs: Inputs) -> Tensor:
    (x,) = inputs
    return torch.tensor(x.shape, dtype=torch.int64)


def _permute(x: Tensor, order: Any) -> Tensor:
    """TensorRT keeps eight entries; those beyond the rank mean nothing. The identity says nothing about the rank."""
    return x.permute(list(order)[: x.dim()])


def _shuffle(ctx: NetworkInterpreter, layer: Any, inputs: Inputs) -> Tensor:
    x = inputs[0]
    x = _permute(x, layer.first_transpose)
    dims = inputs[1].tolist() if len(inputs) > 1 and inputs[1] is not None else layer.reshape_dims
    if dims is not None:
        keep = layer.zero_is_placeholder
        x = x.reshape([x.shape[i] if d == 0 and keep else d for i, d in enumerate(dims)])
    return _permute(x, layer.second_transpose)


def _concatenation(ctx: NetworkInterpreter, layer: Any, inputs: Inputs) -> Tensor:
    return torch.cat([x for x in inputs if x is not None], layer.axis)


def _slice(ctx: NetworkInterpreter, layer: Any, inputs: Inputs) -> Tensor:
    _only(layer, mode=ctx.trt.SampleMode.STRICT_BOUNDS)
    x = inputs[0]
    fields = [list(layer.start), list(layer.shape), list(layer.stride)]
    for i, dynamic in enumerate(inputs[1:4]):
        if dynamic is not None:
            fields[i] = dynamic.tolist()
    axes = range(x.dim()) if layer.axes is None else layer.axes
    for axis, start, size, stride in zip(axes, *fields, strict=True):
        last = start + (size - 1) * stride
        if not (0 <= start < x.shape[axis] and 0 <= last < x.shape[axis]):
            raise InterpreterError(
                f"layer '{layer.name}': [{start}:{last}] is outside of axis {axis} of {x.shape}"
            )
        x = x.index_select(axis, torch.arange(size) * stride + start)
    return x


def _cast(ctx: NetworkInterpreter, layer: Any, inputs: Inputs) -> Tensor:
    (x,) = inputs
    return x.to(_DTYPES[layer.to_type.name])


_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "SUM": torch.add,
    "SUB": torch.sub,
    "PROD": torch.mul,
    "DIV": lambda a, b: torch.div(a, b, rounding_mode=None if a.is_floating_point() else "trunc"),
    "FLOOR_DIV": torch.floor_divide,
    "POW": torch.pow,
    "MAX": torch.maximum,
    "MIN": torch.minimum,
    "AND": torch.logical_and,
    "OR": torch.logical_or,
    "EQUAL": torch.eq,
    "GREATER": torch.gt,
    "LESS": torch.lt,
}


def _elementwise(ctx: NetworkInterpreter, layer: Any, inputs: Inputs) -> Tensor:
    a, b = inputs
    if a.dtype != b.dtype or a.dim() != b.dim():
        raise InterpreterError(f"layer '{layer.name}': {a.dtype}{list(a.shape)} and {b.dtype}{list(b.shape)}")
    return _named(_BINARY, layer, layer.op)(ctx.widen(a), ctx.widen(b))


_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "SQRT": torch.sqrt,
    "RECIP": torch.reciprocal,
    "EXP": torch.exp,
    "ERF": torch.erf,
    "SIN": torch.sin,
    "COS": torch.cos,
    "NEG": torch.neg,
    "NOT": torch.logical_not,
}

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "RELU": F.relu,
    "SIGMOID": torch.sigmoid,
    "TANH": torch.tanh,
    "GELU_ERF": F.gelu,
    "GELU_TANH": lambda x: F.gelu(x, approximate="tanh"),
}


def _named(table: Mapping[str, Any], layer: Any, kind: Any) -> Any:
    if kind.name not in table:
        raise InterpreterError(f"layer '{layer.name}': {kind} is not emulated; known: {', '.join(table)}")
    return table[kind.name]


def _unary(ctx: NetworkInterpreter, layer: Any, inputs: Inputs) -> Tensor:
    (x,) = inputs
    result: Tensor = _named(_UNARY, layer, layer.op)(ctx.widen(x))
    return result


def _activation(ctx: NetworkInterpreter, layer: Any, inputs: Inputs) -> Tensor:
    (x,) = inputs
    result: Tensor = _named(_ACTIVATIONS, layer, layer.type)(ctx.widen(x))
    return result


def _gather(ctx: NetworkInterpreter, layer: Any, inputs: Inputs) -> Tensor:
    _only(layer, mode=ctx.trt.GatherMode.DEFAULT, num_elementwise_dims=0)
    data, index = inputs
    size = data.shape[layer.axis]
    if index.numel() and (int(index.min()) < 0 or int(index.max()) >= size):
        raise InterpreterError(
            f"layer '{layer.name}': an index is outside of 0..{size - 1}: {index.tolist()}"
        )
    rows = data.index_select(layer.axis, index.flatten())
    return rows.reshape(*data.shape[: layer.axis], *index.shape, *data.shape[layer.axis + 1 :])


def _select(ctx: NetworkInterpreter, layer: Any, inputs: Inputs) -> Tensor:
    condition, then, otherwise = inputs
    return torch.where(condition, then, otherwise)


def _reduce(ctx: NetworkInterpreter, layer: Any, inputs: Inputs) -> Tensor:
    (x,) = inputs
    table = {"SUM": torch.sum, "AVG": torch.mean, "MAX": torch.amax, "MIN": torch.amin}
    result: Tensor = _named(table, layer, layer.op)(ctx.widen(x), _bits(layer.axes), layer.keep_dims)
    return result


def _softmax(ctx: NetworkInterpreter, layer: Any, inputs: Inputs) -> Tensor:
    (x,) = inputs
    (axis,) = _bits(layer.axes)
    return ctx.widen(x).softmax(axis)


def _matrix_multiply(ctx: NetworkInterpreter, layer: Any, inputs: Inputs) -> Tensor:
    operands = []
    for x, op in zip(inputs, (layer.op0, layer.op1), strict=True):
        if op == ctx.trt.MatrixOperation.VECTOR:
            raise InterpreterError(f"layer '{layer.name}': {op} is not emulated")
        x = ctx.widen(x)
        operands.append(x.mT if op == ctx.trt.MatrixOperation.TRANSPOSE else x)
    return operands[0] @ operands[1]


def _normalization(ctx: NetworkInterpreter, layer: Any, inputs: Inputs) -> Tensor:
    _only(layer, num_groups=1, is_v2=True)
    x, scale, bias = (ctx.widen(t) for t in inputs if t is not None)
    axes = _bits(layer.axes)
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    return (x - mean) / torch.sqrt(variance + layer.epsilon) * scale + bias


def _kv_cache_update(ctx: NetworkInterpreter, layer: Any, inputs: Inputs) -> Tensor:
    """output[b, :, write[b] + s, :] = update[b, :, s, :]. TensorRT leaves writes beyond the cache undefined."""
    _only(layer, cache_mode=ctx.trt.KVCacheMode.LINEAR, update_form=ctx.trt.AttentionIOForm.PADDED_BHND)
    cache, update, write = inputs[:3]
    result, new = cache.clone(), update.shape[2]
    for b, first in enumerate(write.tolist()):
        if first < 0 or first + new > cache.shape[2]:
            raise InterpreterError(
                f"layer '{layer.name}': sequence {b} writes [{first}:{first + new}] into {cache.shape[2]} tokens"
            )
        result[b, :, first : first + new] = update[b]
    return result


def _attention(ctx: NetworkInterpreter, layer: Any, inputs: Inputs) -> Tensor:
    """softmax(q k^T + mask) v over padded [B, heads, tokens, head_dim]; TensorRT applies no scale.

    With key_value_lengths, row i of S sees column j when j <= i + length[b] - S (LOWER_RIGHT). A row that sees
    nothing is NaN, and a NaN among the values of masked columns is one in the result: as in the code that TensorRT
    generates when it has no fused kernel.
    """
    trt, attention = ctx.trt, layer.attention
    padded = trt.AttentionIOForm.PADDED_BHND
    _only(attention, norm_op=trt.AttentionNormalizationOp.SOFTMAX, query_form=padded, key_value_form=padded)
    q, k, v, mask, scale, query_lengths, lengths = inputs + [None] * (7 - len(inputs))
    if scale is not None or query_lengths is not None:
        raise InterpreterError(f"layer '{layer.name}': quantized or packed attention is not emulated")
    group = q.shape[1] // k.shape[1]
    k, v = (ctx.widen(t).repeat_interleave(group, 1) for t in (k, v))
    scores = ctx.widen(q) @ k.mT
    if mask is not None:
        add = (
            torch.where(mask, 0.0, float("-inf")).to(ctx.wide)
            if mask.dtype == torch.bool
            else ctx.widen(mask)
        )
        scores = scores + add
    scores = scores.masked_fill(~_visible(ctx, attention.causal_kind, scores, lengths), float("-inf"))
    return scores.softmax(-1) @ v


def _visible(ctx: NetworkInterpreter, kind: Any, scores: Tensor, lengths: Tensor | None) -> Tensor:
    """[B, 1, S_q, S_kv]: which columns a row may see, by causal kind and lengths."""
    batch, _, rows, columns = scores.shape
    length = torch.full((batch,), columns) if lengths is None else lengths
    if int(length.max()) > columns:
        raise InterpreterError(
            f"key_value_lengths {length.tolist()} exceed the {columns} columns of the keys"
        )
    length = length.view(batch, 1, 1, 1)
    i, j = torch.arange(rows).view(rows, 1), torch.arange(columns)
    inside = (j < length).expand(batch, 1, rows, columns)
    kinds = ctx.trt.CausalMaskKind
    if kind == kinds.NONE:
        return inside
    return inside & (j <= (i if kind == kinds.UPPER_LEFT else i + length - rows))


def _dequantize(ctx: NetworkInterpreter, layer: Any, inputs: Inputs) -> Tensor:
    """integer * scale: a scale for each index of `axis`, or, where the scales have the rank of the integers, one for each
    block. TensorRT wants zero points of zero, so that a third input is not emulated."""
    x, scale, *zero = inputs
    if any(z is not None for z in zero):
        raise InterpreterError(f"layer '{layer.name}': a zero point is not emulated")
    if scale.dim() == 1:
        shape = [-1 if axis == layer.axis % x.dim() else 1 for axis in range(x.dim())]
        if scale.shape[0] != x.shape[layer.axis]:
            raise InterpreterError(
                f"layer '{layer.name}': {list(scale.shape)} scales, axis {layer.axis} of {x.shape}"
            )
        return x.to(ctx.wide) * ctx.widen(scale).reshape(shape)
    for axis, (size, count) in enumerate(zip(x.shape, scale.shape, strict=True)):
        if size % count:
            raise InterpreterError(
                f"layer '{layer.name}': blocks of {list(scale.shape)} do not fill {list(x.shape)}"
            )
        scale = scale.repeat_interleave(size // count, axis)
    return x.to(ctx.wide) * ctx.widen(scale)


def _no_handler(ctx: NetworkInterpreter, layer: Any, inputs: Inputs) -> Tensor:
    raise AssertionError("collectives are answered by run_ranks")


_LAYERS: dict[str, tuple[str, Handler]] = {
    "CONSTANT": ("IConstantLayer", _constant),
    "IDENTITY": ("IIdentityLayer", _identity),
    "SHAPE": ("IShapeLayer", _shape),
    "SHUFFLE": ("IShuffleLayer", _shuffle),
    "CONCATENATION": ("IConcatenationLayer", _concatenation),
    "SLICE": ("ISliceLayer", _slice),
    "CAST": ("ICastLayer", _cast),
    "ELEMENTWISE": ("IElementWiseLayer", _elementwise),
    "UNARY": ("IUnaryLayer", _unary),
    "ACTIVATION": ("IActivationLayer", _activation),
    "GATHER": ("IGatherLayer", _gather),
    "SELECT": ("ISelectLayer", _select),
    "REDUCE": ("IReduceLayer", _reduce),
    "SOFTMAX": ("ISoftMaxLayer", _softmax),
    "MATRIX_MULTIPLY": ("IMatrixMultiplyLayer", _matrix_multiply),
    "NORMALIZATION": ("INormalizationLayer", _normalization),
    "KV_CACHE_UPDATE": ("IKVCacheUpdateLayer", _kv_cache_update),
    "ATTENTION_INPUT": ("IAttentionInputLayer", _attention),
    "ATTENTION_OUTPUT": ("IAttentionOutputLayer", _identity),
    "DEQUANTIZE": ("IDequantizeLayer", _dequantize),
    "DIST_COLLECTIVE": ("IDistCollectiveLayer", _no_handler),
}
"""Layer type -> the class of its layer object, and how it is computed."""
