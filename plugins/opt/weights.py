"""OPT's weight-mapping table."""

from __future__ import annotations

from ...core.sharding import Shard
from ...core.weights import WeightRule, WeightTable
from .config import POSITION_OFFSET, OptConfig

PREFIXES = ("model.decoder.", "decoder.", "model.", "")
"""What stands before the names: OPTForCausalLM, OPTModel, and exports that dropped either part."""


def weight_table(config: OptConfig) -> WeightTable:
    """The rows for `config`: variants without biases, affine norms, projections or final norm have fewer."""
    return WeightTable(
        rules=(*_ends(config), *_layers(config)),
        prefixes=PREFIXES,
        ignore=("*.attn.masked_bias", "version", "embed_positions._float_tensor"),
    )


def _ends(config: OptConfig) -> list[WeightRule]:
    positions = f"max_positions+{POSITION_OFFSET}"
    rules = [
        WeightRule(
            "embed_tokens.weight", "embed.tokens.weight", ("vocab_size", "embed_size"), Shard.EMBEDDING
        ),
        WeightRule("embed_positions.weight", "embed.positions.weight", (positions, "hidden_size")),
        WeightRule(
            "lm_head.weight",
            "lm_head.weight",
            ("vocab_size", "embed_size"),
            Shard.VOCAB_HEAD,
            tied_to="embed.tokens.weight" if config.tie_word_embeddings else None,
        ),
    ]
    if config.projected:
        rules += [
            WeightRule("project_in.weight", "embed.project_in.weight", ("hidden_size", "embed_size")),
            WeightRule("project_out.weight", "project_out.weight", ("embed_size", "hidden_size")),
        ]
    if config.final_norm:
        # Some early exports call the final norm `layer_norm`.
        rules += _norm(config, ("final_layer_norm", "layer_norm"), "final_norm")
    return rules


def _layers(config: OptConfig) -> list[WeightRule]:
    hf, own = "layers.{i}", "layers.{i}"
    rules = []
    for part in ("q", "k", "v"):
        rules += _linear(config, f"{hf}.self_attn.{part}_proj", f"{own}.attention.{part}", "hidden_size", "hidden_size",
                         Shard.HEADS)  # fmt: skip
    rules += _linear(
        config,
        f"{hf}.self_attn.out_proj",
        f"{own}.attention.out",
        "hidden_size",
        "hidden_size",
        Shard.HEADS_ROW,
    )
    rules += _norm(config, (f"{hf}.self_attn_layer_norm",), f"{own}.attention_norm")
    rules += _linear(config, f"{hf}.fc1", f"{own}.mlp.fc1", "ffn_size", "hidden_size", Shard.COLUMN)
    rules += _linear(config, f"{hf}.fc2", f"{own}.mlp.fc2", "hidden_size", "ffn_size", Shard.ROW)
    return rules + _norm(config, (f"{hf}.final_layer_norm",), f"{own}.mlp_norm")


def _linear(config: OptConfig, hf: str, own: str, rows: str, columns: str, shard: Shard) -> list[WeightRule]:
    weight = WeightRule(f"{hf}.weight", f"{own}.weight", (rows, columns), shard, quantizable=True)
    return (
        [weight, WeightRule(f"{hf}.bias", f"{own}.bias", (rows,), shard.of_bias)] if config.bias else [weight]
    )


def _norm(config: OptConfig, hf: tuple[str, ...], own: str) -> list[WeightRule]:
    if not config.affine:
        return []
    return [
        WeightRule(tuple(f"{name}.{part}" for name in hf), f"{own}.{part}", ("hidden_size",))
        for part in ("weight", "bias")
    ]
