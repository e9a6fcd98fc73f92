"""Sums over the GPUs of a stage: alone, and with the norm that follows."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch

from ....kernels.layer_norm import LayerNorm
from ...graph import Graph, Node
from ...ops.registry import Communicator
from ...passes.rewrite import only_reader
from ..program import Kernel

FRESH = ("linear", "quantized_linear", "embedding")
"""Ops whose kernels give tensors of their own, not views."""


@runtime_checkable
class NormingCommunicator(Communicator, Protocol):
    """A `Communicator` that can also norm what it sums, in one kernel."""

    def norms(self, x: torch.Tensor) -> bool:
        """Whether `all_reduce_norm` is there for `x`, and faster than a sum and a norm. All ranks say the same."""

    def all_reduce_norm(
        self,
        x: torch.Tensor,
        scale: torch.Tensor | None,
        shift: torch.Tensor | None,
        *,
        out: torch.Tensor,
        residual: torch.Tensor | None,
        total: torch.Tensor | None,
        kind: str,
        epsilon: float,
    ) -> None:
        """See `kernels.all_reduce.norm.AllReduceNorm`."""


class Sums:
    """Kernels of `graph` that sum over the ranks. communicator: between them, None where there is one rank."""

    def __init__(self, graph: Graph, communicator: Communicator | None, norm: LayerNorm) -> None:
        self._graph, self._communicator, self._norm = graph, communicator, norm

    def all_reduce(self, node: Node) -> Kernel:
        communicator, overwrite = self._talks(node), self._may_overwrite(node)

        def run(x: torch.Tensor) -> torch.Tensor:
            total: torch.Tensor = communicator.all_reduce(x, overwrite=overwrite)
            return total

        return run

    def all_reduce_norm(self, node: Node) -> Kernel:
        """In one kernel where the communicator has one for these sizes, else in two."""
        communicator, overwrite = self._talks(node), self._may_overwrite(node)
        kind, epsilon = node.attrs["norm"], node.attrs["eps"]
        stream = node.tensors[0]
        wanted = bool(self._graph.users[stream]) or stream in self._graph.outputs

        def run(
            x: torch.Tensor,
            residual: torch.Tensor | None = None,
            scale: torch.Tensor | None = None,
            shift: torch.Tensor | None = None,
        ) -> tuple[torch.Tensor | None, torch.Tensor]:
            out = torch.empty_like(x)
            if isinstance(communicator, NormingCommunicator) and communicator.norms(x):
                total = None
                if wanted:
                    total = x if overwrite else torch.empty_like(x)
                communicator.all_reduce_norm(
                    x, scale, shift, out=out, residual=residual, total=total, kind=kind, epsilon=epsilon
                )
                return total, out
            total = communicator.all_reduce(x, overwrite=overwrite)
            if x.shape[0]:
                self._norm(
                    total, scale, shift, out=out, residual=residual, kind=kind, epsilon=epsilon,
                    total=None if residual is None else total,
                )  # fmt: skip
            return total, out

        return run

    def _talks(self, node: Node) -> Communicator:
        assert self._communicator is not None, f"{node.name}: ranks that cannot talk to each other"
        return self._communicator

    def _may_overwrite(self, node: Node) -> bool:
        summand = node.used[0]
        return self._graph.producers[summand].op in FRESH and only_reader(self._graph, summand)
