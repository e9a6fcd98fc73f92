"""What the TensorRT tests need of OPT: ranks of tiny models as a target gets them, and batches that run on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from trtc.core.build import plan
from trtc.core.config import BuildConfig, ModelConfig
from trtc.core.dtypes import DType
from trtc.core.graph import Graph
from trtc.core.interpreter import interpret
from trtc.core.passes import Partition
from trtc.core.plugin_registry import Family, plugins
from trtc.core.sharding import ShardingOptions
from trtc.core.weight_source import DummyWeights, WeightSource
from trtc.tests.opt_models import SIZES, OptCheckpoint
from trtc.tests.trt_interpreter import NetworkInterpreter, run_ranks

CAPACITY = 128
BUILD = BuildConfig(
    target="tensorrt", max_batch_size=4, max_input_len=32, max_seq_len=CAPACITY, max_num_tokens=64
)


@dataclass(frozen=True)
class Rank:
    """What a target gets to compile: the graph of one rank after the passes, and its weights."""

    graph: Graph
    weights: Mapping[str, torch.Tensor]


def ranks_of(
    checkpoint: OptCheckpoint,
    dtype: DType = DType.FLOAT32,
    sharding: ShardingOptions | None = None,
    *,
    target_options: Mapping[str, Any] | None = None,
    source: WeightSource | None = None,
) -> list[Rank]:
    """The ranks of an engine of `checkpoint`; `source`: its weights, where they are not just its own."""
    return _ranks(
        checkpoint.family,
        replace(checkpoint.config, dtype=dtype),
        source or checkpoint.weights(dtype, sharding),
        target_options or {},
    )


def dummy_rank(num_heads: int, head_dim: int, dtype: DType) -> Rank:
    """An OPT of other sizes, for tests that only build."""
    hidden_size = num_heads * head_dim
    sizes = {"hidden_size": hidden_size, "num_attention_heads": num_heads, "word_embed_proj_dim": hidden_size}
    hf_config = {**SIZES, **sizes, "architectures": ["OPTForCausalLM"], "dtype": dtype.value}
    family = plugins().family_of(hf_config)
    config = family.config(hf_config)
    source = DummyWeights(family.weight_table(config), config, dtype=dtype, sharding=ShardingOptions())
    (rank,) = _ranks(family, config, source, {})
    return rank


def _ranks(
    family: Family, config: ModelConfig, source: WeightSource, target_options: Mapping[str, Any]
) -> list[Rank]:
    tp_size, ranks = source.sharding.tp_size, []
    build = replace(BUILD, tp_size=tp_size, target_options=target_options)
    for rank in range(tp_size):
        planned = plan(family, config, source, build, rank)
        weights = {node.name: _weight(planned, source, rank, node.name) for node in planned.graph.weights}
        ranks.append(Rank(planned.graph, weights))
    return ranks


def _weight(planned: Partition, source: WeightSource, rank: int, name: str) -> torch.Tensor:
    recipe = planned.recipes.get(name)
    if recipe is None:
        return source.read(rank, name)
    made: torch.Tensor = interpret(
        recipe, {node.name: source.read(rank, node.name) for node in recipe.weights}
    )
    return made


@dataclass
class Session:
    """A batch of sequences on the interpreted networks of all ranks: pads the steps and keeps the caches."""

    ranks: Sequence[NetworkInterpreter]
    batch_size: int
    caches: list[dict[str, torch.Tensor]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.lengths = [0] * self.batch_size
        self.caches = [
            {t.name: self._cache(rank, t) for t in rank.inputs if t.name.startswith(("k_cache.", "v_cache."))}
            for rank in self.ranks
        ]

    def _cache(self, rank: NetworkInterpreter, tensor: Any) -> torch.Tensor:
        """What was in the memory before must not matter, as long as it is finite."""
        shape = (self.batch_size, *tuple(tensor.shape)[1:])
        return torch.full(shape, 1000.0, dtype=rank.torch_dtype(tensor))

    def step(self, new: Sequence[Sequence[int]]) -> torch.Tensor:
        """Appends `new` tokens to each sequence; the logits after the last of them, [B, V]."""
        width = max(map(len, new))
        tokens, positions = (torch.zeros(len(new), width, dtype=torch.int32) for _ in range(2))
        for b, ids in enumerate(new):
            tokens[b, : len(ids)] = torch.tensor(ids)
            positions[b, : len(ids)] = torch.arange(len(ids)) + self.lengths[b]
        last = [b * width + len(ids) - 1 for b, ids in enumerate(new)]
        shared = {
            "token_ids": tokens,
            "positions": positions,
            "past_length": torch.tensor(self.lengths, dtype=torch.int32),
            "logits_index": torch.tensor(last, dtype=torch.int32),
        }
        given = [{t.name: shared[t.name] for t in rank.inputs if t.name in shared} for rank in self.ranks]
        feeds = [{**one, **cache} for one, cache in zip(given, self.caches, strict=True)]
        outputs = run_ranks(self.ranks, feeds)
        self.caches = [
            {name: output[f"{name}.updated"] for name in cache}
            for output, cache in zip(outputs, self.caches, strict=True)
        ]
        self.lengths = [length + len(ids) for length, ids in zip(self.lengths, new, strict=True)]
        return outputs[0][self.ranks[0].outputs[-1]]
