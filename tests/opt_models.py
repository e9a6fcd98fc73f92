"""Tiny OPT models of transformers with random weights: the oracle of the OPT plugin, in every variant of the family.

Weights are spread widely and biases and norms are random too, so that a wrong lowering of any of them shows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from trtc.core.build import build_engine
from trtc.core.config import BuildConfig, ModelConfig
from trtc.core.dtypes import DType
from trtc.core.hf import HFCheckpoint
from trtc.core.plugin_registry import Family, plugins
from trtc.core.sharding import ShardingOptions
from trtc.core.weight_source import HFWeights

BUILD = BuildConfig(max_batch_size=4, max_input_len=100, max_seq_len=128, max_num_tokens=128, page_size=16)

SIZES: Mapping[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "ffn_dim": 256,
    "max_position_embeddings": 128,
    "word_embed_proj_dim": None,
}

VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "pre_norm": {},
    "post_norm_projected": {"do_layer_norm_before": False, "word_embed_proj_dim": 32},
    "pre_norm_projected": {"word_embed_proj_dim": 24},
    "no_final_norm": {"_remove_final_layer_norm": True},
    "bias_free_non_affine_gelu": {
        "enable_bias": False,
        "layer_norm_elementwise_affine": False,
        "activation_function": "gelu",
    },
    "head_dim_80": {"hidden_size": 160, "num_attention_heads": 2},
    "five_heads": {"hidden_size": 80, "num_attention_heads": 5},
    "ffn_not_4x": {"ffn_dim": 72},
    "untied_head": {"tie_word_embeddings": False},
    "vocabulary_50272": {"vocab_size": 50272, "hidden_size": 32, "num_attention_heads": 2, "ffn_dim": 64},
    "vocabulary_odd": {"vocab_size": 101},
}

CUDA_VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "cuda_pre_norm": {"hidden_size": 256},
    "cuda_post_norm_projected": {
        "hidden_size": 256,
        "do_layer_norm_before": False,
        "word_embed_proj_dim": 128,
    },
    "cuda_bias_free_gelu": {"hidden_size": 256, **VARIANTS["bias_free_non_affine_gelu"]},
    "cuda_head_dim_80_odd_vocabulary": {"hidden_size": 240, "num_attention_heads": 3, "vocab_size": 101},
    "cuda_head_dim_128_untied": {"hidden_size": 256, "num_attention_heads": 2, "tie_word_embeddings": False},
}
"""Variants whose heads have sizes that the CUDA kernels serve."""

LONG_VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "positions_2048": {"hidden_size": 256, "max_position_embeddings": 2048},
}
"""As many positions as OPT has."""

RANK_VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "odd_sizes": {"hidden_size": 75, "num_attention_heads": 5, "ffn_dim": 77, "vocab_size": 101},
    "cuda_odd_sizes": {"hidden_size": 448, "num_attention_heads": 7, "ffn_dim": 350, "vocab_size": 101},
}
"""Variants that no number of ranks divides."""


def hf_config_fields(variant: str) -> dict[str, Any]:
    """The arguments of OPTConfig for `variant`."""
    fields = {**SIZES, **{**VARIANTS, **CUDA_VARIANTS, **LONG_VARIANTS, **RANK_VARIANTS}[variant]}
    if fields["word_embed_proj_dim"] is None:
        fields["word_embed_proj_dim"] = fields["hidden_size"]
    return fields


@cache
def hf_model(variant: str) -> Any:
    """The OPTForCausalLM of `variant`, float32, in evaluation mode. The same weights in every process."""
    from transformers import OPTConfig, OPTForCausalLM

    model: Any = OPTForCausalLM(OPTConfig(**hf_config_fields(variant)))
    model = model.float().eval()
    generator = torch.Generator().manual_seed(20260)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_random(name, parameter.shape, generator))
    return model


def _random(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    values = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        return values * 0.3 + (1 if name.endswith("norm.weight") else 0)
    if "embed_tokens" in name or "lm_head" in name:
        return (
            values * 0.2
        )  # small beside positions and layers, or a tied head would repeat the last token for ever
    if "embed_positions" in name:
        return values * 0.8
    return values * 1.5 / math.sqrt(shape[1])


@cache
def _folder_contents(variant: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    model = hf_model(variant)
    config = {**model.config.to_dict(), "architectures": ["OPTForCausalLM"], "dtype": "float32"}
    state = {name: value.detach() for name, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state, config


def hf_state(variant: str) -> dict[str, torch.Tensor]:
    """The tensors of the checkpoint, a tied head left out, by the names that transformers saves them under."""
    return dict(_folder_contents(variant)[0])


def save_hf(variant: str, folder: Path) -> Path:
    """Writes the checkpoint as transformers does (one safetensors file) and returns `folder`."""
    hf_model(variant).save_pretrained(folder)
    return folder


@torch.no_grad()
def hf_logits(variant: str, token_ids: list[int]) -> torch.Tensor:
    """[tokens, vocab] of one sequence, computed by transformers in float32."""
    logits: torch.Tensor = hf_model(variant)(torch.tensor([token_ids])).logits[0]
    return logits


@dataclasses.dataclass(frozen=True)
class OptCheckpoint:
    """A checkpoint on disk, opened by the plugin that owns it."""

    folder: Path
    family: Family
    config: ModelConfig
    hf: HFCheckpoint

    @classmethod
    def open(cls, folder: Path) -> OptCheckpoint:
        hf = HFCheckpoint.open(folder)
        family = plugins().family_of(hf.config)
        config = dataclasses.replace(family.config(hf.config), dtype=DType.FLOAT32)
        return cls(folder, family, config, hf)

    def weights(self, dtype: DType = DType.FLOAT32, sharding: ShardingOptions | None = None) -> HFWeights:
        table = self.family.weight_table(self.config)
        return HFWeights(self.hf, table, self.config, dtype=dtype, sharding=sharding or ShardingOptions())

    def build(self, output_dir: Path, *, dtype: DType = DType.FLOAT32, **options: Any) -> Path:
        """Builds the engine of this checkpoint and returns its folder. `options`: fields of BuildConfig."""
        model = dataclasses.replace(self.config, dtype=dtype)
        build = dataclasses.replace(BUILD, **options)
        build_engine(self.family, model, self.weights(dtype), build, output_dir, text_files=self.folder)
        return output_dir
