"""OPT's layers, composed from the core's building blocks."""

from __future__ import annotations

from functools import partial

from ...core import layers
from ...core.graph import GraphBuilder
from .config import POSITION_OFFSET, OptConfig


def compose(config: OptConfig, g: GraphBuilder) -> str:
    """Packed tokens -> logits; returns the name of the logits tensor."""
    x = layers.embedding(g, "token_ids", "embed.tokens")
    if config.projected:
        x = layers.linear(g, x, "embed.project_in")
    positions = layers.embedding(g, "positions", "embed.positions", offset=POSITION_OFFSET)
    x = g.add("add", x, positions, name="embed")
    for i in range(config.num_layers):
        with g.scope(f"layers.{i}"):
            x = _layer(config, g, x, i)
    if config.final_norm:
        x = layers.layer_norm(g, x, "final_norm")
    if config.projected:
        x = layers.linear(g, x, "project_out")
    return layers.lm_head(g, x)


def _layer(config: OptConfig, g: GraphBuilder, x: str, layer: int) -> str:
    attention = partial(layers.self_attention, layer=layer, **config.attention_sizes)
    mlp = partial(layers.mlp, activation=config.activation)
    x = layers.residual(g, x, "attention", attention, layers.layer_norm, pre_norm=config.pre_norm)
    return layers.residual(g, x, "mlp", mlp, layers.layer_norm, pre_norm=config.pre_norm)
