"""GPT-2 (GPT2LMHeadModel) for trtc. Source: Radford et al. 2019 and the Hugging Face implementation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from trtc.core import layers
from trtc.core.config import ModelConfig
from trtc.core.dtypes import parse_model_dtype
from trtc.core.errors import ConfigError
from trtc.core.graph import GraphBuilder
from trtc.core.hf_config import HFConfigReader
from trtc.core.hookspecs import hookimpl
from trtc.core.sharding import Shard
from trtc.core.weights import Chunk, WeightRule, WeightTable, linear_rules, norm_rules

ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
NORMS = {"ln_f": "final_norm", "h.{i}.ln_1": "layers.{i}.attention_norm", "h.{i}.ln_2": "layers.{i}.mlp_norm"}


@dataclass(frozen=True, kw_only=True)
class Gpt2Config(ModelConfig):
    """What GPT-2 has beyond every decoder."""

    activation: str
    eps: float
    scale_attn: bool
    """Scores are divided by sqrt(head_dim) (`scale_attn_weights`)."""
    scale_by_layer: bool
    """Scores of layer i are divided by i + 1 too (`scale_attn_by_inverse_layer_idx`)."""

    def attention_scale(self, layer: int) -> float:
        return (self.head_dim**-0.5 if self.scale_attn else 1.0) / (layer + 1 if self.scale_by_layer else 1)


@hookimpl
def trtc_architectures() -> list[str]:
    return ["GPT2LMHeadModel"]


@hookimpl
def trtc_model_config(hf_config: Mapping[str, Any], family: str) -> Gpt2Config:
    # `reorder_and_upcast_attn` needs no field: scores are always kept in float32, which is what it asks for.
    hf = HFConfigReader(hf_config, family)
    hidden_size, num_heads = hf.positive_int("n_embd"), hf.positive_int("n_head")
    if hidden_size % num_heads:
        raise ConfigError(f"config.json: n_embd {hidden_size} is not a multiple of n_head {num_heads}")
    if hf.boolean("add_cross_attention", default=False):
        raise ConfigError("config.json: field 'add_cross_attention' is True; accepted: false")
    return Gpt2Config(
        family=family,
        architecture=hf.architecture(),
        dtype=parse_model_dtype(hf.dtype(default="float32"), "config.json: dtype"),
        vocab_size=hf.positive_int("vocab_size"),
        hidden_size=hidden_size,
        num_layers=hf.positive_int("n_layer"),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=hidden_size // num_heads,
        ffn_size=hf.positive_int("n_inner", default=4 * hidden_size),
        max_positions=hf.positive_int("n_positions"),
        tie_word_embeddings=hf.boolean("tie_word_embeddings", default=True),
        bos_token_id=hf.token_id("bos_token_id", default=50256),
        eos_token_ids=hf.token_ids("eos_token_id", default=(50256,)),
        pad_token_id=hf.token_id("pad_token_id"),
        activation=hf.choice("activation_function", ACTIVATIONS, default="gelu_new"),
        eps=hf.number("layer_norm_epsilon", default=1e-5),
        scale_attn=hf.boolean("scale_attn_weights", default=True),
        scale_by_layer=hf.boolean("scale_attn_by_inverse_layer_idx", default=False),
    )


@hookimpl
def trtc_weight_table(config: Gpt2Config) -> WeightTable:
    hidden, vocab, square = "hidden_size", ("vocab_size", "hidden_size"), ("hidden_size", "hidden_size")
    tied = "embed.tokens.weight" if config.tie_word_embeddings else None
    rules = [
        WeightRule("wte.weight", "embed.tokens.weight", vocab, Shard.EMBEDDING),
        WeightRule("wpe.weight", "embed.positions.weight", ("max_positions", hidden)),
        WeightRule("lm_head.weight", "lm_head.weight", vocab, Shard.VOCAB_HEAD, tied_to=tied),
    ]
    for source, name in NORMS.items():
        rules += norm_rules(source, name)
    linear = partial(linear_rules, transposed=True)  # a Conv1D keeps its weight as [in, out]
    for index, part in enumerate("qkv"):
        chunk = (Chunk(index, 3),)
        rules += linear(
            "h.{i}.attn.c_attn", f"layers.{{i}}.attention.{part}", square, Shard.HEADS, transform=chunk
        )
    rules += linear("h.{i}.attn.c_proj", "layers.{i}.attention.out", square, Shard.HEADS_ROW)
    rules += linear("h.{i}.mlp.c_fc", "layers.{i}.mlp.fc1", ("ffn_size", hidden), Shard.COLUMN)
    rules += linear("h.{i}.mlp.c_proj", "layers.{i}.mlp.fc2", (hidden, "ffn_size"), Shard.ROW)
    masks = ("h.*.attn.bias", "h.*.attn.masked_bias")  # buffers that old checkpoints carry along
    return WeightTable(tuple(rules), prefixes=("transformer.", ""), ignore=masks)


@hookimpl
def trtc_compose(config: Gpt2Config, g: GraphBuilder) -> str:
    norm = partial(layers.layer_norm, eps=config.eps)
    mlp = partial(layers.mlp, activation=config.activation)
    positions = layers.embedding(g, "positions", "embed.positions")
    x = g.add("add", layers.embedding(g, "token_ids", "embed.tokens"), positions, name="embed")
    for i in range(config.num_layers):
        attention = partial(
            layers.self_attention, layer=i, scale=config.attention_scale(i), **config.attention_sizes
        )
        with g.scope(f"layers.{i}"):
            x = layers.residual(g, x, "attention", attention, norm, pre_norm=True)
            x = layers.residual(g, x, "mlp", mlp, norm, pre_norm=True)
    return layers.lm_head(g, norm(g, x, "final_norm"))
