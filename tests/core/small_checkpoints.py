"""A Hugging Face folder of a small fake model, its weight table, and what its conversion must give."""

from pathlib import Path

import safetensors.torch
import torch
from trtc.core.checkpoint import convert
from trtc.core.config import ModelConfig
from trtc.core.dtypes import DType
from trtc.core.hf import HFCheckpoint
from trtc.core.sharding import Shard, ShardingOptions
from trtc.core.weights import Chunk, Transpose, WeightRule, WeightTable

VOCAB, HIDDEN, LAYERS = 13, 8, 2  # 13 rows need padding for 2 and for 4 ranks
CONFIG = ModelConfig(
    family="fake",
    architecture="FakeForCausalLM",
    dtype=DType.FLOAT32,
    vocab_size=VOCAB,
    hidden_size=HIDDEN,
    num_layers=LAYERS,
    num_heads=4,
    num_kv_heads=4,
    head_dim=2,
    ffn_size=12,
    max_positions=6,
    tie_word_embeddings=True,
)


def make_table(tied: bool = True) -> WeightTable:
    """Embeddings, fused q, k, v as GPT-2 keeps them, a column and a row parallel layer, norms and a head."""
    shape = ("num_heads*head_dim", "hidden_size")
    qkv = [
        rule
        for index, part in enumerate("qkv")
        for rule in (
            WeightRule(
                "h.{i}.qkv.weight",
                f"layers.{{i}}.{part}.weight",
                shape,
                Shard.HEADS,
                (Transpose(), Chunk(index, 3)),
            ),
            WeightRule(
                "h.{i}.qkv.bias", f"layers.{{i}}.{part}.bias", shape[:1], Shard.HEADS, Chunk(index, 3)
            ),
        )
    ]
    return WeightTable(
        (
            WeightRule("wte.weight", "embed.weight", ("vocab_size", "hidden_size"), Shard.EMBEDDING),
            WeightRule("wpe.weight", "positions.weight", ("max_positions+2", "hidden_size")),
            *qkv,
            WeightRule("h.{i}.up.weight", "layers.{i}.up.weight", ("ffn_size", "hidden_size"), Shard.COLUMN),
            WeightRule("h.{i}.down.weight", "layers.{i}.down.weight", ("hidden_size", "ffn_size"), Shard.ROW),
            WeightRule("h.{i}.norm.weight", "layers.{i}.norm.weight", ("hidden_size",)),
            WeightRule(
                "lm_head.weight",
                "head.weight",
                ("vocab_size", "hidden_size"),
                Shard.VOCAB_HEAD,
                tied_to="embed.weight" if tied else None,
            ),
        ),
        prefixes=("transformer.", ""),
    )


def make_tensors(tied: bool = True) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"wte.weight": (VOCAB, HIDDEN), "wpe.weight": (8, HIDDEN)}
    for i in range(LAYERS):
        shapes |= {
            f"h.{i}.qkv.weight": (HIDDEN, 24),
            f"h.{i}.qkv.bias": (24,),
            f"h.{i}.norm.weight": (HIDDEN,),
        }
        shapes |= {f"h.{i}.up.weight": (12, HIDDEN), f"h.{i}.down.weight": (HIDDEN, 12)}
    tensors = {
        f"transformer.{name}": torch.randn(shape, generator=generator) for name, shape in shapes.items()
    }
    return (
        tensors if tied else {**tensors, "lm_head.weight": torch.randn((VOCAB, HIDDEN), generator=generator)}
    )


def expected_whole(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights by our names, written out by hand from the checkpoint tensors."""
    source = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    whole = {"embed.weight": source["wte.weight"], "positions.weight": source["wpe.weight"]}
    whole["head.weight"] = source.get("lm_head.weight", source["wte.weight"])
    for i in range(LAYERS):
        for part, weight in zip("qkv", source[f"h.{i}.qkv.weight"].t().split(8), strict=True):
            whole[f"layers.{i}.{part}.weight"] = weight
        for part, bias in zip("qkv", source[f"h.{i}.qkv.bias"].split(8), strict=True):
            whole[f"layers.{i}.{part}.bias"] = bias
        for name in ("up.weight", "down.weight", "norm.weight"):
            whole[f"layers.{i}.{name}"] = source[f"h.{i}.{name}"]
    return whole


def write_folder(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "tokenizer.json").write_text('{"a": "tokenizer"}')
    safetensors.torch.save_file(tensors, path / "model.safetensors")
    return path


def convert_folder(
    folder: Path, output: Path, tp: int = 1, dtype=DType.FLOAT32, tied: bool = True, **options
) -> None:
    embedding = {key: options.pop(key) for key in list(options) if "embedding" in key}
    with HFCheckpoint.open(folder) as source:
        sharding = ShardingOptions(tp, **embedding)
        convert(source, make_table(tied), CONFIG, output, dtype=dtype, sharding=sharding, **options)
