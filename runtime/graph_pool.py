"""CUDA graphs that share their memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class GraphPool:
    """Captures the graphs of one GPU: never do two run at a time, and of none is anything but its result wanted afterwards."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._memory: Any = None

    def capture(self, run: Callable[[], torch.Tensor]) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        """A graph of what `run` enqueues, and where its result will be; nothing runs.

        `run` has run before with the same sizes: modules are loaded, launches bound and workspaces allocated by now, which
        capturing must not. Raises torch.OutOfMemoryError where there is too little memory for what it allocates or for itself.
        """
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        # Other threads, NCCL's among them, may call CUDA meanwhile: what they do is not in the graph and does not spoil it.
        try:
            with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
                result = run()
        except torch.AcceleratorError as error:
            if "out of memory" not in str(error):
                raise
            raise torch.OutOfMemoryError(str(error)) from error  # the driver's, for the graph itself
        self._memory = graph.pool()
        self._graphs.append(graph)
        return graph, result

    def close(self) -> None:
        """Frees the graphs: NCCL ends a communicator only when no captured graph uses it any more."""
        torch.cuda.synchronize(self.device)
        for graph in self._graphs:
            graph.reset()
        self._graphs.clear()
