"""The CPU target: runs a graph with torch, no compiler and no accelerator needed.

Ops run as their reference implementations, except attention, which works on whole batches, linear layers, which oneDNN
computes, and what plugins bring.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..config import KV_CACHE_DTYPES, BuildConfig
from ..dtypes import MODEL_DTYPES, to_torch
from ..errors import ConfigError, TargetError
from ..graph import Graph
from ..ops import ReferenceContext, op_names
from ..ops.registry import Communicator
from ..passes.fuse import ACTIVATION, ADD_NORM, DEQUANTIZE, SIBLINGS
from ..quantize.scheme import KINDS
from .base import CacheShape, Capabilities
from .cpu_attention import CompiledAttention, CpuAttention, KVCache
from .cpu_linear import EPILOGUES, QuantizedLinear, linear_kernel
from .cpu_step import DecodeLimits, DecodeStep, Unsupported
from .program import KernelFactory, Program


class CpuTarget:
    name = "cpu"
    embeds_weights = False

    def capabilities(self, build: BuildConfig) -> Capabilities:
        if build.target_options:
            raise ConfigError(f"target cpu has no options, found: {', '.join(build.target_options)}")
        return Capabilities(
            ops=op_names(),
            fusions=frozenset({SIBLINGS, ACTIVATION, ADD_NORM, DEQUANTIZE}) | EPILOGUES,
            dtypes=frozenset(MODEL_DTYPES),
            tensor_parallel=True,
            pipeline_parallel=True,
            quantized=KINDS,
            kv_cache_dtypes=frozenset(KV_CACHE_DTYPES),
        )

    def check(self, graph: Graph, build: BuildConfig) -> None:
        """Whatever the passes leave runs."""

    def compile(
        self,
        graph: Graph,
        build: BuildConfig,
        directory: Path,
        rank: int,
        weights: Mapping[str, torch.Tensor],
    ) -> Mapping[str, Any]:
        return {}  # the graph in engine.json is the program


TARGET = CpuTarget()


def allocate_cache(shape: CacheShape, num_pages: int) -> KVCache:
    """Per layer, k and v of zeros. The memory is committed by the system as pages are first written.

    Raises TargetError for more than this machine can address.
    """
    size = (num_pages, shape.page_size, shape.num_kv_heads, shape.head_dim)

    def zeros() -> torch.Tensor:
        # numpy allocates zeros lazily; torch writes them. Zeros, because attention reads (and masks) unused slots.
        raw = np.zeros(math.prod(size) * shape.dtype.itemsize, np.uint8)
        return torch.from_numpy(raw).view(to_torch(shape.dtype)).view(size)

    try:
        return [(zeros(), zeros()) for _ in range(shape.layers)]
    except (MemoryError, ValueError):  # numpy's for more than is free, and than it can count
        raise TargetError(
            f"a KV cache of {num_pages} pages ({num_pages * shape.bytes_per_page} bytes) is more than this machine has; "
            f"give it less memory (--kv-cache-memory-bytes), or build for fewer sequences or shorter ones"
        ) from None


class CpuProgram:
    """The graph of one rank over its KV cache."""

    def __init__(
        self,
        graph: Graph,
        weights: Mapping[str, torch.Tensor],
        cache: KVCache,
        *,
        kernels: Mapping[str, KernelFactory] | None = None,
        communicator: Communicator | None = None,
        decode_limits: DecodeLimits | None = None,
    ) -> None:
        """weights: a tensor for every weight node of `graph`, memory-mapped ones included.

        kernels: factories by op name that take precedence over this target's own (from plugins).
        decode_limits: run decode steps within them as one call of compiled code, where graph and machine allow it. With a
            communicator they run node by node: ranks exchange tensors in the middle of a step, or between steps.
        """
        self._attention = (
            CompiledAttention(cache) if CompiledAttention.compiles(cache) else CpuAttention(cache)
        )
        self._quantized, self._limits = QuantizedLinear(), decode_limits
        factories: dict[str, KernelFactory] = {
            "attention": self._attention.kernel,
            "linear": linear_kernel,
            "quantized_linear": self._quantized.kernel,
            **(kernels or {}),
        }
        self._program = Program(graph, weights, factories, ReferenceContext(cache, communicator))
        self._decode: DecodeStep | None = None
        plain = communicator is None and not {node.op for node in graph.nodes} & set(kernels or {})
        if decode_limits is not None and plain:
            with suppress(Unsupported):  # then every step runs node by node
                self._decode = DecodeStep(graph, weights, cache, decode_limits)

    def run(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """One step. inputs: the tensors of `core.graph.GRAPH_INPUTS`, int32. Returns the graph's output, which the next
        step may overwrite."""
        if self._decode is not None and self._decodes(inputs):
            return self._decode.logits(inputs)
        return self._run(inputs)

    @property
    def decodes_greedily(self) -> bool:
        """Whether `next_tokens` of decode steps is compiled code."""
        return self._decode is not None

    def next_tokens(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """A step. Returns [R] int32, one for each of its logits rows: the token with the largest logit, -1 where that is not
        finite. The next step may overwrite it."""
        if self._decode is not None and self._decodes(inputs):
            return self._decode.next_tokens(inputs)
        best, chosen = self._run(inputs).max(-1)
        return chosen.where(best.isfinite(), -1).int()

    def _run(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Node by node."""
        self._attention.begin_step(inputs["query_start"], inputs["kv_length"], inputs["page_table"])
        self._quantized.begin_step(len(inputs["token_ids"]), decoding=self._decodes(inputs))
        return self._program.run(inputs)

    def _decodes(self, inputs: Mapping[str, torch.Tensor]) -> bool:
        return self._limits is not None and self._limits.allow(inputs)
