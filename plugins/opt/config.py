"""OPT's config.json, read once and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...core.config import ModelConfig
from ...core.dtypes import parse_model_dtype
from ...core.errors import ConfigError
from ...core.hf_config import HFConfigReader

POSITION_OFFSET = 2
"""OPT's position table starts with two rows that no position uses: fairseq's padding index plus one."""
ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


@dataclass(frozen=True, kw_only=True)
class OptConfig(ModelConfig):
    """What OPT has beyond every decoder."""

    activation: str
    pre_norm: bool
    """Norms before attention and MLP (`do_layer_norm_before`); false for 350M."""
    final_norm: bool
    """A norm after the last layer. 350M, having its norms after the blocks, has none."""
    embed_size: int
    """Width of the token embedding (`word_embed_proj_dim`); if not hidden_size, projections stand at both ends."""
    bias: bool
    """Linear layers have biases (`enable_bias`)."""
    affine: bool
    """Layer norms have weights and biases (`layer_norm_elementwise_affine`)."""

    @property
    def projected(self) -> bool:
        return self.embed_size != self.hidden_size


def read_config(hf_config: Mapping[str, Any], family: str) -> OptConfig:
    """config.json -> OptConfig. Raises ConfigError naming the field for what is missing or not supported."""
    hf = HFConfigReader(hf_config, family)
    hidden_size, num_heads = hf.positive_int("hidden_size"), hf.positive_int("num_attention_heads")
    if hidden_size % num_heads:
        raise ConfigError(
            f"config.json: hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}"
        )
    pre_norm = hf.boolean("do_layer_norm_before", default=True)
    return OptConfig(
        family=family,
        architecture=hf.architecture(),
        dtype=parse_model_dtype(hf.dtype(default="float16"), "config.json: dtype"),
        vocab_size=hf.positive_int("vocab_size"),
        hidden_size=hidden_size,
        num_layers=hf.positive_int("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=hidden_size // num_heads,
        ffn_size=hf.positive_int("ffn_dim"),
        max_positions=hf.positive_int("max_position_embeddings"),
        tie_word_embeddings=hf.boolean("tie_word_embeddings", default=True),
        bos_token_id=hf.token_id("bos_token_id", default=2),
        eos_token_ids=hf.token_ids("eos_token_id", default=(2,)),
        pad_token_id=hf.token_id("pad_token_id", default=1),
        activation=hf.choice("activation_function", ACTIVATIONS, default="relu"),
        pre_norm=pre_norm,
        final_norm=pre_norm and not hf.boolean("_remove_final_layer_norm", default=False),
        embed_size=hf.positive_int("word_embed_proj_dim", default=hidden_size),
        bias=hf.boolean("enable_bias", default=True),
        affine=hf.boolean("layer_norm_elementwise_affine", default=True),
    )
