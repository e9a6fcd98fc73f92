"""The one data type of the compiler: a graph of ops in SSA form.

A tensor is known by name. A node with one output gives its tensor its own name, a node with several names them
`node:0`, `node:1`, ... Inputs and weights are nodes too (ops `input` and `weight`), so that printer, verifier, hash and
rewriter know one kind of thing. Nodes and graphs are immutable; change means `dataclasses.replace` and a new graph.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from math import isfinite
from types import MappingProxyType
from typing import Any

from .dtypes import DType
from .errors import GraphError, TrtcError
from .ops import Cost, Signature, get_op
from .spec import Dim, TensorSpec
from .weights import ResolvedWeight

GRAPH_INPUTS: Mapping[str, TensorSpec] = MappingProxyType(
    {
        "token_ids": TensorSpec(DType.INT32, ("T",)),
        "positions": TensorSpec(DType.INT32, ("T",)),
        "query_start": TensorSpec(DType.INT32, ("B+1",)),
        "kv_length": TensorSpec(DType.INT32, ("B",)),
        "page_table": TensorSpec(DType.INT32, ("B", "P")),
        "logits_index": TensorSpec(DType.INT32, ("R",)),
    }
)
"""What the runtime feeds every graph with: T packed tokens of B sequences with at most P pages each; R rows wanted."""


def _freeze(value: Any) -> Any:
    return tuple(map(_freeze, value)) if isinstance(value, list | tuple) else value


@dataclass(frozen=True)
class Node:
    """One use of an op. `inputs` are tensor names, None where an optional input is absent."""

    name: str
    op: str
    inputs: tuple[str | None, ...] = ()
    attrs: Mapping[str, Any] = field(default_factory=dict)
    outputs: tuple[TensorSpec, ...] = ()

    def __post_init__(self) -> None:
        attrs = {key: _freeze(self.attrs[key]) for key in sorted(self.attrs)}
        object.__setattr__(self, "attrs", MappingProxyType(attrs))

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the output tensors."""
        if len(self.outputs) == 1:
            return (self.name,)
        return tuple(f"{self.name}:{i}" for i in range(len(self.outputs)))

    @property
    def used(self) -> tuple[str, ...]:
        """Names of the input tensors that are there."""
        return tuple(name for name in self.inputs if name is not None)

    def signature(self, specs: Mapping[str, TensorSpec]) -> Signature:
        inputs = tuple(None if name is None else specs[name] for name in self.inputs)
        return Signature(self.op, self.name, inputs, self.attrs)

    def __str__(self) -> str:
        types = ", ".join(map(str, self.outputs))
        attrs = {
            k: v
            for k, v in self.attrs.items()
            if self.op not in ("input", "weight") or k not in ("dtype", "shape")
        }
        text = f"%{self.name}: {types} = {self.op}({', '.join('_' if n is None else f'%{n}' for n in self.inputs)})"
        return text + (f" {{{', '.join(f'{k}={v!r}' for k, v in attrs.items())}}}" if attrs else "")

    def to_json(self) -> dict[str, Any]:
        data: dict[str, Any] = {"name": self.name, "op": self.op}
        if self.inputs:
            data["inputs"] = list(self.inputs)
        if self.attrs:
            data["attrs"] = dict(self.attrs)
        return data | {"outputs": [spec.to_json() for spec in self.outputs]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Node:
        outputs = tuple(TensorSpec.from_json(spec) for spec in data["outputs"])
        return cls(data["name"], data["op"], tuple(data.get("inputs", ())), data.get("attrs", {}), outputs)


def make_node(
    name: str,
    op: str,
    inputs: Sequence[str | None],
    attrs: Mapping[str, Any],
    specs: Mapping[str, TensorSpec],
) -> Node:
    """A node whose outputs follow from the op's shape rule. Raises GraphError, naming the node, for what does not
    fit."""
    draft = Node(name, op, tuple(inputs), attrs)
    for tensor in draft.used:
        if tensor not in specs:
            raise GraphError(f"{op} '{name}': input %{tensor} is not defined before it is used")
    for key, value in draft.attrs.items():
        if not _is_json(value):
            raise GraphError(
                f"{op} '{name}': attribute {key} is {value!r}; accepted: finite numbers, texts, booleans, None, lists of them"
            )
    return Node(name, op, draft.inputs, draft.attrs, _infer(draft, specs))


def _is_json(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_json, value))
    return (
        value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and isfinite(value))
    )


def _infer(draft: Node, specs: Mapping[str, TensorSpec]) -> tuple[TensorSpec, ...]:
    """What the op's shape rule gives, which may be a plugin's. Raises GraphError, naming the node, for what it raises."""
    op = get_op(draft.op)
    unknown = sorted(draft.attrs.keys() - set(draft.attrs if op.attrs is None else op.attrs))
    if unknown:
        accepted = ", ".join(op.attrs or ()) or "none"
        raise GraphError(
            f"{draft.op} '{draft.name}': attribute {unknown[0]!r} is not known; accepted: {accepted}"
        )
    if len(draft.inputs) > op.max_inputs:
        raise GraphError(
            f"{draft.op} '{draft.name}': has {len(draft.inputs)} inputs; accepted: at most {op.max_inputs}"
        )
    try:
        outputs = op.infer(draft.signature(specs))
    except TrtcError:
        raise
    except Exception as error:
        attrs = ", ".join(f"{key}={value!r}" for key, value in draft.attrs.items())
        raise GraphError(
            f"{draft.op} '{draft.name}': the op's shape rule raised {type(error).__name__}: {error}; attributes: "
            f"{attrs or 'none'}"
        ) from error
    if not isinstance(outputs, tuple) or not all(isinstance(spec, TensorSpec) for spec in outputs):
        raise GraphError(
            f"{draft.op} '{draft.name}': the op's shape rule gave {outputs!r}, not a tuple of TensorSpec"
        )
    return outputs


@dataclass(frozen=True)
class Graph:
    """Nodes in an order in which they can be executed, and the names of the tensors that are the result."""

    nodes: tuple[Node, ...]
    outputs: tuple[str, ...]

    @cached_property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Type of every tensor, by name."""
        return {
            name: spec for node in self.nodes for name, spec in zip(node.tensors, node.outputs, strict=True)
        }

    @cached_property
    def producers(self) -> Mapping[str, Node]:
        """The node that makes a tensor, by the tensor's name."""
        return {name: node for node in self.nodes for name in node.tensors}

    @cached_property
    def users(self) -> Mapping[str, tuple[Node, ...]]:
        """The nodes that read a tensor, by the tensor's name; the graph's outputs are not among them."""
        users: dict[str, list[Node]] = {name: [] for name in self.specs}
        for node in self.nodes:
            for name in dict.fromkeys(node.used):
                users[name].append(node)
        return {name: tuple(nodes) for name, nodes in users.items()}

    @property
    def inputs(self) -> tuple[Node, ...]:
        return tuple(node for node in self.nodes if node.op == "input")

    @property
    def weights(self) -> tuple[Node, ...]:
        return tuple(node for node in self.nodes if node.op == "weight")

    @cached_property
    def num_cache_layers(self) -> int:
        """Slots of the KV cache that the graph's attention nodes use."""
        return sum(node.op == "attention" for node in self.nodes)

    @cached_property
    def hash(self) -> str:
        """sha256 of the JSON form: equal graphs have equal hashes, in every process."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def verify(self, stage: str = "graph", ops: frozenset[str] | None = None) -> Graph:
        """The graph itself, if every rule holds: names unique, inputs defined before use, types as the ops' rules say,
        attention slots numbered from 0 without gaps; with `ops`, no op but these.

        Raises GraphError naming `stage`, the node and the rule.
        """
        specs: dict[str, TensorSpec] = {}
        slots: list[int] = []
        for node in self.nodes:
            where = f"{stage}: {node.op} '{node.name}'"
            if ops is not None and node.op not in ops:
                raise GraphError(f"{where}: op is not allowed here; allowed: {', '.join(sorted(ops))}")
            expected = make_node(node.name, node.op, node.inputs, node.attrs, specs).outputs
            if expected != node.outputs:
                raise GraphError(
                    f"{where}: outputs are {list(map(str, node.outputs))}, not {list(map(str, expected))}"
                )
            for name, spec in zip(node.tensors, node.outputs, strict=True):
                if name in specs:
                    raise GraphError(f"{where}: %{name} is defined twice")
                specs[name] = spec
            if node.op == "attention":
                slots.append(node.attrs["layer"])
        if not self.outputs:
            raise GraphError(f"{stage}: the graph has no output")
        for name in self.outputs:
            if name not in specs:
                raise GraphError(f"{stage}: output %{name} is not defined")
        if sorted(slots) != list(range(len(slots))):
            raise GraphError(f"{stage}: attention slots are {slots}, not each of 0..{len(slots) - 1} once")
        return self

    def cost(self, sizes: Mapping[str, int]) -> Cost:
        """Work of one step: `sizes` gives T, B, R, P, `B+1` and C (mean context length) their values."""
        costs = (get_op(n.op).cost(n.signature(self.specs), n.outputs, sizes) for n in self.nodes)
        return sum(costs, Cost(0, 0))

    def __str__(self) -> str:
        returned = ", ".join(f"%{name}" for name in self.outputs)
        return "\n".join([*map(str, self.nodes), f"return {returned}"])

    def to_json(self) -> dict[str, Any]:
        return {"nodes": [node.to_json() for node in self.nodes], "outputs": list(self.outputs)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Graph:
        """The inverse of `to_json`. Raises GraphError when `data` is not the JSON form of a graph."""
        try:
            return cls(tuple(map(Node.from_json, data["nodes"])), tuple(data["outputs"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise GraphError(f"not the JSON form of a graph: {type(error).__name__}: {error}") from None


class GraphBuilder:
    """Builds a graph node by node; what a plugin composes its layers with (through `core.layers`).

    Tensors are handed around by name. Weights come from the family's weight table: `weight(name)` is the only way to
    get one, so a graph cannot use a weight that conversion does not know.
    """

    def __init__(self, dtype: DType, weights: Iterable[ResolvedWeight] = ()) -> None:
        self.dtype = dtype
        self.weights = {weight.name: weight for weight in weights}
        self._nodes: list[Node] = []
        self._specs: dict[str, TensorSpec] = {}
        self._scopes: list[str] = []
        for name, spec in GRAPH_INPUTS.items():
            self._append(make_node(name, "input", (), {"dtype": spec.dtype.value, "shape": spec.shape}, {}))

    def _append(self, node: Node) -> None:
        if node.name in self._specs:
            raise GraphError(f"{node.op} '{node.name}': the name is taken")
        self._nodes.append(node)
        self._specs.update(zip(node.tensors, node.outputs, strict=True))

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Names inside the `with` block start with `name.`."""
        self._scopes.append(name)
        try:
            yield
        finally:
            self._scopes.pop()

    def full_name(self, name: str) -> str:
        return ".".join([*self._scopes, name])

    def has_weight(self, name: str) -> bool:
        return self.full_name(name) in self.weights

    def weight(self, name: str) -> str:
        """The weight `name` (in the current scope). Raises GraphError when the weight table has no such row."""
        full = self.full_name(name)
        if full not in self.weights:
            raise GraphError(f"weight '{full}' is not in the family's weight table")
        if full not in self._specs:
            row = self.weights[full]
            attrs = {
                "dtype": self.dtype.value,
                "shape": row.shape,
                "shard": row.shard.value,
                "unit": row.unit,
                **({} if row.head is None else {"head": row.head}),
            }
            self._append(make_node(full, "weight", (), attrs, {}))
        return full

    def optional_weight(self, name: str) -> str | None:
        """The weight `name`, or None when the weight table has none (bias-free and non-affine variants)."""
        return self.weight(name) if self.has_weight(name) else None

    def add(self, op: str, *inputs: str | None, name: str, **attrs: Any) -> str:
        """Adds a node with one output and returns its tensor. Raises GraphError, as `add_many`, and for more outputs."""
        tensors = self.add_many(op, *inputs, name=name, **attrs)
        if len(tensors) != 1:
            raise GraphError(
                f"{op} '{self.full_name(name)}' has {len(tensors)} outputs; add_many returns them all"
            )
        return tensors[0]

    def add_many(self, op: str, *inputs: str | None, name: str, **attrs: Any) -> tuple[str, ...]:
        """Adds a node and returns its tensors. Raises GraphError, naming the node, when something does not fit."""
        while inputs and inputs[-1] is None:
            inputs = inputs[:-1]
        node = make_node(self.full_name(name), op, inputs, attrs, self._specs)
        self._append(node)
        return node.tensors

    def shape(self, tensor: str) -> tuple[Dim, ...]:
        return self._specs[tensor].shape

    def finish(self, output: str) -> Graph:
        """The verified graph that returns `output`. Raises GraphError for weights that the table has and no node
        uses."""
        unused = sorted(set(self.weights) - set(self._specs))
        if unused:
            raise GraphError(
                f"the weight table has rows that the composition never uses: {', '.join(unused)}"
            )
        return Graph(tuple(self._nodes), (output,)).verify("compose")
