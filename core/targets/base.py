"""What a target is: where a graph goes once the passes are done with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..config import TARGETS, BuildConfig
from ..dtypes import DType
from ..errors import ConfigError
from ..graph import Graph
from ..ops.attention import cached_as

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Capabilities:
    """What a target can run. Passes ask this, never the target's name."""

    ops: frozenset[str]
    fusions: frozenset[str]
    """Names of `core.passes.fuse.FUSIONS`."""
    dtypes: frozenset[DType]
    """Compute types."""
    tensor_parallel: bool = False
    pipeline_parallel: bool = False
    quantized: frozenset[str] = frozenset()
    """Kinds of quantized weights (`core.quantize.scheme.WeightFormat.kind`)."""
    kv_cache_dtypes: frozenset[str] = frozenset({"auto"})
    """What the KV cache may hold (`core.config.KV_CACHE_DTYPES`)."""


class Target(Protocol):
    """Turns the graph of one rank into what an engine directory holds."""

    name: str
    embeds_weights: bool
    """Whether the files that `compile` writes hold the weights, so that an engine needs none beside them."""

    def capabilities(self, build: BuildConfig) -> Capabilities:
        """Raises ConfigError for target options the target does not know."""

    def check(self, graph: Graph, build: BuildConfig) -> None:
        """Raises BuildError for what can be told of a rank's graph that the target does not run, before weights are made."""

    def compile(
        self,
        graph: Graph,
        build: BuildConfig,
        directory: Path,
        rank: int,
        weights: Mapping[str, torch.Tensor],
    ) -> Mapping[str, Any]:
        """Writes the target's own files for `rank` into `directory`; returns JSON that the runtime needs to load them.

        weights: by the names of the graph's weight nodes, memory-mapped. The build stores them beside what this writes.
        Raises BuildError when the graph cannot be lowered, TargetError when the target's compiler is not installed.
        """


_MODULES = {"cpu": ".cpu", "cuda": ".cuda", "tensorrt": ".tensorrt"}


def get_target(name: str) -> Target:
    """The target called `name`. Raises ConfigError for a name that is none, or none yet."""
    if name not in _MODULES:
        raise ConfigError(f"target {name!r} is unknown; accepted: {', '.join(TARGETS)}")
    target: Target = import_module(_MODULES[name], __package__).TARGET
    return target


@dataclass(frozen=True)
class CacheShape:
    """The KV cache that a graph needs: `layers` pairs of k and v pages of `dtype`.

    A page has head_dim numbers for each of page_size tokens and num_kv_heads heads. Which come first is the target's choice:
    [num_pages, page_size, num_kv_heads, head_dim] on cpu, [num_pages, num_kv_heads, page_size, head_dim] for the kernels of
    target cuda, which TensorRT's plugins share."""

    layers: int
    num_kv_heads: int
    head_dim: int
    dtype: DType
    page_size: int

    @classmethod
    def of(cls, graph: Graph, page_size: int) -> CacheShape:
        """Read off the attention nodes, which must agree. Raises AssertionError when they do not."""
        keys = {
            (graph.specs[node.used[1]], cached_as(node.attrs, graph.specs[node.used[1]].dtype))
            for node in graph.nodes
            if node.op == "attention"
        }
        assert len(keys) == 1, f"attention layers differ in their keys or caches: {keys}"
        ((key, dtype),) = keys
        _, heads, head_dim = key.shape
        assert isinstance(heads, int) and isinstance(head_dim, int)
        return cls(graph.num_cache_layers, heads, head_dim, dtype, page_size)

    @property
    def bytes_per_page(self) -> int:
        """Bytes of one page over all layers, k and v."""
        return 2 * self.layers * self.page_size * self.num_kv_heads * self.head_dim * self.dtype.itemsize
