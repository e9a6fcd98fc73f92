"""A graph made ready to run: kernels over numbered registers. What the CPU and CUDA targets share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..graph import Graph, Node
from ..ops import ReferenceContext, get_op

Kernel = Callable[..., Any]
"""Takes an op's input tensors (None where an optional one is absent), returns its output, or a tuple of them."""
KernelFactory = Callable[[Node], Kernel]


@dataclass(frozen=True)
class _Instruction:
    node: str
    kernel: Kernel
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    frees: tuple[int, ...]
    """Registers that nothing reads any more."""
    single: bool


class Program:
    """Runs a graph with a kernel for each node; nodes whose op has none run as their reference implementation."""

    def __init__(
        self,
        graph: Graph,
        weights: Mapping[str, torch.Tensor],
        kernels: Mapping[str, KernelFactory],
        context: ReferenceContext | None = None,
    ) -> None:
        """weights: a tensor for every weight node of `graph`; kernels: factories by op name."""
        context = context or ReferenceContext()
        register = {name: i for i, name in enumerate(graph.specs)}
        self._constants = [
            weights[node.name] if node.op == "weight" else None for node in graph.nodes for _ in node.tensors
        ]
        self._inputs = {node.name: register[node.name] for node in graph.inputs}
        (self._output,) = (register[name] for name in graph.outputs)
        last_use = {name: node.name for node in graph.nodes for name in node.used}
        keep = {*graph.outputs, *(node.name for node in graph.weights)}
        self._instructions = [
            _Instruction(
                node=f"{node.op} '{node.name}'",
                kernel=_kernel(node, kernels, context),
                inputs=tuple(-1 if name is None else register[name] for name in node.inputs),
                outputs=tuple(register[name] for name in node.tensors),
                frees=tuple({register[n] for n in node.used if last_use[n] == node.name and n not in keep}),
                single=len(node.outputs) == 1,
            )
            for node in graph.nodes
            if node.op not in ("input", "weight")
        ]

    def __len__(self) -> int:
        """Instructions of a run: kernels, and views that the host makes."""
        return len(self._instructions)

    @torch.inference_mode()
    def run(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The value of the graph's output. inputs: a tensor for every input node that some node reads."""
        registers: list[Any] = [*self._constants, None]  # the last one stands for absent inputs
        for name, index in self._inputs.items():
            registers[index] = inputs.get(name)
        try:
            for step in self._instructions:
                result = step.kernel(*(registers[i] for i in step.inputs))
                if step.single:
                    registers[step.outputs[0]] = result
                else:
                    for index, tensor in zip(step.outputs, result, strict=True):
                        registers[index] = tensor
                for index in step.frees:
                    registers[index] = None
        except Exception as error:
            error.add_note(f"in {step.node}")
            raise
        output: torch.Tensor = registers[self._output]
        return output


def _kernel(node: Node, kernels: Mapping[str, KernelFactory], context: ReferenceContext) -> Kernel:
    if node.op in kernels:
        return kernels[node.op](node)
    return partial(get_op(node.op).reference, context, node.attrs)
