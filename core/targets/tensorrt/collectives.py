"""What the ranks of tensor parallelism exchange, as layers of the network."""

from __future__ import annotations

from .network import ITensor, Network

ALL_REDUCE, ALL_GATHER = "all_reduce_sum", "all_gather"
"""Metadata of collective layers: the bindings do not tell afterwards what a collective does."""


def collective(network: Network, x: ITensor, kind: str, tp_size: int, name: str) -> ITensor:
    """A collective of the ranks 0..tp_size - 1 of the communicator that the runtime sets."""
    trt = network.trt
    operation, reduction = {
        ALL_REDUCE: (trt.CollectiveOperation.ALL_REDUCE, trt.ReduceOperation.SUM),
        ALL_GATHER: (trt.CollectiveOperation.ALL_GATHER, trt.ReduceOperation.NONE),
    }[kind]
    no_root = -1
    layer = network.definition.add_dist_collective(x, operation, reduction, no_root, list(range(tp_size)))
    layer.num_ranks, layer.metadata = tp_size, kind
    return network.output(layer, name)
