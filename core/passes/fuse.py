"""Joins ops that a target can run as one."""

from __future__ import annotations

from ..graph import Graph, Node
from ..ops import get_op
from ..quantize.scheme import SCALE, ZERO
from .quantize import DEQUANTIZED
from .rewrite import Rewrite, Rule, only_reader

SIBLINGS = "linear siblings"
ACTIVATION = "linear + activation"
ADD_NORM = "add + norm"
RESIDUAL = "linear + residual"
POSITIONS = "embedding + positions"
AFFINE = "affine norm into linear"
DEQUANTIZE = "dequantize + linear"
FUSIONS = frozenset({SIBLINGS, ACTIVATION, ADD_NORM, RESIDUAL, POSITIONS, AFFINE, DEQUANTIZE})
"""What a target can ask for, by name."""


def linear_siblings(graph: Graph, node: Node) -> Rewrite | None:
    """linear(x, W1, b1), linear(x, W2, b2), ... -> split(linear(x, [W1; W2; ...], [b1; b2; ...]))

    One product with all rows (q, k, v; gate and up) reads x once and fills the machine better than several. Quantized
    weights are joined part by part, where they all have one format: every row has scales of its own.
    """
    if not _is_plain(node):
        return None
    siblings = tuple(
        user
        for user in graph.users[node.used[0]]
        if _is_plain(user) and user.used[0] == node.used[0] and _weights_only(graph, user)
    )
    biased = len(node.used) == 3
    if len(siblings) < 2 or siblings[0] != node or any((len(s.used) == 3) != biased for s in siblings):
        return None
    if len({_weight_format(graph, s.used[1]) for s in siblings}) != 1:
        return None
    name = _joined_name([s.name for s in siblings])
    result = Rewrite(graph, siblings)
    joined = [_join_weights(result, [s.used[1] for s in siblings], f"{name}.weight")]
    if biased:
        joined += result.add("concat", *(s.used[2] for s in siblings), name=f"{name}.bias", axis=0)
    (product,) = result.add("linear", node.used[0], *joined, name=name)
    sizes = tuple(s.outputs[0].shape[-1] for s in siblings)
    parts = result.add("split", product, name=f"{name}.split", axis=1, sizes=sizes)
    for sibling, part in zip(siblings, parts, strict=True):
        result.replace(sibling.name, part)
    return result


def linear_activation(graph: Graph, node: Node) -> Rewrite | None:
    """activation(linear(x, W, b)) -> linear(x, W, b; activation)"""
    inner = graph.producers[node.used[0]] if node.op == "activation" else None
    if inner is None or not _is_plain(inner) or not only_reader(graph, inner.name):
        return None
    result = Rewrite(graph, (node, inner))
    (tensor,) = result.add("linear", *inner.inputs, name=inner.name, activation=node.attrs["kind"])
    result.replace(node.name, tensor)
    return result


def add_norm(graph: Graph, node: Node) -> Rewrite | None:
    """norm(x + residual) -> add_norm(x, residual), which also gives the sum

    Of several norms of one sum, the first takes the sum along; what they read then is no `add` any more.
    """
    inner = graph.producers[node.used[0]] if node.op in ("layer_norm", "rms_norm") else None
    if inner is None or inner.op != "add":
        return None
    residual, x = inner.used
    if graph.specs[residual] != graph.specs[x]:
        return None
    result = Rewrite(graph, (node, inner))
    total, normed = result.add(f"add_{node.op}", x, residual, *node.inputs[1:], name=node.name, **node.attrs)
    result.replace(inner.name, total)
    result.replace(node.name, normed)
    return result


def linear_residual(graph: Graph, node: Node) -> Rewrite | None:
    """residual + linear(x, W, b) -> linear(x, W, b, residual); the same of quantized_linear"""
    if node.op != "add":
        return None
    for tensor, residual in (node.used[::-1], node.used):
        inner = graph.producers[tensor]
        same = graph.specs[residual] == node.outputs[0]  # not a vector over the last axis
        before = PRODUCTS.get(inner.op, -1)
        if len(inner.inputs) <= before and same and only_reader(graph, tensor):
            given = (*inner.inputs, *[None] * (before - len(inner.inputs)))
            result = Rewrite(graph, (node, inner))
            (total,) = result.add(inner.op, *given, residual, name=node.name, **inner.attrs)
            result.replace(node.name, total)
            return result
    return None


def affine_into_linear(graph: Graph, node: Node) -> Rewrite | None:
    """linear(norm(x; g, s), W, b) -> linear(norm(x), W * g, b + W s), where nothing else reads the norm

    The norm's own weights vanish from the step, so that a kernel can norm in front of its product with nothing to read.
    Not where W is quantized: g would have to be folded before the weights were rounded, in a checkpoint that any target
    (and one that does not fold) builds from; the norm keeps its two vectors, which are nothing beside W. Nor where a lookup
    in a part of the vocabulary reads W too: the table was split to be held once, and W * g would be another.
    """
    inner = graph.producers[node.used[0]] if node.op == "linear" else None
    if inner is None or inner.op not in NORMS or len(inner.inputs) == 1 or not only_reader(graph, inner.name):
        return None
    scale, shift = (*inner.inputs, None)[1:3]
    _, weight, bias, *rest = (*node.inputs, None, None)[: max(3, len(node.inputs))]
    if weight is None or scale is None or not is_constant(graph, weight):
        return None
    if any(reader.op == "embedding" and reader.attrs.get("masked") for reader in graph.users[weight]):
        return None
    result = Rewrite(graph, (node, inner))
    (normed,) = result.add(inner.op, inner.used[0], name=inner.name, **inner.attrs)
    (scaled,) = result.add("mul", weight, scale, name=f"{node.name}.weight.normed")
    if shift is not None:
        features, columns = graph.specs[weight].shape
        (row,) = result.add("reshape", shift, name=f"{node.name}.shift", shape=(1, columns))
        (moved,) = result.add("linear", row, weight, name=f"{node.name}.shift.product")
        (offset,) = result.add("reshape", moved, name=f"{node.name}.shift.offset", shape=(features,))
        bias = offset if bias is None else result.add("add", offset, bias, name=f"{node.name}.bias.normed")[0]
    (tensor,) = result.add("linear", normed, scaled, bias, *rest, name=node.name, **node.attrs)
    result.replace(node.name, tensor)
    return result


def norm_linear(graph: Graph, node: Node) -> Rewrite | None:
    """linear(norm(x), W, ...) -> linear(x, W, ...; norm), where nothing else reads the norm and it has no weights

    The same of quantized_linear, which takes the norm's weights along. Not one of `RULES`: whether it pays depends on the
    number of rows, which a target knows when it plans a step.
    """
    inner = graph.producers[node.used[0]] if node.op in PRODUCTS and "norm" not in node.attrs else None
    if inner is None or inner.op not in NORMS or not only_reader(graph, inner.name):
        return None
    weights = inner.inputs[1:]
    if weights and node.op != "quantized_linear":
        return None
    rest = [*node.inputs[1:]]
    if weights:
        rest += [None] * (PRODUCTS[node.op] - len(rest)) + [*weights]
    attrs = {**node.attrs, "norm": NORMS[inner.op], "eps": inner.attrs["eps"]}
    result = Rewrite(graph, (node, inner))
    (tensor,) = result.add(node.op, inner.used[0], *rest, name=node.name, **attrs)
    result.replace(node.name, tensor)
    return result


def all_reduce_norm(graph: Graph, node: Node) -> Rewrite | None:
    """norm(all_reduce(x)) -> all_reduce_norm(x), add_norm(all_reduce(x), residual) -> all_reduce_norm(x, residual)

    It also gives the sum. Not one of `RULES`: a target asks for it when it is clear what is added on which rank.
    """
    kind = NORMS.get(node.op.removeprefix("add_"))
    if kind is None:
        return None
    adds = node.op not in NORMS
    for tensor, residual in (node.used[:2], node.used[1::-1]) if adds else ((node.used[0], None),):
        inner = graph.producers[tensor]
        if inner.op != "all_reduce" or (adds and not only_reader(graph, tensor)):
            continue
        result = Rewrite(graph, (node, inner))
        attrs = {"tp_size": inner.attrs["tp_size"], "norm": kind, "eps": node.attrs["eps"]}
        affine = node.inputs[2 if adds else 1 :]
        inputs = (inner.used[0], *((residual, *affine) if residual or affine else ()))
        total, normed = result.add("all_reduce_norm", *inputs, name=node.name, **attrs)
        result.replace(node.tensors[0] if adds else tensor, total)
        result.replace(node.tensors[-1], normed)
        return result
    return None


def dequantize_linear(graph: Graph, node: Node) -> Rewrite | None:
    """linear(x, dequantize(integers, scale, zero), ...) -> quantized_linear(x, integers, scale, zero, ...)"""
    weight = graph.producers[node.used[1]] if node.op == "linear" else None
    if weight is None or weight.op != "dequantize":
        return None
    integers, scale, zero = (*weight.inputs, None)[:3]
    rest = [zero, *node.inputs[2:]]
    while rest and rest[-1] is None:
        rest.pop()
    result = Rewrite(graph, (node,))
    (tensor,) = result.add(
        "quantized_linear", node.inputs[0], integers, scale, *rest, name=node.name, **node.attrs
    )
    result.replace(node.name, tensor)
    return result


def embedding_positions(graph: Graph, node: Node) -> Rewrite | None:
    """embedding(ids, E) + embedding(positions, P) -> embedding(ids, E, positions, P)"""
    if node.op != "add":
        return None
    first, second = (graph.producers[name] for name in node.used)
    if not all(
        e.op == "embedding" and len(e.inputs) == 2 and only_reader(graph, e.name) for e in (first, second)
    ):
        return None
    if second.attrs.get("masked", False):
        return None
    result = Rewrite(graph, (node, first, second))
    attrs = {**first.attrs, "position_offset": second.attrs["offset"]}
    (tensor,) = result.add("embedding", *first.inputs, *second.inputs, name=node.name, **attrs)
    result.replace(node.name, tensor)
    return result


NORMS = {"layer_norm": "layer", "rms_norm": "rms"}
"""Op of a norm -> its name in a linear layer."""
PRODUCTS = {"linear": 3, "quantized_linear": 5}
"""Op of a linear layer -> how many inputs it has before a residual."""

RULES: dict[str, Rule] = {
    SIBLINGS: linear_siblings,
    ACTIVATION: linear_activation,
    POSITIONS: embedding_positions,
    RESIDUAL: linear_residual,
    AFFINE: affine_into_linear,
    ADD_NORM: add_norm,
    DEQUANTIZE: dequantize_linear,
}
"""The rule of each fusion. Their order is that in which a pipeline applies them: a gate whose activation is fused
already is no longer up's sibling, a sum that a linear layer took in is no longer one for a norm, and a linear layer that
reads its integers itself is no `linear` for any other rule."""


def is_constant(graph: Graph, tensor: str) -> bool:
    """Whether `tensor` is a weight, or computed from weights alone by the build."""
    node = graph.producers[tensor]
    if node.op == "weight":
        return True
    return bool(node.inputs) and get_op(node.op).folds and all(is_constant(graph, name) for name in node.used)


def _is_plain(node: Node) -> bool:
    """Whether `node` is a linear layer with nothing fused in."""
    return node.op == "linear" and not node.attrs and len(node.inputs) <= 3


def _weights_only(graph: Graph, node: Node) -> bool:
    producers = [graph.producers[name] for name in node.used[1:]]
    return producers[0].op in ("weight", "dequantize") and all(bias.op == "weight" for bias in producers[1:])


def _weight_format(graph: Graph, weight: str) -> tuple[object, ...]:
    """What two weights must have in common to be joined by rows."""
    node = graph.producers[weight]
    specs = [graph.specs[name] for name in (node.used if node.op == "dequantize" else (weight,))]
    return (node.op, *((spec.dtype, spec.shape[1:]) for spec in specs))


def _join_weights(result: Rewrite, weights: list[str], name: str) -> str:
    """[W1; W2; ...]"""
    first = result.graph.producers[weights[0]]
    if first.op != "dequantize":
        return result.add("concat", *weights, name=name, axis=0)[0]
    sources = [result.graph.producers[weight].used for weight in weights]
    parts = [
        result.add("concat", *parts, name=f"{name}{suffix}", axis=0)[0]
        for suffix, *parts in zip(("", SCALE, ZERO)[: len(first.used)], *sources, strict=True)
    ]
    return result.add("dequantize", *parts, name=f"{name}{DEQUANTIZED}")[0]


def _joined_name(names: list[str]) -> str:
    """`a.q`, `a.k`, `a.v` -> `a.qkv`; `a.gate`, `a.up` -> `a.gate_up`."""
    stem, _, _ = names[0].rpartition(".")
    parts = [name.rpartition(".")[2] for name in names]
    joined = "".join(parts) if all(len(part) == 1 for part in parts) else "_".join(parts)
    return f"{stem}.{joined}" if stem else joined
