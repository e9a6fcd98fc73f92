"""Splits a graph over the ranks of tensor parallelism.

Weights are split as their table rows say (`core.sharding`); the pass follows the split through the graph and
inserts the collectives. Of every tensor it knows along which axis it is split; None means that every rank holds all
of it. A layer whose weight is split by columns gives a split result; one split by rows takes a split input and ends
with an all-reduce (Megatron-LM, arXiv:1909.08053).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import BuildError
from ..graph import Graph, Node, make_node
from ..ops import get_op
from ..sharding import Shard, ShardingOptions, local_shape, split_axis
from ..spec import Dim, TensorSpec, normal_axis

Axis = int | None


def shard(graph: Graph, options: ShardingOptions, rank: int) -> Graph:
    """The graph of `rank`: what it computes with its part of the weights.

    Raises BuildError for a node whose inputs are split in a way that its op cannot work with.
    """
    if options.tp_size == 1:
        return graph
    return _Sharder(graph, options, rank).run()


class _Sharder:
    def __init__(self, graph: Graph, options: ShardingOptions, rank: int) -> None:
        self.graph, self.options, self.rank = graph, options, rank
        self.nodes: list[Node] = []
        self.specs: dict[str, TensorSpec] = {}
        self.axes: dict[str, Axis] = {}
        self.renamed: dict[str, str] = {}

    def run(self) -> Graph:
        for node in self.graph.nodes:
            rule = _RULES.get(node.op) or (_column_wise if get_op(node.op).column_wise else _replicated)
            result, axis = rule(self, node)
            for old, new in zip(node.tensors, result, strict=True):
                self.renamed[old] = new
                self.axes[new] = axis
        for name in self.graph.outputs:
            if self.axes[self.renamed[name]] is not None:
                raise BuildError(
                    f"tp_size {self.options.tp_size}: output %{name} is split over the ranks, and nothing gathers it; in the "
                    f"weight table the rule for the head is {Shard.VOCAB_HEAD}"
                )
        return Graph(tuple(self.nodes), tuple(self.renamed[name] for name in self.graph.outputs))

    def add(self, op: str, *inputs: str | None, name: str, **attrs: Any) -> tuple[str, ...]:
        node = make_node(name, op, inputs, attrs, self.specs)
        self.nodes.append(node)
        self.specs.update(zip(node.tensors, node.outputs, strict=True))
        return node.tensors

    def inputs(self, node: Node) -> list[str | None]:
        return [None if name is None else self.renamed[name] for name in node.inputs]

    def axis(self, tensor: str | None) -> Axis:
        return None if tensor is None else self.axes[tensor]

    def all_reduce(self, tensor: str) -> str:
        return self.add("all_reduce", tensor, name=f"{tensor}.all_reduce", tp_size=self.options.tp_size)[0]

    def all_gather(self, tensor: str, axis: int) -> str:
        return self.add(
            "all_gather", tensor, name=f"{tensor}.all_gather", axis=axis, tp_size=self.options.tp_size
        )[0]

    def whole(self, tensor: str, node: Node) -> tuple[str, ...]:
        """The result of `node` from its parts along axis 1, padding cut off."""
        gathered = self.all_gather(tensor, 1)
        size = node.outputs[0].shape[1]
        if self.specs[gathered].shape[1] == size:
            return (gathered,)
        return self.add("slice", gathered, name=f"{node.name}.whole", axis=1, start=0, stop=size)

    def require(self, condition: bool, node: Node) -> None:
        if not condition:
            split = ", ".join(f"%{name}: {self.axes[self.renamed[name]]}" for name in node.used)
            hint = (
                ""
                if node.op in _RULES
                else "; an op that may run on some of the heads or columns says column_wise=True"
            )
            raise BuildError(
                f"tp_size {self.options.tp_size}: {node.op} '{node.name}' cannot work with inputs split along ({split}){hint}"
            )


Result = tuple[tuple[str, ...], Axis]


def _replicated(s: _Sharder, node: Node) -> Result:
    inputs = s.inputs(node)
    s.require(all(s.axis(name) is None for name in inputs), node)
    return s.add(node.op, *inputs, name=node.name, **node.attrs), None


def _weight(s: _Sharder, node: Node) -> Result:
    rule = Shard(node.attrs.get("shard", Shard.REPLICATE))
    how = {"unit": node.attrs.get("unit", 1), "head": node.attrs.get("head")}
    shape = local_shape(node.attrs["shape"], rule, s.options, name=node.name, **how)
    return s.add("weight", name=node.name, **{**node.attrs, "shape": shape}), split_axis(rule, s.options)


def _embedding(s: _Sharder, node: Node) -> Result:
    ids, table = s.inputs(node)
    axis = s.axis(table)
    if axis is None:
        return _replicated(s, node)
    if axis == 1:
        (part,) = s.add("embedding", ids, table, name=node.name, **node.attrs)
        return s.whole(part, node), None
    assert table is not None
    rows = s.specs[table].shape[0]
    assert isinstance(rows, int)
    attrs = {**node.attrs, "offset": node.attrs["offset"] - s.rank * rows, "masked": True}
    (part,) = s.add("embedding", ids, table, name=node.name, **attrs)
    return (s.all_reduce(part),), None


def _linear(s: _Sharder, node: Node) -> Result:
    x, weight, *bias = s.inputs(node)
    axis = s.axis(weight)
    if axis is None:
        return _replicated(s, node)
    if axis == 1:
        s.require(s.axis(x) == 1 and not node.attrs and all(s.axis(b) is None for b in bias), node)
        total = s.all_reduce(s.add("linear", x, weight, name=f"{node.name}.part")[0])
        return (s.add("add", total, *bias, name=node.name) if bias else (total,)), None
    s.require(s.axis(x) is None and all(s.axis(b) == 0 for b in bias), node)
    result = s.add("linear", x, weight, *bias, name=node.name, **node.attrs)
    if s.graph.producers[node.used[1]].attrs.get("shard") != Shard.VOCAB_HEAD:
        return result, 1
    return s.whole(result[0], node), None


def _elementwise(s: _Sharder, node: Node) -> Result:
    inputs = s.inputs(node)
    first, rank = s.axis(inputs[0]), node.outputs[0].rank
    for name in inputs[1:]:
        assert name is not None
        along = first if s.specs[name].rank == rank else 0 if first == rank - 1 else None
        s.require(s.axis(name) == along, node)
    return s.add(node.op, *inputs, name=node.name, **node.attrs), first


def _reshape(s: _Sharder, node: Node) -> Result:
    """[T, heads * head_dim] <-> [T, heads, head_dim], split by heads."""
    (x,) = s.inputs(node)
    axis = s.axis(x)
    if axis is None:
        return _replicated(s, node)
    assert x is not None
    local, shape = s.specs[x].shape, tuple(node.attrs["shape"])
    s.require(axis == 1 and {len(local), len(shape)} == {2, 3}, node)
    fits, local_shape = _by_heads(local, shape)
    s.require(fits, node)
    return s.add("reshape", x, name=node.name, shape=local_shape), 1


def _by_heads(local: tuple[Dim, ...], shape: tuple[Dim, ...]) -> tuple[bool, tuple[Dim, ...]]:
    """Whether a rank has whole heads, and the shape of its part of the result: `local` is what it has."""
    if len(shape) == 2:
        heads, head_dim = local[1:]
        assert isinstance(heads, int) and isinstance(head_dim, int)
        return True, (shape[0], heads * head_dim)
    features, head_dim = local[1], shape[2]
    assert isinstance(features, int) and isinstance(head_dim, int)
    return features % head_dim == 0, (shape[0], features // head_dim, head_dim)


def _attention(s: _Sharder, node: Node) -> Result:
    inputs = s.inputs(node)
    s.require(len({s.axis(name) for name in inputs[:3]}) == 1, node)
    return s.add(node.op, *inputs, name=node.name, **node.attrs), s.axis(inputs[0])


def _column_wise(s: _Sharder, node: Node) -> Result:
    """Each rank computes the heads or columns that it has."""
    inputs = s.inputs(node)
    axes = {s.axis(name) for name in inputs}
    s.require(axes <= {None, 1}, node)
    return s.add(node.op, *inputs, name=node.name, **node.attrs), 1 if 1 in axes else None


def _structure(s: _Sharder, node: Node) -> Result:
    """Parts along an axis, of tensors that are split alike along another."""
    inputs = s.inputs(node)
    first = s.axis(inputs[0])
    along = normal_axis(node.attrs["axis"], node.outputs[0].rank)
    s.require(first is None or (first != along and {s.axis(name) for name in inputs} == {first}), node)
    return _column_wise(s, node) if first == 1 else _replicated(s, node)


def _norm(s: _Sharder, node: Node) -> Result:
    """Of whole rows, or of the heads that a rank has."""
    return _column_wise(s, node) if node.outputs[0].rank == 3 else _replicated(s, node)


_RULES: dict[str, Callable[[_Sharder, Node], Result]] = {
    "weight": _weight,
    "embedding": _embedding,
    "linear": _linear,
    "activation": _elementwise,
    "add": _elementwise,
    "mul": _elementwise,
    "cast": _elementwise,
    "reshape": _reshape,
    "attention": _attention,
    "split": _structure,
    "slice": _structure,
    "concat": _structure,
    "layer_norm": _norm,
    "rms_norm": _norm,
}
