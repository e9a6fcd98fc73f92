"""How layers of a TensorRT network are computed in torch: see trt_interpreter.py.

Semantics: https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/operators/
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from .trt_interpreter import NetworkInterpreter

Tensor = torch.Tensor


class InterpreterError(Exception):
    """The network has something that the interpreter does not emulate, or does something that TensorRT forbids."""


Inputs = list[Any]
"""Tensors of a layer's inputs; None where an optional one is absent."""
Handler = Callable[["NetworkInterpreter", Any, Inputs], Tensor]

DTYPES = {
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
    return x.to(DTYPES[layer.to_type.name])


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
        add = torch.where(mask, 0.0, float("-inf")).double() if mask.dtype == torch.bool else ctx.widen(mask)
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
        return x.double() * ctx.widen(scale).reshape(shape)
    for axis, (size, count) in enumerate(zip(x.shape, scale.shape, strict=True)):
        if size % count:
            raise InterpreterError(
                f"layer '{layer.name}': blocks of {list(scale.shape)} do not fill {list(x.shape)}"
            )
        scale = scale.repeat_interleave(size // count, axis)
    return x.double() * ctx.widen(scale)


def _no_handler(ctx: NetworkInterpreter, layer: Any, inputs: Inputs) -> Tensor:
    raise AssertionError("collectives are answered by run_ranks")


LAYERS: dict[str, tuple[str, Handler]] = {
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
