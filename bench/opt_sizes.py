"""config.json of every published OPT size, for engines and peers with random weights."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError

SIZES: Mapping[str, Mapping[str, Any]] = {
    "125m": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "ffn_dim": 3072},
    "350m": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "ffn_dim": 4096,
             "word_embed_proj_dim": 512, "do_layer_norm_before": False},
    "1.3b": {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32, "ffn_dim": 8192},
    "2.7b": {"hidden_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 32, "ffn_dim": 10240},
    "6.7b": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "ffn_dim": 16384},
    "13b": {"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40, "ffn_dim": 20480},
    "30b": {"hidden_size": 7168, "num_hidden_layers": 48, "num_attention_heads": 56, "ffn_dim": 28672},
    "66b": {"hidden_size": 9216, "num_hidden_layers": 64, "num_attention_heads": 72, "ffn_dim": 36864},
}  # fmt: skip


def opt_config(size: str) -> dict[str, Any]:
    """The fields of config.json. Raises ConfigError for a size that was never published."""
    if size not in SIZES:
        raise ConfigError(f"OPT size {size!r} is unknown; accepted: {', '.join(SIZES)}")
    fields = dict(SIZES[size])
    return {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "vocab_size": 50272,
        "max_position_embeddings": 2048,
        "word_embed_proj_dim": fields["hidden_size"],
        "do_layer_norm_before": True,
        "activation_function": "relu",
        "tie_word_embeddings": True,
        "bos_token_id": 2,
        "eos_token_id": 2,
        "pad_token_id": 1,
        "dtype": "float16",
        **fields,
    }


def write_config(size: str, folder: Path) -> Path:
    """Makes `folder` with the config.json of `size`, all that `trtc build --dummy-weights` needs."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(opt_config(size), indent=2))
    return folder


@contextmanager
def work_folder(chosen: Path | None) -> Iterator[Path]:
    """Where a benchmark puts its models and engines: `chosen`, whose engines stay for its next run, or a temporary folder."""
    if chosen is not None:
        chosen.mkdir(parents=True, exist_ok=True)
        yield chosen
        return
    with tempfile.TemporaryDirectory(prefix="trtc-") as scratch:
        yield Path(scratch)


def is_built(engine: Path) -> bool:
    """Whether an earlier run left this engine; a build shows its folder when it is whole."""
    return (engine / "engine.json").exists()
