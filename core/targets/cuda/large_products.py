"""Products of more rows than the decode kernels are for: cuBLASLt, through torch.

Integer weights are dequantized one after the other into one matrix, unless activations are to be e4m3 numbers as the weights
are, on a GPU whose library multiplies these with a scale for every row of both.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ....kernels.library import KernelLibrary
from ....kernels.linear import MAX_ROWS
from ....kernels.linear.quantized import Dequantize
from ....kernels.quantize_rows import MAX_COLUMNS, QuantizeRows
from ...graph import Graph, Node
from ..program import Kernel
from .code import rounds_rows
from .epilogue import finished

FP8_CAPABILITIES = (90,)
"""GPUs that multiply e4m3 numbers by e4m3 numbers, as far as this has been tried; others dequantize, which is more exact."""
FP8_ROWS = 32
"""More rows than these are multiplied as e4m3 numbers: the four products of 6.7B's layer with 48 rows take 127 us on an H100,
205 us by the decode kernel."""
_MULTIPLE = 16
"""Of which both sizes of a matrix of e4m3 numbers are multiples."""


class QuantizedProducts:
    """The products of a graph with integer weights. weights: as the kernels read them."""

    def __init__(self, graph: Graph, weights: Mapping[str, torch.Tensor], library: KernelLibrary) -> None:
        self._weights = weights
        self._library = library
        self._dequantize, self._quantize_rows = Dequantize(library), QuantizeRows(library)
        self._row_scales: dict[str, torch.Tensor] = {}
        self._scratch = self._room(graph)
        takes_fp8 = any(map(self.takes_fp8, (node for node in graph.nodes if node.op == "quantized_linear")))
        self.fused_rows = FP8_ROWS if takes_fp8 else MAX_ROWS
        """Most rows of a step whose products are decode kernels, which add residuals to what they give."""

    def _room(self, graph: Graph) -> torch.Tensor | None:
        """For the largest weight that is dequantized; None where none is."""
        largest, like = 0, None
        for node in graph.nodes:
            if node.op == "quantized_linear" and not self.takes_fp8(node):
                columns = graph.specs[node.used[0]].shape[-1]
                assert isinstance(columns, int)
                largest = max(largest, len(self._weights[node.used[1]]) * columns)
                like = self._weights[node.used[2]]
        return None if like is None else like.new_empty(largest)

    def takes_fp8(self, node: Node) -> bool:
        """Whether a product takes its rows as e4m3 numbers."""
        if not rounds_rows(node) or self._library.capability not in FP8_CAPABILITIES:
            return False
        features, columns = self._weights[node.used[1]].shape
        return features % _MULTIPLE == 0 and columns % _MULTIPLE == 0 and columns <= MAX_COLUMNS

    def serves(self, node: Node, rows: int) -> bool:
        """Whether `kernel`, and not a decode kernel, is for a step of so many rows."""
        return rows > (FP8_ROWS if self.takes_fp8(node) else MAX_ROWS)

    def kernel(self, graph: Graph, node: Node) -> Kernel:
        """`(x, integers, scale, bias, residual) -> activation(x W^T + bias) + residual` for a quantized_linear of `graph`.

        graph: all of whose products are these; a ReLU that is read only by a product that rounds its rows is left to that.
        """
        activation = "none" if self._leaves_relu(graph, node) else node.attrs.get("activation", "none")
        if self.takes_fp8(node):
            return self._fp8_kernel(graph, node, activation)

        def run(
            x: torch.Tensor,
            integers: torch.Tensor,
            scale: torch.Tensor,
            bias: torch.Tensor | None,
            residual: torch.Tensor | None,
        ) -> torch.Tensor:
            assert self._scratch is not None
            # The next weight is made when this one has been multiplied.
            weight = self._scratch[: integers.shape[0] * x.shape[1]].view(-1, x.shape[1])
            self._dequantize(integers, scale, out=weight)
            return large_linear(x, weight, bias, residual, activation)

        return run

    def _fp8_kernel(self, graph: Graph, node: Node, activation: str) -> Kernel:
        name = node.used[2]
        if name not in self._row_scales:
            self._row_scales[name] = self._weights[name].float()[None, :]
        row_scales = self._row_scales[name]
        relu = self._leaves_relu(graph, graph.producers[node.used[0]])

        def run(
            x: torch.Tensor,
            integers: torch.Tensor,
            _: torch.Tensor,
            bias: torch.Tensor | None,
            residual: torch.Tensor | None,
        ) -> torch.Tensor:
            numbers = torch.empty(len(x), integers.shape[1], dtype=integers.dtype, device=x.device)
            scale = torch.empty(len(x), dtype=torch.float32, device=x.device)
            self._quantize_rows(x.contiguous(), out=numbers, scale=scale, relu=relu)
            # Not with fast sums, which are 1.2 times as fast for a prompt: with them an engine's first step, of few rows,
            # failed on an H200 (CUBLAS_STATUS_NOT_SUPPORTED), while 48 rows and more had worked.
            y: torch.Tensor = torch._scaled_mm(
                numbers, integers.t(), scale[:, None], row_scales, bias=bias, out_dtype=x.dtype
            )
            return finished(y, activation, residual)

        return run

    def _leaves_relu(self, graph: Graph, node: Node) -> bool:
        """Whether `node` is a product whose ReLU is applied where its result is rounded, so that it is no pass of its own."""
        if (
            node.op != "quantized_linear"
            or node.attrs.get("activation") != "relu"
            or not self.takes_fp8(node)
        ):
            return False
        readers = graph.users[node.name]
        return len(readers) == 1 and readers[0].used[0] == node.name and self.takes_fp8(readers[0])


def large_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str,
) -> torch.Tensor:
    """activation(x weight^T + bias) + residual with many rows: cuBLASLt through torch, bias and ReLU in its epilogue.

    For decode steps, and for weights that have been dequantized; float weights in steps with prompts have `cublaslt.py`, which
    has not been tried in these two.
    """
    if bias is None:
        y = x @ weight.t()
    elif activation == "relu":
        y = torch._addmm_activation(bias, x, weight.t())
        activation = "none"
    else:
        y = torch.addmm(bias, x, weight.t())
    return finished(y, activation, residual)
