"""Attention as matrix products and a softmax, for what TensorRT's Attention layer has no word for.

The layer does not say in which type it sums. Here casts in the network say it: with `float32`, q, k and v are cast to
float32 before the products, and nothing is rounded to 16 bits between them. Without, products and softmax are of the
model's type, and the network holds no Attention layer; TensorRT may still fuse what it recognizes.
"""

from __future__ import annotations

import torch

from ...dtypes import DType, to_torch
from .attention import Attend, PaddedBatch
from .network import ITensor, Network


def layered_attention(*, float32: bool) -> Attend:
    """softmax(q k^T) v over the columns up to each row's position."""

    def attend(
        network: Network, batch: PaddedBatch, q: ITensor, k: ITensor, v: ITensor, dtype: DType, name: str
    ) -> ITensor:
        wide = DType.FLOAT32 if float32 else dtype
        if wide != dtype:
            q, k, v = (
                network.cast(x, wide, f"{name}/{part}.float32") for part, x in (("q", q), ("k", k), ("v", v))
            )
        kv_heads, capacity, head_dim = tuple(k.shape)[1:]
        group = q.shape[1] // kv_heads
        # [B, kv_heads, group, S, head_dim] over [B, kv_heads, 1, capacity, head_dim]
        queries = _split_heads(network, q, kv_heads, group, f"{name}/q.groups")
        keys, values = (
            _split_heads(network, x, kv_heads, 1, f"{name}/{part}.groups") for part, x in (("k", k), ("v", v))
        )
        scores = network.matmul(queries, keys, f"{name}/scores", transpose_b=True)
        columns = network.vector(DType.INT32, tuple(range(capacity)), rank=5)
        later = network.binary("GREATER", columns, batch.position_rows, f"{name}/later")
        hidden = network.constant(
            f"{name}/hidden", torch.full((1, 1, 1, 1, 1), float("-inf"), dtype=to_torch(wide))
        )
        visible = network.output(network.definition.add_select(later, hidden, scores), f"{name}/visible")
        softmax = network.definition.add_softmax(visible)
        softmax.axes = 1 << 4
        weights = network.output(softmax, f"{name}/weights")
        found = network.matmul(weights, values, f"{name}/sums")
        layer = network.definition.add_shuffle(found)
        layer.reshape_dims = (0, kv_heads * group, -1, head_dim)
        if wide == dtype:
            return network.output(layer, name)
        return network.cast(network.output(layer, f"{name}/heads"), dtype, name)

    return attend


def _split_heads(network: Network, x: ITensor, kv_heads: int, group: int, name: str) -> ITensor:
    """[B, kv_heads * group, N, head_dim] -> [B, kv_heads, group, N, head_dim]"""
    return network.reshape(x, (0, kv_heads, group, -1, x.shape[3]), name)
