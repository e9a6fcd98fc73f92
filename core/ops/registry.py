"""What an op is, and the table of all ops.

An op is registered once, with its shape and dtype rule, a reference implementation in plain torch (the oracle of every
target, and the CPU target's starting point) and what it costs. Plugins register ops of their own the same way.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch

from ..errors import GraphError, ShapeError
from ..spec import Dim, TensorSpec

Attrs = Mapping[str, Any]


@dataclass(frozen=True)
class Signature:
    """One use of an op: what its shape rule sees. `inputs` has None where an optional input is absent."""

    op: str
    name: str
    inputs: tuple[TensorSpec | None, ...]
    attrs: Attrs

    def __getitem__(self, index: int) -> TensorSpec:
        """Input `index`, which must be there."""
        spec = self.get(index)
        self.require(spec is not None, f"input {index} is missing")
        assert spec is not None
        return spec

    def get(self, index: int) -> TensorSpec | None:
        return self.inputs[index] if index < len(self.inputs) else None

    def attr(self, name: str, *accepted: Any) -> Any:
        """Attribute `name`; with `accepted`, one of these values."""
        self.require(name in self.attrs, f"attribute {name!r} is missing")
        value = self.attrs[name]
        if accepted:
            names = ", ".join(map(str, accepted))
            self.require(value in accepted, f"attribute {name} is {value!r}; accepted: {names}")
        return value

    def integer(self, name: str) -> int:
        """Attribute `name`, a whole number of 32 bits."""
        value = self.attr(name)
        fits = type(value) is int and -(2**31) <= value < 2**31
        self.require(fits, f"attribute {name} is {value!r}; accepted: a whole number of 32 bits")
        return int(value)

    def number(self, name: str) -> float:
        """Attribute `name`, a finite number."""
        value = self.attr(name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        finite = number and abs(value) <= sys.float_info.max
        self.require(finite, f"attribute {name} is {value!r}; accepted: a finite number")
        return float(value)

    def dims(self, name: str) -> tuple[Dim, ...]:
        """Attribute `name`, sizes and symbols."""
        value = self.attr(name)
        fits = isinstance(value, tuple | list) and all(
            isinstance(d, str) or (type(d) is int and d >= 0) for d in value
        )
        self.require(fits, f"attribute {name} is {value!r}; accepted: sizes of at least 0, and symbols")
        return tuple(value)

    def require(self, condition: bool, message: str) -> None:
        """Raises ShapeError, naming op and node, unless `condition` holds."""
        if not condition:
            raise ShapeError(f"{self.op} '{self.name}': {message}")


class Communicator(Protocol):
    """How the ranks of a tensor-parallel group exchange tensors. overwrite: `x` may be lost."""

    def all_reduce(self, x: Any, *, overwrite: bool = False) -> Any: ...
    def all_gather(self, x: Any, axis: int) -> Any: ...


@dataclass
class ReferenceContext:
    """State that reference implementations need beyond their inputs."""

    kv_cache: Sequence[tuple[Any, Any]] = ()
    """Per layer, the pages of k and v: each [num_pages, page_size, num_kv_heads, head_dim], or a view of that shape, as
    where the heads of a page come first in memory (target cuda)."""
    communicator: Communicator | None = None


@dataclass(frozen=True)
class Cost:
    """Work of one execution: floating-point operations, and bytes that must move at least once."""

    flops: int
    bytes: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


Infer = Callable[[Signature], tuple[TensorSpec, ...]]
Reference = Callable[..., Any]
"""`(context, attrs, *inputs) -> tensor | tuple of tensors`; an absent optional input is None."""
Flops = Callable[[Signature, tuple[TensorSpec, ...], Mapping[str, int]], int]


def one_per_element(_: Signature, outputs: tuple[TensorSpec, ...], sizes: Mapping[str, int]) -> int:
    return outputs[0].numel(sizes)


def no_flops(_: Signature, outputs: tuple[TensorSpec, ...], sizes: Mapping[str, int]) -> int:
    return 0


@dataclass(frozen=True)
class Op:
    """An entry of the op table."""

    name: str
    infer: Infer
    reference: Reference
    flops: Flops = one_per_element
    bytes: Flops | None = None
    """Bytes moved; None: every input is read once and every output written once."""
    folds: bool = True
    """Whether the build evaluates the op where all of its inputs are weights."""
    column_wise: bool = False
    """Whether place j of axis 1 of every output (a head of [T, heads, head_dim], a column of [T, columns]) depends on place j
    of that axis of the inputs only, whatever the size of the axis: then ranks that share the axis each run the op on their
    part. Inputs that are not shared (positions) are whole on every rank."""
    attrs: tuple[str, ...] | None = None
    """Names of the attributes that there are, so that no other is passed in vain; None: any."""

    @cached_property
    def max_inputs(self) -> float:
        """As many as the reference takes, behind context and attributes."""
        kinds = [parameter.kind for parameter in inspect.signature(self.reference).parameters.values()]
        return math.inf if inspect.Parameter.VAR_POSITIONAL in kinds else len(kinds) - 2

    def cost(self, signature: Signature, outputs: tuple[TensorSpec, ...], sizes: Mapping[str, int]) -> Cost:
        """Cost with the symbols valued by `sizes` (`C`: mean context length that attention sees, in tokens)."""
        if self.bytes is not None:
            moved = self.bytes(signature, outputs, sizes)
        else:
            tensors = [spec for spec in signature.inputs if spec is not None] + list(outputs)
            moved = sum(spec.nbytes(sizes) for spec in tensors)
        return Cost(self.flops(signature, outputs, sizes), moved)


def widen(x: torch.Tensor) -> torch.Tensor:
    """`x` in the type that references keep sums in: float32, or float64 if it is that already."""
    return x if x.dtype == torch.float64 else x.float()


_OPS: dict[str, Op] = {}


def register(op: Op) -> Op:
    """Adds `op` to the table. Raises GraphError when another op has the name, or its reference cannot be called."""
    if _OPS.get(op.name, op) != op:
        raise GraphError(f"op {op.name!r} is registered twice; a plugin's ops need names of their own")
    if op.max_inputs < 0:
        raise GraphError(
            f"op {op.name!r}: its reference takes fewer arguments than context and attrs, which come before inputs"
        )
    _OPS[op.name] = op
    return op


def get_op(name: str) -> Op:
    """The op called `name`. Raises GraphError, listing the known ops."""
    try:
        return _OPS[name]
    except KeyError:
        known = ", ".join(sorted(_OPS))
        raise GraphError(f"op {name!r} is not registered; known ops: {known}") from None


def op_names() -> frozenset[str]:
    return frozenset(_OPS)
