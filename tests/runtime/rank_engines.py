"""Engines of several ranks for target cpu, of OPT and of the packages in examples/."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from trtc.core.hf import HFCheckpoint
from trtc.core.plugin_registry import PluginRegistry
from trtc.tests.opt_models import OptCheckpoint

SCRIPT = Path(__file__).with_name("ranks_script.py")


class Case(NamedTuple):
    """An engine of several ranks. dim: embedding_sharding_dim of a parallel embedding, or None."""

    variant: str
    tp_size: int = 1
    pp_size: int = 1
    dim: int | None = None


LLAMA = {
    "vocab_size": 101,
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 10,
    "num_hidden_layers": 2,
    "intermediate_size": 61,
    "max_position_embeddings": 128,
}
PACKAGES: Mapping[str, Mapping[str, Any]] = {
    "gpt2": {"vocab_size": 101, "n_embd": 48, "n_head": 4, "n_layer": 2, "n_positions": 128},
    "llama": LLAMA,
    "llama_gelu": {**LLAMA, "hidden_act": "gelu"},
    # Fewer heads of keys and values than ranks; of the one, the seven queries are padded to eight.
    "llama_one_kv_head": {**LLAMA, "hidden_size": 56, "num_attention_heads": 7, "num_key_value_heads": 1},
    "llama_two_kv_heads": {**LLAMA, "num_attention_heads": 8, "num_key_value_heads": 2},
    # Columns that two ranks cut into whole groups of 32.
    "gpt2_groups": {"vocab_size": 101, "n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 128},
    "llama_groups": {
        **LLAMA,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 128,
    },
}

RanksEngine = Callable[[Case], Path]


def package_checkpoint(name: str, folder: Path) -> OptCheckpoint:
    """A tiny random checkpoint of the variant `name` of a family that a package in examples/ brings, opened with it."""
    transformers = pytest.importorskip("transformers")
    fields, name = {**PACKAGES[name], "initializer_range": 0.2}, name.partition("_")[0]
    config, model = {"gpt2": ("GPT2Config", "GPT2LMHeadModel"), "llama": ("LlamaConfig", "LlamaForCausalLM")}[
        name
    ]
    torch.manual_seed(0)
    getattr(transformers, model)(getattr(transformers, config)(**fields)).save_pretrained(folder)
    package = Path(__file__).parents[2] / "examples" / f"trtc-{name}"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(package)
        family = PluginRegistry([EntryPoint(name, f"trtc_{name}", "trtc")]).family(name)
    hf = HFCheckpoint.open(folder)
    return OptCheckpoint(folder, family, family.config(hf.config), hf)
