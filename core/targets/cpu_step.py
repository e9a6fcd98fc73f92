"""Decode steps of the CPU target as one call of compiled code: the graph becomes a list of instructions of `kernels.cpu_step`.

A decode step costs what its weights cost to read, if nothing else costs anything: no dispatch, no allocation, no copy of the
cache. Activations live in registers, float32, [max_tokens, width]; a register is used again once nothing reads it any more.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...kernels import cpu_step
from ...kernels.cpu_step import Instruction, Op
from ..dtypes import from_torch
from ..graph import Graph, Node
from .cpu_attention import KVCache
from .cpu_head import Screen

_VIEWS = frozenset({"reshape", "cast", "select_rows"})
"""Ops that change nothing in a step with logits for each of its tokens, computed in float32."""


_BY_ROWS = frozenset(
    {"linear", "quantized_linear", "layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm", "split"}
)
"""Ops that look at a row of their first input as a whole: a token's, not one of its heads'."""


class Unsupported(Exception):
    """A graph has something that these kernels do not do; another way must run it."""


@dataclass(frozen=True)
class _Value:
    """Columns first .. first + width - 1 of a register."""

    register: torch.Tensor
    width: int
    first: int = 0

    @property
    def pointer(self) -> int:
        return self.register.data_ptr() + 4 * self.first

    @property
    def stride(self) -> int:
        return self.register.shape[1]

    @property
    def whole(self) -> bool:
        return self.width == self.stride


@dataclass(frozen=True)
class DecodeLimits:
    """Which steps decode. max_tokens: of a step, over all its sequences; max_len: tokens of a sequence."""

    max_tokens: int
    max_len: int

    def allow(self, inputs: Mapping[str, torch.Tensor]) -> bool:
        """Whether a step wants the logits of all its tokens, and is not too large."""
        return len(inputs["logits_index"]) == len(inputs["token_ids"]) <= self.max_tokens


class DecodeStep:
    """Runs the steps that `DecodeLimits` allow: of few tokens whose logits are all wanted, one of each sequence, or several
    where guesses are verified.

    A token's logits are the same, to the last bit, whatever other tokens are in the step.
    Raises Unsupported for graphs and machines that cannot run this way.
    """

    def __init__(
        self,
        graph: Graph,
        weights: Mapping[str, torch.Tensor],
        cache: KVCache,
        limits: DecodeLimits,
    ) -> None:
        max_tokens, max_len = limits.max_tokens, limits.max_len
        if cpu_step.library() is None:
            raise Unsupported("no compiled kernels for this processor")
        self._threads = torch.get_num_threads()
        compiler = _Compiler(graph, weights, cache, max_tokens)
        instructions = compiler.instructions
        self._logits = compiler.values[graph.outputs[0]].register
        self._kept = compiler.kept
        self._program = (Instruction * len(instructions))(*instructions)
        self._greedy: ctypes.Array[Instruction] | None = None
        if compiler.head is not None:
            self._screen = Screen(compiler.head)
            self._greedy = (Instruction * (len(instructions) + 3))(
                *instructions[:-1], *self._screen.instructions(instructions[-1])
            )
        heads = max((i.n for i in instructions if i.op == Op.ATTENTION), default=0)
        self._scratch = torch.empty(self._threads, heads, max_len)
        self._best = torch.empty(2, self._threads, max_tokens)
        self._best_id = torch.empty(self._threads, max_tokens, dtype=torch.int32)
        self._picked = torch.empty(max_tokens, dtype=torch.int32)
        widest = -(-max((i.k for i in instructions if i.op == Op.LINEAR), default=0) // 32) * 32
        self._narrow = torch.empty(self._threads, max_tokens, widest, dtype=torch.int16)
        self._step = cpu_step.Step(
            page_size=cache[0][0].shape[1],
            max_len=max_len,
            scratch=self._scratch.data_ptr(),
            best=self._best.data_ptr(),
            best_id=self._best_id.data_ptr(),
            picked=self._picked.data_ptr(),
            narrow=self._narrow.data_ptr(),
            narrow_k=widest,
        )

    def logits(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """[T, vocab_size] float32; the memory is used again by the next step."""
        self._run(self._program, inputs)
        return self._logits[: len(inputs["token_ids"])]

    def next_tokens(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """[T] int32: the tokens with the largest logits, -1 where they are not finite; used again by the next step."""
        if self._greedy is not None:
            self._run(self._greedy, inputs)
            return self._picked[: len(inputs["token_ids"])]
        best, chosen = self.logits(inputs).max(-1)
        return chosen.where(best.isfinite(), -1).int()

    def _run(self, program: ctypes.Array[Instruction], inputs: Mapping[str, torch.Tensor]) -> None:
        step, count = self._step, len(inputs["token_ids"])
        sequences, pages = inputs["page_table"].shape
        step.tokens, step.pages, step.sequence = count, pages, None
        if sequences < count:
            owner = torch.repeat_interleave(inputs["query_start"].diff()).int()
            step.sequence = owner.data_ptr()
        for name in ("token_ids", "positions", "page_table"):
            setattr(step, name, inputs[name].data_ptr())
        with torch.profiler.record_function("trtc::cpu_step"):  # or profiles would not show it
            cpu_step.run(program, step, self._threads)


class _Compiler:
    """Graph -> instructions. `kept` holds every tensor that an instruction points into."""

    def __init__(
        self, graph: Graph, weights: Mapping[str, torch.Tensor], cache: KVCache, max_tokens: int
    ) -> None:
        self._graph, self._weights, self._cache, self._max_tokens = graph, weights, cache, max_tokens
        self.instructions: list[Instruction] = []
        self.values: dict[str, _Value] = {}
        self.kept: list[Any] = [cache]
        self.head: torch.Tensor | None = None
        self._free: dict[int, list[torch.Tensor]] = {}
        self._readers = {name: len(users) + (name in graph.outputs) for name, users in graph.users.items()}
        self._users: dict[int, int] = {}
        for node in graph.nodes:
            if node.op not in ("input", "weight"):
                self._compile(node)
        last = self.instructions[-1]
        result = self.values[graph.outputs[0]]
        if not result.whole:
            raise Unsupported("the output is part of a register")
        plain = last.op == Op.LINEAR and not (last.kind or last.residual or last.scale)
        if plain and last.y == result.pointer:
            self.head = next(w for w in weights.values() if w.data_ptr() == last.w and len(w) == last.n)

    def _compile(self, node: Node) -> None:
        method = getattr(self, f"_{node.op}", None)
        if node.op in _BY_ROWS and self._graph.specs[node.used[0]].rank != 2:
            raise Unsupported(f"{node.op} '{node.name}': by heads")
        if node.op in _VIEWS:
            self._view(node)
        elif method is None:
            raise Unsupported(f"{node.op} '{node.name}'")
        else:
            method(node)
        for name in dict.fromkeys(node.used):
            self._release(name)

    # ---- registers

    def _new(self, node: Node, index: int = 0) -> _Value:
        spec = node.outputs[index]
        width = 1
        for size in spec.shape[1:]:
            if not isinstance(size, int):
                raise Unsupported(f"{node.op} '{node.name}': {spec} has no width")
            width *= size
        free = self._free.get(width)
        register = free.pop() if free else torch.empty(self._max_tokens, width)
        if register.data_ptr() not in self._users:
            self.kept.append(register)
        return self._hold(node.tensors[index], _Value(register, width))

    def _hold(self, tensor: str, value: _Value) -> _Value:
        self.values[tensor] = value
        key = value.register.data_ptr()
        self._users[key] = self._users.get(key, 0) + self._readers[tensor]
        return value

    def _release(self, tensor: str) -> None:
        if tensor in self.values:
            register = self.values[tensor].register
            self._users[register.data_ptr()] -= 1
            if self._users[register.data_ptr()] == 0:
                self._free.setdefault(register.shape[1], []).append(register)

    def _value(self, node: Node, index: int, *, whole: bool = True) -> _Value:
        name = node.inputs[index]
        if name not in self.values or (whole and not self.values[name].whole):
            raise Unsupported(f"{node.op} '{node.name}': input {index} is not a register of its own")
        return self.values[name]

    def _weight(self, node: Node, index: int) -> torch.Tensor | None:
        name = node.inputs[index] if index < len(node.inputs) else None
        if name is None:
            return None
        if name not in self._weights:
            raise Unsupported(f"{node.op} '{node.name}': input {index} is not a weight")
        return self._weights[name]

    def _matrix(self, node: Node, index: int) -> tuple[int, int]:
        """Pointer and type of a weight that is read as it is."""
        weight = self._weight(node, index)
        assert weight is not None
        kind = cpu_step.WEIGHT_TYPES.get(from_torch(weight.dtype).value)
        if kind is None or not weight.is_contiguous():
            raise Unsupported(f"{node.op} '{node.name}': weight of {weight.dtype}")
        return weight.data_ptr(), kind

    def _vector(self, node: Node, index: int) -> int | None:
        """Pointer of a weight in float32, kept for as long as the program."""
        weight = self._weight(node, index)
        if weight is None:
            return None
        wide = weight.float().contiguous()
        self.kept.append(wide)
        return wide.data_ptr()

    def _emit(self, op: Op, **fields: Any) -> None:
        self.instructions.append(Instruction(op=op, **fields))

    # ---- ops

    def _view(self, node: Node) -> None:
        if not node.outputs[0].dtype.is_float:
            raise Unsupported(f"{node.op} '{node.name}': to {node.outputs[0].dtype}")
        self._hold(node.name, self._value(node, 0, whole=False))

    def _split(self, node: Node) -> None:
        whole, first = self._value(node, 0), 0
        if node.attrs["axis"] not in (1, -1):
            raise Unsupported(f"split '{node.name}': by rows")
        for tensor, width in zip(node.tensors, node.attrs["sizes"], strict=True):
            self._hold(tensor, replace(whole, width=width, first=first))
            first += width

    def _embedding(self, node: Node) -> None:
        sources = [self._graph.producers[name] for name in (node.inputs[0], *node.inputs[2:3]) if name]
        names = [source.name for source in sources]
        if (
            node.attrs.get("masked")
            or names not in (["token_ids"], ["positions"], ["token_ids", "positions"])
        ):  # fmt: skip
            raise Unsupported(f"embedding '{node.name}': of {names}, masked or not")
        table, kind = self._matrix(node, 1)
        positions = self._matrix(node, 3)[0] if len(names) == 2 else None
        out = self._new(node)
        self._emit(
            Op.EMBEDDING, kind=int(names[0] == "positions"), wtype=kind, n=out.width, w=table, residual=positions,
            offset=node.attrs["offset"], offset2=node.attrs.get("position_offset", 0), y=out.pointer,
        )  # fmt: skip

    def _linear(self, node: Node) -> None:
        x = self._value(node, 0, whole=False)
        weight, kind = self._matrix(node, 1)
        activation = node.attrs.get("activation")
        if activation not in cpu_step.ACTIVATION_KINDS or "norm" in node.attrs:
            raise Unsupported(f"linear '{node.name}': {dict(node.attrs)}")
        residual = self._value(node, 3).pointer if len(node.inputs) > 3 and node.inputs[3] else None
        out = self._new(node)
        self._emit(
            Op.LINEAR, kind=cpu_step.ACTIVATION_KINDS[activation], wtype=kind, n=out.width, k=x.width, ldx=x.stride,
            x=x.pointer, w=weight, bias=self._vector(node, 2), residual=residual, y=out.pointer,
        )  # fmt: skip

    def _quantized_linear(self, node: Node) -> None:
        """int8 rows with one scale each."""
        x = self._value(node, 0, whole=False)
        rows, scale, zero = (self._weight(node, i) for i in (1, 2, 3))
        activation = node.attrs.get("activation")
        assert rows is not None and scale is not None
        if rows.dtype is not torch.int8 or scale.dim() != 1 or zero is not None or not rows.is_contiguous():
            raise Unsupported(f"quantized_linear '{node.name}': {rows.dtype}, scales {list(scale.shape)}")
        if activation not in cpu_step.ACTIVATION_KINDS or node.attrs.keys() - {"activation"}:
            raise Unsupported(f"quantized_linear '{node.name}': {dict(node.attrs)}")
        residual = self._value(node, 5).pointer if len(node.inputs) > 5 and node.inputs[5] else None
        out = self._new(node)
        self._emit(
            Op.LINEAR, kind=cpu_step.ACTIVATION_KINDS[activation], wtype=cpu_step.WEIGHT_TYPES["int8"], n=out.width,
            k=x.width, ldx=x.stride, x=x.pointer, w=rows.data_ptr(), scale=self._vector(node, 2),
            bias=self._vector(node, 4), residual=residual, y=out.pointer,
        )  # fmt: skip

    def _norm(self, node: Node, kind: str, *, add: bool) -> None:
        x = self._value(node, 0)
        residual = self._value(node, 1) if add else None
        total = self._new(node, 0) if add else None
        out = self._new(node, int(add))
        self._emit(
            Op.NORM, kind=cpu_step.NORM_KINDS[kind], n=x.width, number=node.attrs["eps"], x=x.pointer,
            residual=residual.pointer if residual else None, scale=self._vector(node, 1 + add),
            bias=self._vector(node, 2 + add), y=out.pointer, y2=total.pointer if total else None,
        )  # fmt: skip

    def _layer_norm(self, node: Node) -> None:
        self._norm(node, "layer_norm", add=False)

    def _rms_norm(self, node: Node) -> None:
        self._norm(node, "rms_norm", add=False)

    def _add_layer_norm(self, node: Node) -> None:
        self._norm(node, "layer_norm", add=True)

    def _add_rms_norm(self, node: Node) -> None:
        self._norm(node, "rms_norm", add=True)

    def _attention(self, node: Node) -> None:
        q, k, v = (self._value(node, i, whole=False) for i in range(3))
        keys, values = self._cache[node.attrs["layer"]]
        kind = cpu_step.WEIGHT_TYPES.get(from_torch(keys.dtype).value)
        if keys.dtype is torch.int8 or kind is None or not keys.is_contiguous():
            raise Unsupported(f"attention '{node.name}': a cache of {keys.dtype}")
        _, heads, dim = node.outputs[0].shape
        if not isinstance(dim, int) or dim > cpu_step.MAX_HEAD_DIM:
            raise Unsupported(f"attention '{node.name}': head_dim {dim}")
        out = self._new(node)
        self._emit(
            Op.ATTENTION, wtype=kind, n=heads, k=keys.shape[2], ldx=q.stride, ld2=k.stride, ld3=v.stride,
            dim=dim, number=node.attrs["scale"], x=q.pointer, w=k.pointer, bias=v.pointer, scale=keys.data_ptr(),
            residual=values.data_ptr(), y=out.pointer,
        )  # fmt: skip

    def _activation(self, node: Node) -> None:
        x = self._value(node, 0, whole=False)
        kind = cpu_step.ACTIVATION_KINDS.get(node.attrs["kind"])
        if kind is None:
            raise Unsupported(f"activation '{node.name}': {node.attrs['kind']}")
        out = self._new(node)
        self._emit(Op.ACTIVATION, kind=kind, n=x.width, ldx=x.stride, x=x.pointer, y=out.pointer)

    def _rotary(self, node: Node) -> None:
        x = self._value(node, 0, whole=False)
        if node.inputs[1] != "positions":
            raise Unsupported(f"rotary '{node.name}': by {node.inputs[1]}")
        dim = node.outputs[0].shape[-1]
        assert isinstance(dim, int)
        half = dim // 2
        frequencies = node.attrs["theta"] ** (-torch.arange(half, dtype=torch.float32) / half)
        self.kept.append(frequencies)
        out = self._new(node)
        self._emit(
            Op.ROTARY, n=out.width, dim=dim, ldx=x.stride, x=x.pointer, w=frequencies.data_ptr(), y=out.pointer
        )  # fmt: skip

    def _mul(self, node: Node) -> None:
        self._binary(node, Op.MULTIPLY)

    def _add(self, node: Node) -> None:
        self._binary(node, Op.ADD)

    def _binary(self, node: Node, op: Op) -> None:
        x, w = (self._value(node, i, whole=False) for i in range(2))
        out = self._new(node)
        self._emit(op, n=x.width, ldx=x.stride, ld2=w.stride, x=x.pointer, w=w.pointer, y=out.pointer)
