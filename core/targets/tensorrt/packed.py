"""The network's boundary when a plugin computes attention over pages: the graph's own inputs, as the runtime has them.

    token_ids, positions [T], query_start [B+1], kv_length [B], page_table [B, P], logits_index [R]   int32

The plugin's lowering adds the caches, k_cache.{i} and v_cache.{i} [num_pages, kv_heads, page_size, head_dim].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from ...graph import GRAPH_INPUTS
from .network import ITensor, Network


class PackedBatch:
    """Inputs of a network over packed tokens."""

    def __init__(self, network: Network) -> None:
        self._network = network

    @property
    def inputs(self) -> Mapping[str, Callable[[], ITensor]]:
        """The graph's inputs, made when something reads them."""
        return {name: partial(self._make, name) for name in GRAPH_INPUTS}

    def _make(self, name: str) -> ITensor:
        spec = GRAPH_INPUTS[name]
        return self._network.input(name, spec.dtype, [d if isinstance(d, int) else -1 for d in spec.shape])
