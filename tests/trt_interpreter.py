"""Executes a TensorRT network definition in torch, layer by layer, from the TensorRT objects themselves.

A test tool: it shows that a lowered network computes what it should on machines where TensorRT can build but not run.
It knows nothing of our Graph, so a wrong lowering cannot hide behind a shared mistake. Every layer is computed in
float64 and rounded to the dtype that TensorRT declares for its output; the shape is compared with the one that TensorRT
inferred. A layer type or an option that is not emulated is an `InterpreterError`. How a layer is computed stands in
trt_layers.py.

KV caches are functional here: a KVCacheUpdate layer's output is a new tensor, which the caller feeds to the next step.
Collectives need all ranks: `run_ranks` steps several networks together.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter
from types import ModuleType
from typing import Any

import torch

from .trt_layers import DTYPES, LAYERS, Inputs, InterpreterError, Tensor


@dataclass(frozen=True)
class Collective:
    """What a rank offers to the others when it reaches a collective layer, and waits for the answer to."""

    layer: str
    kind: str
    tensor: Tensor


class NetworkInterpreter:
    """One network definition, ready to be executed any number of times.

    network: an `INetworkDefinition`; `trt`: the module it is of (tensorrt or tensorrt_rtx).
    Raises InterpreterError, naming layer and type, for a layer type that is not emulated.
    """

    def __init__(self, network: Any, trt: ModuleType) -> None:
        self.trt = trt
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
        if kind not in LAYERS:
            raise InterpreterError(
                f"layer '{layer.name}': type {kind} is not emulated; known: {', '.join(LAYERS)}"
            )
        layer.__class__ = getattr(self.trt, LAYERS[kind][0])
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
                results = [LAYERS[kind][1](self, layer, arguments)]
            for i, result in enumerate(results):
                output = layer.get_output(i)
                values[output.name] = self._declared(layer, output, result)
        return {name: values[name] for name in self.outputs}

    def _checked_input(self, tensor: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        if tensor.name not in inputs:
            raise InterpreterError(f"input '{tensor.name}' is missing")
        value, dtype = inputs[tensor.name], DTYPES[tensor.dtype.name]
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
        return value.to(DTYPES[output.dtype.name])

    @staticmethod
    def torch_dtype(tensor: Any) -> torch.dtype:
        """The torch dtype of an ITensor."""
        return DTYPES[tensor.dtype.name]

    @staticmethod
    def widen(x: Tensor) -> Tensor:
        return x.double() if x.is_floating_point() else x

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
    return torch.frombuffer(bytearray(data), dtype=DTYPES[weights.dtype.name])


def _unpacked(data: bytes) -> Tensor:
    """Four-bit integers in two's complement, two a byte, the first in the low bits."""
    nibbles = [nibble for byte in data for nibble in (byte % 16, byte // 16)]
    return torch.tensor([n - 16 if n > 7 else n for n in nibbles], dtype=torch.int8)
