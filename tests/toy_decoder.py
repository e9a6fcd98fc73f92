"""A decoder with what OPT lacks: grouped-query attention, rotary positions, RMS norm and a gated MLP.

Built from `core.layers` by hand, without a plugin, so that tests of the core need no model family.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from trtc.core import layers
from trtc.core.dtypes import DType
from trtc.core.graph import Graph, GraphBuilder
from trtc.core.sharding import Shard
from trtc.core.weights import IDENTITY, ResolvedWeight

VOCAB, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, LAYERS = 61, 48, 6, 2, 10, 40, 2


def weight_rows(**shapes: tuple[int, ...]) -> list[ResolvedWeight]:
    """Rows of a weight table from names and shapes; `__` stands for a dot."""
    return [
        ResolvedWeight(name.replace("__", "."), (), shape, Shard.REPLICATE, IDENTITY)
        for name, shape in shapes.items()
    ]


def _rows() -> list[ResolvedWeight]:
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (VOCAB, HIDDEN), "lm_head.weight": (VOCAB, HIDDEN)}
    for i in range(LAYERS):
        shapes |= {
            f"{i}.attention_norm.weight": (HIDDEN,),
            f"{i}.attention.q.weight": (HEADS * HEAD_DIM, HIDDEN),
            f"{i}.attention.k.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"{i}.attention.v.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"{i}.attention.out.weight": (HIDDEN, HEADS * HEAD_DIM),
            f"{i}.mlp_norm.weight": (HIDDEN,),
            f"{i}.mlp.gate.weight": (FFN, HIDDEN),
            f"{i}.mlp.up.weight": (FFN, HIDDEN),
            f"{i}.mlp.down.weight": (HIDDEN, FFN),
        }
    return weight_rows(**shapes)


def toy_decoder(dtype: DType = DType.FLOAT32) -> Graph:
    """The graph of the toy, before any pass."""
    g = GraphBuilder(dtype, _rows())
    x = layers.embedding(g, "token_ids", "embed")
    attention = partial(
        layers.self_attention, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, rotary_theta=100.0
    )
    for i in range(LAYERS):
        with g.scope(str(i)):
            block = partial(attention, layer=i)
            x = layers.residual(g, x, "attention", block, layers.rms_norm, pre_norm=True)
            mlp = partial(layers.gated_mlp, activation="silu")
            x = layers.residual(g, x, "mlp", mlp, layers.rms_norm, pre_norm=True)
    return g.finish(layers.lm_head(g, x))


def random_weights(graph: Graph) -> dict[str, torch.Tensor]:
    """float64 values for the weights of a graph: matrices that keep the size of what they multiply, vectors near 1."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for node in graph.weights:
        shape: Any = node.outputs[0].shape
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        weights[node.name] = 1 + values / 4 if len(shape) == 1 else values / shape[-1] ** 0.5
    return weights
