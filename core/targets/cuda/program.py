"""Runs a graph on a GPU with the project's kernels; its steps can be captured in CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch

from ....kernels.append_kv import AppendKv
from ....kernels.context_attention import ContextAttention
from ....kernels.embedding import Embedding, Positions
from ....kernels.layer_norm import LayerNorm
from ....kernels.library import KernelLibrary
from ....kernels.linear import Linear, Norm, outruns_cublas, weight_sums
from ....kernels.linear.quantized import Dequantize, QuantizedLinear, for_kernels
from ....kernels.paged_decode_attention import DecodePlan, PagedDecodeAttention
from ...graph import Graph, Node
from ...ops import ReferenceContext, get_op
from ...ops.registry import Communicator
from ...passes.fuse import PRODUCTS
from ...passes.rewrite import remove_dead
from ..program import Kernel, KernelFactory, Program
from .cublaslt import CublasLt
from .large_products import QuantizedProducts, large_linear
from .sums import Sums
from .variants import decode_graph, prefill_graph, rank_graph

Pages = tuple[torch.Tensor, torch.Tensor]
"""k and v of one layer, each [num_pages, num_kv_heads, page_size, head_dim], in the model's dtype or float8_e4m3fn."""


@dataclass(frozen=True)
class DecodeRows:
    """The sequences of a step that have one new token; they are its first rows. int32, on the GPU.

    kv_length: [rows], 0 where a row is unused; page_table: [rows, pages].
    row_start: [rows + 1], 0, 1 .. the rows in use, and so on to the end: rows may be tokens of one sequence that follow each
               other, all of which are in the cache before one attends. None: no two rows are of one sequence.
    """

    kv_length: torch.Tensor
    page_table: torch.Tensor
    early: bool
    """Nothing in this CUDA graph, before attention, writes these tensors or pages of earlier tokens."""
    row_start: torch.Tensor | None = None

    @property
    def count(self) -> int:
        return self.kv_length.shape[0]


@dataclass(frozen=True)
class ContextRows:
    """The sequences of a step that have several new tokens; they follow those that decode. int32, on the GPU.

    query_start: [sequences + 1] into these rows; kv_length: [sequences]; page_table: [sequences, pages].
    """

    query_start: torch.Tensor
    kv_length: torch.Tensor
    page_table: torch.Tensor


class CudaProgram:
    """The graph of one rank, on one GPU.

    weights: on the GPU; cache: one pair of page tensors a layer, on the GPU.
    accumulation: of prefill attention: float32, float16, or unfused (torch, one sequence at a time).
    max_kv_length: longest sequence, for which the work of decode attention is divided.
    communicator: between the GPUs of a stage's ranks, on torch's current stream, capturable. Needed where there are several.
    rank: of this GPU among them.
    gives_logits: False for a stage of a pipeline whose output the next one takes, as it is.
    """

    def __init__(
        self,
        graph: Graph,
        weights: Mapping[str, torch.Tensor],
        cache: list[Pages],
        library: KernelLibrary,
        *,
        accumulation: str,
        max_kv_length: int,
        kernels: Mapping[str, KernelFactory] | None = None,
        communicator: Communicator | None = None,
        rank: int = 0,
        gives_logits: bool = True,
    ) -> None:
        self._gives_logits = gives_logits
        self._communicator, self._rank = communicator, rank
        self._graph, self._cache, self._library = graph, cache, library
        self._weights = _quantized_for_kernels(graph, weights)
        self._cublaslt = CublasLt()
        self._large_products = QuantizedProducts(graph, self._weights, library)
        self._accumulation, self._max_kv_length = accumulation, max_kv_length
        self._embedding, self._norm, self._linear = Embedding(library), LayerNorm(library), Linear(library)
        self._quantized_linear, self._dequantize = QuantizedLinear(library), Dequantize(library)
        self._decode_attention, self._context_attention = (
            PagedDecodeAttention(library),
            ContextAttention(library),
        )
        self._append = AppendKv(library)
        self._foreign = kernels or {}
        self._weight_sums: dict[str, torch.Tensor] = {}
        self._decode_rows: DecodeRows | None = None
        self._context_rows: ContextRows | None = None
        self._plans: dict[int, tuple[DecodePlan, torch.Tensor | None]] = {}
        prompts = prefill_graph(graph)
        self._has_foreign_prefill = any(node.op in self._foreign for node in prompts.nodes)
        self._prefill = self._program(prompts, library_products=True, residuals=False)

    def prefill(
        self, inputs: Mapping[str, torch.Tensor], decode: DecodeRows | None, context: ContextRows | None
    ) -> torch.Tensor:
        """A step with prompts in it. inputs: token_ids, positions [T], logits_index [R], and what a stage takes. Returns
        logits [R, vocab], or what the next stage takes."""
        self._decode_rows, self._context_rows = decode, context
        return self._prefill.run(inputs)

    @property
    def prefill_instructions(self) -> int:
        """What the host does one after the other to launch `prefill`."""
        return len(self._prefill)

    @property
    def captures_prefill(self) -> bool:
        """Whether `prefill` can be captured in a CUDA graph, after one run with the same sizes: nothing in it asks the device
        for a length, waits for other ranks, or is a kernel of a plugin, which may do anything with prompts."""
        return (
            self._accumulation != "unfused" and self._communicator is None and not self._has_foreign_prefill
        )

    def close(self) -> None:
        """Lets go of what holds on to this program in turn: its memory is free with the last reference to it."""
        self.__dict__.pop("_prefill", None)

    def decoder(self, rows: int) -> Callable[[Mapping[str, torch.Tensor], DecodeRows], torch.Tensor]:
        """What runs a decode step of `rows` tokens: `(inputs token_ids, positions [rows]; rows) -> logits`.

        The logits are those the head computes, before the graph widens them. Capturable in a CUDA graph after one run.
        """
        few, capability = rows <= self._large_products.fused_rows, self._library.capability
        graph = decode_graph(self._graph, rows=rows, capability=capability, fuse_residuals=few)
        if self._gives_logits:
            graph = narrow_logits(graph)
        program = self._program(graph, library_products=False, residuals=few)

        def run(inputs: Mapping[str, torch.Tensor], decode: DecodeRows) -> torch.Tensor:
            self._decode_rows, self._context_rows = decode, None
            return program.run(inputs)

        return run

    def _program(self, graph: Graph, *, library_products: bool, residuals: bool) -> Program:
        """library_products: cuBLASLt for every product. The engine carries linear kernels for decode buckets only.
        residuals: whether products take them in."""
        graph = rank_graph(graph, first=self._rank == 0, residuals=residuals)
        sums = Sums(graph, self._communicator, self._norm)
        kernels: dict[str, KernelFactory] = {
            "embedding": self._embedding_kernel,
            "linear": partial(self._linear_kernel, library_products),
            "quantized_linear": partial(self._quantized_linear_kernel, library_products, graph),
            "layer_norm": partial(self._norm_kernel, "layer"),
            "rms_norm": partial(self._norm_kernel, "rms"),
            "add_layer_norm": partial(self._add_norm_kernel, "layer"),
            "add_rms_norm": partial(self._add_norm_kernel, "rms"),
            "attention": self._attention_kernel,
            "all_reduce": sums.all_reduce,
            "all_reduce_norm": sums.all_reduce_norm,
            **self._foreign,
        }
        return Program(graph, self._weights, kernels, ReferenceContext(communicator=self._communicator))

    # ---- one method an op: node -> what runs it

    def _embedding_kernel(self, node: Node) -> Kernel:
        offset, masked = node.attrs["offset"], node.attrs.get("masked", False)
        position_offset = node.attrs.get("position_offset", 0)

        def run(
            ids: torch.Tensor,
            table: torch.Tensor,
            positions: torch.Tensor | None = None,
            position_table: torch.Tensor | None = None,
        ) -> torch.Tensor:
            out = table.new_empty(ids.shape[0], table.shape[1])
            both = positions is not None and position_table is not None
            fused = Positions(positions, position_table, position_offset) if both else None  # type: ignore[arg-type]
            return self._embedding(ids, table, out=out, offset=offset, masked=masked, positions=fused)

        return run

    def _norm_kernel(self, kind: str, node: Node) -> Kernel:
        epsilon = node.attrs["eps"]

        def run(
            x: torch.Tensor, scale: torch.Tensor | None = None, shift: torch.Tensor | None = None
        ) -> torch.Tensor:
            rows = _rows(x)
            out = torch.empty_like(rows)
            if x.shape[0]:
                self._norm(rows, scale, shift, out=out, kind=kind, epsilon=epsilon)
            return _shaped(out, x)

        return run

    def _add_norm_kernel(self, kind: str, node: Node) -> Kernel:
        epsilon = node.attrs["eps"]

        def run(
            x: torch.Tensor,
            residual: torch.Tensor,
            scale: torch.Tensor | None = None,
            shift: torch.Tensor | None = None,
        ) -> tuple[torch.Tensor, torch.Tensor]:
            rows, added = _rows(x), _rows(residual)
            total, out = torch.empty_like(rows), torch.empty_like(rows)
            if x.shape[0]:
                self._norm(
                    rows, scale, shift, out=out, residual=added, total=total, kind=kind, epsilon=epsilon
                )
            return _shaped(total, x), _shaped(out, x)

        return run

    def _linear_kernel(self, library_products: bool, node: Node) -> Kernel:
        activation = node.attrs.get("activation", "none")
        norm = self._fused_norm(node) if "norm" in node.attrs else None

        def run(
            x: torch.Tensor,
            weight: torch.Tensor,
            bias: torch.Tensor | None = None,
            residual: torch.Tensor | None = None,
        ) -> torch.Tensor:
            if x.shape[0] == 0:  # a step that holds only parts of prompts wants no logits
                return x.new_empty(0, weight.shape[0])
            if library_products or not outruns_cublas(x.shape[0], weight.shape[0]):
                assert norm is None, f"{node.name}: a norm is fused into a product of {x.shape[0]} rows"
                multiply = self._cublaslt.linear if library_products else large_linear
                return multiply(x, weight, bias, residual, activation)
            out = x.new_empty(x.shape[0], weight.shape[0])
            return self._linear(
                x.contiguous(), weight, bias, out=out, residual=residual, activation=activation, norm=norm
            )

        return run

    def _quantized_linear_kernel(self, library_products: bool, graph: Graph, node: Node) -> Kernel:
        activation = node.attrs.get("activation", "none")
        large = self._large_products.kernel(graph, node)
        norm = self._fused_norm(node) if "norm" in node.attrs else None

        def run(
            x: torch.Tensor,
            integers: torch.Tensor,
            scale: torch.Tensor,
            _: torch.Tensor | None = None,
            bias: torch.Tensor | None = None,
            residual: torch.Tensor | None = None,
            norm_scale: torch.Tensor | None = None,
            norm_shift: torch.Tensor | None = None,
        ) -> torch.Tensor:
            rows, features = x.shape[0], integers.shape[0]
            if rows == 0:
                return x.new_empty(0, features)
            if library_products or self._large_products.serves(node, rows):
                assert norm is None, f"{node.name}: a norm is fused into a product of {rows} rows"
                made: torch.Tensor = large(x, integers, scale, bias, residual)
                return made
            return self._quantized_linear(
                x.contiguous(), integers, scale, bias, out=x.new_empty(rows, features), residual=residual,
                activation=activation, norm=norm and replace(norm, scale=norm_scale, shift=norm_shift),
            )  # fmt: skip

        return run

    def _fused_norm(self, node: Node) -> Norm:
        kind, epsilon = node.attrs["norm"], node.attrs["eps"]
        name = node.used[1]
        if len(node.inputs) > PRODUCTS[node.op] + 1:  # with weights of its own, in front of the product
            return Norm(None, kind, epsilon)
        if kind == "layer" and name not in self._weight_sums:
            weight = self._weights[name]
            if node.op == "quantized_linear":
                scale = self._weights[node.used[2]]
                padded = weight.shape[1] * (2 if weight.dtype is torch.uint8 else 1)
                weight = self._dequantize(weight, scale, out=scale.new_empty(len(weight), padded))
            self._weight_sums[name] = weight_sums(weight)
        return Norm(self._weight_sums.get(name), kind, epsilon)

    def _attention_kernel(self, node: Node) -> Kernel:
        layer, scale = node.attrs["layer"], node.attrs["scale"]
        by_token = [(keys.transpose(1, 2), values.transpose(1, 2)) for keys, values in self._cache]
        unfused = partial(get_op("attention").reference, ReferenceContext(by_token), node.attrs)

        def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: torch.Tensor | None) -> torch.Tensor:
            out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
            count = 0
            if self._decode_rows is not None:
                count = self._decode_rows.count
                self._decode(layer, scale, q[:count], k[:count], v[:count], out[:count], self._decode_rows)
            if self._context_rows is not None:
                rows, context = self._context_rows, (q[count:], k[count:], v[count:])
                if self._accumulation == "unfused":
                    out[count:] = unfused(*context, rows.query_start, rows.kv_length, rows.page_table)
                else:
                    self._context(layer, scale, *context, out[count:], rows)
            return out

        return run

    def _decode(
        self,
        layer: int,
        scale: float,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        rows: DecodeRows,
    ) -> None:
        keys, values = self._cache[layer]
        plan, workspace = self._decode_plan(rows.count, q.shape[1])
        if rows.row_start is not None:
            assert not rows.early, "attention would read what is being appended"
            self._append(k, v, keys, values, rows.row_start, rows.kv_length, rows.page_table)
        self._decode_attention(
            q, k, v, keys, values, rows.page_table, rows.kv_length,
            out=out, plan=plan, scale=scale, workspace=workspace, early=rows.early,
        )  # fmt: skip

    def _decode_plan(self, rows: int, num_heads: int) -> tuple[DecodePlan, torch.Tensor | None]:
        if rows not in self._plans:
            keys = self._cache[0][0]
            plan = self._decode_attention.plan(rows, num_heads, keys, self._max_kv_length)
            size = plan.workspace_bytes
            workspace = torch.zeros(size, dtype=torch.uint8, device=keys.device) if size else None
            self._plans[rows] = plan, workspace
        return self._plans[rows]

    def _context(
        self,
        layer: int,
        scale: float,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        rows: ContextRows,
    ) -> None:
        keys, values = self._cache[layer]
        starts = (rows.query_start, rows.kv_length, rows.page_table)
        self._context_attention(
            q, k, v, keys, values, *starts, out=out, scale=scale, accumulation=self._accumulation
        )


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x, where it is [rows, columns] as it lies in memory; heads and parts of a split are copied into one."""
    # Most are, and views of them would take the host a microsecond each.
    return x.contiguous() if x.dim() == 2 else x.reshape(-1, x.shape[-1]).contiguous()


def _shaped(rows: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """What was made of `_rows(x)`, in the shape of x."""
    return rows if x.dim() == 2 else rows.view(x.shape)


def _quantized_for_kernels(graph: Graph, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`weights` with integers as the kernels read them, in place where possible."""
    made = dict(weights)
    products = [node for node in graph.nodes if node.op == "quantized_linear"]
    for integers, scale, zero in {  # a weight may serve several layers
        (node.used[1], node.used[2], node.inputs[3] if len(node.inputs) > 3 else None) for node in products
    }:
        zeros = None if zero is None else made.pop(zero)
        made[integers], made[scale] = for_kernels(weights[integers], weights[scale], zeros)
        if zero is not None:
            made[zero] = made[scale]  # where they lie now; kernels are not told of them on their own
    return made


def narrow_logits(graph: Graph) -> Graph:
    """`graph` without a last cast: sampling kernels read what the head leaves."""
    (name,) = graph.outputs
    node = graph.producers[name]
    if node.op != "cast":
        return graph
    return remove_dead(Graph(graph.nodes, (node.used[0],)))
