"""Building blocks that families compose their graphs from.

A block takes the builder, the tensors it works on and the name it gives its nodes; the weights it uses are called
`<name>.weight` and `<name>.bias`, and whether there is a bias (or a norm has weights at all) is said by the family's
weight table alone.
"""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt

from .dtypes import DType
from .graph import GraphBuilder

Norm = Callable[[GraphBuilder, str, str], str]
"""`(g, x, name) -> normalized x`."""
Block = Callable[[GraphBuilder, str, str], str]
"""`(g, x, name) -> output`, of the shape of x."""


def embedding(g: GraphBuilder, ids: str, name: str, *, offset: int = 0) -> str:
    """Rows `ids + offset` of table `<name>.weight`: [T] -> [T, features]."""
    return g.add("embedding", ids, g.weight(f"{name}.weight"), name=name, offset=offset)


def linear(g: GraphBuilder, x: str, name: str) -> str:
    """x weight^T + bias, with weight [out, in] and a bias if the table has one."""
    return g.add("linear", x, g.weight(f"{name}.weight"), g.optional_weight(f"{name}.bias"), name=name)


def layer_norm(g: GraphBuilder, x: str, name: str, *, eps: float = 1e-5) -> str:
    """Layer norm over the last axis, affine if the table has its weights."""
    weights = (g.optional_weight(f"{name}.weight"), g.optional_weight(f"{name}.bias"))
    return g.add("layer_norm", x, *weights, name=name, eps=eps)


def rms_norm(g: GraphBuilder, x: str, name: str, *, eps: float = 1e-6) -> str:
    """RMS norm over the last axis."""
    return g.add("rms_norm", x, g.optional_weight(f"{name}.weight"), name=name, eps=eps)


def self_attention(
    g: GraphBuilder,
    x: str,
    name: str,
    *,
    layer: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    scale: float | None = None,
    rotary_theta: float | None = None,
    on_heads: Block | None = None,
) -> str:
    """Causal self-attention with projections `q`, `k`, `v`, `out` under `name`.

    x: [T, hidden]; returns [T, hidden]. `layer` is the slot of the KV cache; `scale` defaults to 1/sqrt(head_dim);
    with `rotary_theta`, q and k are rotated by their positions. `on_heads` is asked for what q and k, [T, heads, head_dim],
    become before that: a norm, a rotation of its own; it gets the names `q_heads` and `k_heads`.
    """
    with g.scope(name):
        q, k, v = (
            g.add("reshape", linear(g, x, part), name=f"{part}.heads", shape=("T", heads, head_dim))
            for part, heads in (("q", num_heads), ("k", num_kv_heads), ("v", num_kv_heads))
        )
        if on_heads is not None:
            q, k = (on_heads(g, t, f"{part}_heads") for part, t in (("q", q), ("k", k)))
        if rotary_theta is not None:
            q, k = (
                g.add("rotary", t, "positions", name=f"{part}.rotary", theta=rotary_theta)
                for part, t in (("q", q), ("k", k))
            )
        context = g.add(
            "attention", q, k, v, "query_start", "kv_length", "page_table",
            name="attention", layer=layer, scale=1 / sqrt(head_dim) if scale is None else scale,
        )  # fmt: skip
        flat = g.add("reshape", context, name="context", shape=("T", num_heads * head_dim))
        return linear(g, flat, "out")


def mlp(g: GraphBuilder, x: str, name: str, *, activation: str) -> str:
    """linear `fc1`, activation, linear `fc2`."""
    with g.scope(name):
        hidden = g.add("activation", linear(g, x, "fc1"), name="activation", kind=activation)
        return linear(g, hidden, "fc2")


def gated_mlp(g: GraphBuilder, x: str, name: str, *, activation: str = "silu") -> str:
    """down(activation(gate(x)) * up(x)). Source: arXiv:2002.05202."""
    with g.scope(name):
        gate = g.add("activation", linear(g, x, "gate"), name="activation", kind=activation)
        return linear(g, g.add("mul", gate, linear(g, x, "up"), name="gated"), "down")


def residual(g: GraphBuilder, x: str, name: str, block: Block, norm: Norm, *, pre_norm: bool) -> str:
    """x + block(norm(x)) when `pre_norm`, else norm(x + block(x)). The norm's weights are `<name>_norm`."""
    if pre_norm:
        return g.add("add", x, block(g, norm(g, x, f"{name}_norm"), name), name=f"{name}_residual")
    return norm(g, g.add("add", x, block(g, x, name), name=f"{name}_residual"), f"{name}_norm")


def lm_head(g: GraphBuilder, x: str, name: str = "lm_head") -> str:
    """Logits, float32, of the rows that the step asks for: [T, hidden] -> [R, vocab_size]."""
    rows = g.add("select_rows", x, "logits_index", name=f"{name}.rows")
    return g.add("cast", linear(g, rows, name), name="logits", dtype=DType.FLOAT32.value)
