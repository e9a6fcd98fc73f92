"""OPT's weight-mapping table."""

from __future__ import annotations

from functools import partial

from ...core.sharding import Shard
from ...core.weights import WeightRule, WeightTable, linear_rules, norm_rules
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
    if config.final_norm and config.affine:
        # Some early exports call the final norm `layer_norm`.
        rules += norm_rules(("final_layer_norm", "layer_norm"), "final_norm")
    return rules


def _layers(config: OptConfig) -> list[WeightRule]:
    hidden, ffn, linear = "hidden_size", "ffn_size", partial(linear_rules, bias=config.bias)
    hf = own = "layers.{i}"
    rules = []
    for part in ("q", "k", "v"):
        rules += linear(
            f"{hf}.self_attn.{part}_proj", f"{own}.attention.{part}", (hidden, hidden), Shard.HEADS
        )
    rules += linear(f"{hf}.self_attn.out_proj", f"{own}.attention.out", (hidden, hidden), Shard.HEADS_ROW)
    if config.affine:
        rules += norm_rules(f"{hf}.self_attn_layer_norm", f"{own}.attention_norm")
    rules += linear(f"{hf}.fc1", f"{own}.mlp.fc1", (ffn, hidden), Shard.COLUMN)
    rules += linear(f"{hf}.fc2", f"{own}.mlp.fc2", (hidden, ffn), Shard.ROW)
    if config.affine:
        rules += norm_rules(f"{hf}.final_layer_norm", f"{own}.mlp_norm")
    return rules
