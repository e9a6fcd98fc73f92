"""Attention by TensorRT's own layers, and the padded boundary that they want.

The network is the graph with T = B * S: the runtime pads the new tokens of the B sequences of a step to S each, and
everything outside of attention works on the packed [T, ...] tensors of the graph, unchanged. TensorRT's attention
kernels exist for padded [B, heads, S, head_dim] tensors only (the packed form builds no plan), so `attention` unpacks
q, k and v, and packs its result again. Inputs of the network, all int32:

    token_ids     [B, S]  new tokens, each sequence's from the left; the rest of a row is any valid id, 0 say
    positions     [B, S]  their positions; the rest 0
    past_length   [B]     tokens of the sequence in the cache before this step
    logits_index  [R]     rows of the flattened [B * S] tokens whose logits are wanted
    k_cache.{i}, v_cache.{i}  [B, kv_heads, capacity, head_dim]  the cache of layer i, of the model's dtype

Its outputs are, in the memory of the caches, k_cache.{i}.updated and v_cache.{i}.updated, and, the last one, the logits
[R, V] under the name of the graph's output.

The graph's `query_start`, `kv_length` and `page_table` have no place here: TensorRT's cache is linear, one block of
`capacity` tokens a sequence.

Padding is on the right. Every row of a sequence, the padding's too, is written at past_length and after it, so the
keys span past_length + S tokens, and a lower-right aligned causal mask lets row i see columns j <= past_length + i:
exactly the past and the tokens up to its own. What padding rows write is seen by padding rows only, and overwritten by
the next step. (With padding on the left some rows would see nothing, and softmax makes them NaN.) The runtime must
keep past_length + S <= capacity in every sequence, and give cache memory that holds finite numbers: masked values are
multiplied by zero, not skipped.

Sources: https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/transformers-fused-attention.html and
.../transformers-kv-cache.html. That the mask ends at key_value_lengths is how the code reads that the builder generates
for the decomposed form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from ...dtypes import DType
from ...graph import Node
from .network import ITensor, Network

PAST_LENGTH = "past_length"


@dataclass(frozen=True)
class CacheNames:
    """Names of the network's inputs and outputs for the cache of one attention layer."""

    key: str
    value: str
    updated_key: str
    updated_value: str

    @classmethod
    def of_layer(cls, layer: int) -> CacheNames:
        key, value = f"k_cache.{layer}", f"v_cache.{layer}"
        return cls(key, value, f"{key}.updated", f"{value}.updated")


class PaddedBatch:
    """The sizes B and S of a step, and the conversions between packed [T, ...] and padded [B, ...] tensors."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._token_ids = network.input("token_ids", DType.INT32, (-1, -1))
        self._padded_shapes: dict[tuple[int, int], ITensor] = {}

    @property
    def inputs(self) -> Mapping[str, Callable[[], ITensor]]:
        """The graph's inputs that this network has, made when something reads them."""
        return {
            "token_ids": lambda: self._network.reshape(self._token_ids, (-1,), "token_ids/packed"),
            "positions": lambda: self._network.reshape(self._positions, (-1,), "positions/packed"),
            "logits_index": lambda: self._network.input("logits_index", DType.INT32, (-1,)),
        }

    @cached_property
    def _positions(self) -> ITensor:
        return self._network.input("positions", DType.INT32, (-1, -1))

    @cached_property
    def past_length(self) -> ITensor:
        """[B]"""
        return self._network.input(PAST_LENGTH, DType.INT32, (-1,))

    @cached_property
    def _shape(self) -> ITensor:
        """int64 [B, S] as a tensor of two numbers."""
        return self._network.output(self._network.definition.add_shape(self._token_ids), "batch.shape")

    @cached_property
    def span(self) -> ITensor:
        """[B]: tokens in the cache when this step's rows, padding included, are written."""
        size = self._network.slice(self._shape, 0, 1, 1, "batch.padded_length")
        size = self._network.cast(size, DType.INT32, "batch.padded_length.int32")
        return self._network.binary("SUM", self.past_length, size, "batch.span")

    @cached_property
    def position_rows(self) -> ITensor:
        """[B, 1, 1, S, 1]: positions beside the rows of scores [B, kv_heads, group, S, capacity]."""
        one = self._network.vector(DType.INT64, (1,))
        rows, length = (self._network.slice(self._shape, 0, i, 1, f"batch.size{i}") for i in range(2))
        layer = self._network.definition.add_shuffle(self._positions)
        layer.set_input(1, self._network.concat((rows, one, one, length, one), 0, "batch.position_shape"))
        return self._network.output(layer, "positions/rows")

    def unpack(self, x: ITensor, heads: int, head_dim: int, name: str) -> ITensor:
        """[T, heads, head_dim] -> [B, heads, S, head_dim]"""
        if (heads, head_dim) not in self._padded_shapes:
            tail = self._network.vector(DType.INT64, (heads, head_dim))
            shape = self._network.concat((self._shape, tail), 0, f"batch.shape.{heads}x{head_dim}")
            self._padded_shapes[heads, head_dim] = shape
        layer = self._network.definition.add_shuffle(x)
        layer.set_input(1, self._padded_shapes[heads, head_dim])
        layer.second_transpose = self._network.trt.Permutation([0, 2, 1, 3])
        return self._network.output(layer, name)

    def pack(self, x: ITensor, heads: int, head_dim: int, name: str) -> ITensor:
        """[B, heads, S, head_dim] -> [T, heads, head_dim]"""
        layer = self._network.definition.add_shuffle(x)
        layer.first_transpose = self._network.trt.Permutation([0, 2, 1, 3])
        layer.reshape_dims = (-1, heads, head_dim)
        return self._network.output(layer, name)


Attend = Callable[[Network, PaddedBatch, ITensor, ITensor, ITensor, DType, str], ITensor]
"""`(network, batch, q, k, v, dtype, name)`: scaled q [B, heads, S, head_dim] over caches [B, kv_heads, capacity, head_dim]
that hold the step's own rows -> [B, heads, S, head_dim]."""


def fused_attention(*, only: bool) -> Attend:
    """TensorRT's Attention layer. only: refuse to build rather than compute it in several kernels where none is fused
    (float32 and head sizes that TensorRT has no kernel for)."""

    def attend(
        network: Network, batch: PaddedBatch, q: ITensor, k: ITensor, v: ITensor, dtype: DType, name: str
    ) -> ITensor:
        trt = network.trt
        layer = network.definition.add_attention_v2(
            q, k, v, trt.AttentionNormalizationOp.SOFTMAX, trt.CausalMaskKind.LOWER_RIGHT
        )
        layer.key_value_lengths = batch.span
        layer.decomposable = not only
        return network.output(layer, name)

    return attend


FUSED_OR_NOT = fused_attention(only=False)
"""One kernel where TensorRT has one, several elsewhere."""


@dataclass(frozen=True)
class NativeAttention:
    """Lowers `attention` nodes to KVCacheUpdate layers and what attends over the whole caches.

    capacity: tokens of one sequence that the cache holds.
    attend: how; see `fused_attention` and `layered_attention.py`.
    """

    network: Network
    batch: PaddedBatch
    capacity: int
    attend: Attend

    def lower(self, node: Node, q: ITensor, k: ITensor, v: ITensor, dtype: DType) -> ITensor:
        """q [T, heads, head_dim], k, v [T, kv_heads, head_dim] of `dtype` -> [T, heads, head_dim]"""
        name = node.name
        (_, heads, head_dim), kv_heads = q.shape, k.shape[1]
        names = CacheNames.of_layer(node.attrs["layer"])
        query = self.batch.unpack(
            self._scaled(q, node.attrs["scale"], dtype, name), heads, head_dim, f"{name}/q.padded"
        )
        keys = self._append(k, names.key, names.updated_key, kv_heads, head_dim, dtype, f"{name}/k")
        values = self._append(v, names.value, names.updated_value, kv_heads, head_dim, dtype, f"{name}/v")
        padded = self.attend(self.network, self.batch, query, keys, values, dtype, f"{name}/padded")
        return self.batch.pack(padded, heads, head_dim, name)

    def _append(
        self, x: ITensor, cache: str, updated: str, heads: int, head_dim: int, dtype: DType, name: str
    ) -> ITensor:
        """The whole cache, once `x` is written into it. TensorRT wants it as an output of the network."""
        before = self.network.input(cache, dtype, (-1, heads, self.capacity, head_dim))
        rows = self.batch.unpack(x, heads, head_dim, f"{name}.padded")
        layer = self.network.definition.add_kv_cache_update(
            before, rows, self.batch.past_length, self.network.trt.KVCacheMode.LINEAR
        )
        after = self.network.output(layer, updated)
        self.network.mark_output(after)
        return after

    def _scaled(self, q: ITensor, scale: float, dtype: DType, name: str) -> ITensor:
        """`scale` q, rounded once: TensorRT's attention has no scale, and a scale rounded to 16 bits is a wrong one."""
        factor = self.network.vector(DType.FLOAT32, (scale,), rank=3)
        if dtype == DType.FLOAT32:
            return self.network.binary("PROD", q, factor, f"{name}/q.scaled")
        wide = self.network.cast(q, DType.FLOAT32, f"{name}/q.float32")
        product = self.network.binary("PROD", wide, factor, f"{name}/q.scaled.float32")
        return self.network.cast(product, dtype, f"{name}/q.scaled")
