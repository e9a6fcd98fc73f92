"""Llama (LlamaForCausalLM) for trtc. Source: arXiv:2302.13971 and the Hugging Face implementation."""

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
from trtc.core.weights import WeightRule, WeightTable, linear_rules, norm_rules

ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(ModelConfig):
    """What Llama has beyond every decoder."""

    activation: str
    eps: float
    rope_theta: float
    attention_bias: bool
    mlp_bias: bool


@hookimpl
def trtc_architectures() -> list[str]:
    return ["LlamaForCausalLM"]


@hookimpl
def trtc_model_config(hf_config: Mapping[str, Any], family: str) -> LlamaConfig:
    hf = HFConfigReader(hf_config, family)
    hidden_size, num_heads = hf.positive_int("hidden_size"), hf.positive_int("num_attention_heads")
    return LlamaConfig(
        family=family,
        architecture=hf.architecture(),
        dtype=parse_model_dtype(hf.dtype(default="float16"), "config.json: dtype"),
        vocab_size=hf.positive_int("vocab_size"),
        hidden_size=hidden_size,
        num_layers=hf.positive_int("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=hf.positive_int("num_key_value_heads", default=num_heads),
        head_dim=hf.positive_int("head_dim", default=hidden_size // num_heads),
        ffn_size=hf.positive_int("intermediate_size"),
        max_positions=hf.positive_int("max_position_embeddings", default=2048),
        tie_word_embeddings=hf.boolean("tie_word_embeddings", default=False),
        bos_token_id=hf.token_id("bos_token_id", default=1),
        eos_token_ids=hf.token_ids("eos_token_id", default=(2,)),
        pad_token_id=hf.token_id("pad_token_id"),
        activation=hf.choice("hidden_act", ACTIVATIONS, default="silu"),
        eps=hf.number("rms_norm_eps", default=1e-6),
        rope_theta=_rope_theta(hf_config, family),
        attention_bias=hf.boolean("attention_bias", default=False),
        mlp_bias=hf.boolean("mlp_bias", default=False),
    )


def _rope_theta(hf_config: Mapping[str, Any], family: str) -> float:
    """transformers 5 writes `rope_parameters`; before, there were `rope_theta` and `rope_scaling`."""
    rope = hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, Mapping) else rope
    if kind != "default":
        raise ConfigError(f"config.json: rope_type is {kind!r}; accepted: default (rotary without scaling)")
    fields = HFConfigReader(rope if "rope_theta" in rope else hf_config, family)
    return fields.number("rope_theta", default=10000.0)


@hookimpl
def trtc_weight_table(config: LlamaConfig) -> WeightTable:
    hidden, ffn, vocab = "hidden_size", "ffn_size", ("vocab_size", "hidden_size")
    q, kv = "num_heads*head_dim", "num_kv_heads*head_dim"
    tied = "embed.tokens.weight" if config.tie_word_embeddings else None
    rules = [
        WeightRule("embed_tokens.weight", "embed.tokens.weight", vocab, Shard.EMBEDDING),
        WeightRule("lm_head.weight", "lm_head.weight", vocab, Shard.VOCAB_HEAD, tied_to=tied),
        *norm_rules("norm", "final_norm", bias=False),
        *norm_rules("layers.{i}.input_layernorm", "layers.{i}.attention_norm", bias=False),
        *norm_rules("layers.{i}.post_attention_layernorm", "layers.{i}.mlp_norm", bias=False),
    ]
    for hf, name, shape, shard, bias in (
        ("self_attn.q_proj", "attention.q", (q, hidden), Shard.HEADS, config.attention_bias),
        ("self_attn.k_proj", "attention.k", (kv, hidden), Shard.HEADS, config.attention_bias),
        ("self_attn.v_proj", "attention.v", (kv, hidden), Shard.HEADS, config.attention_bias),
        ("self_attn.o_proj", "attention.out", (hidden, q), Shard.HEADS_ROW, config.attention_bias),
        ("mlp.gate_proj", "mlp.gate", (ffn, hidden), Shard.COLUMN, config.mlp_bias),
        ("mlp.up_proj", "mlp.up", (ffn, hidden), Shard.COLUMN, config.mlp_bias),
        ("mlp.down_proj", "mlp.down", (hidden, ffn), Shard.ROW, config.mlp_bias),
    ):
        rules += linear_rules(f"layers.{{i}}.{hf}", f"layers.{{i}}.{name}", shape, shard, bias=bias)
    # Old checkpoints carry the frequencies of the rotation along.
    return WeightTable(tuple(rules), prefixes=("model.", ""), ignore=("*rotary_emb.inv_freq",))


@hookimpl
def trtc_compose(config: LlamaConfig, g: GraphBuilder) -> str:
    norm = partial(layers.rms_norm, eps=config.eps)
    mlp = partial(layers.gated_mlp, activation=config.activation)
    attention = partial(layers.self_attention, rotary_theta=config.rope_theta, **config.attention_sizes)
    x = layers.embedding(g, "token_ids", "embed.tokens")
    for i in range(config.num_layers):
        with g.scope(f"layers.{i}"):
            x = layers.residual(g, x, "attention", partial(attention, layer=i), norm, pre_norm=True)
            x = layers.residual(g, x, "mlp", mlp, norm, pre_norm=True)
    return layers.lm_head(g, norm(g, x, "final_norm"))
