"""What an engine with a KV cache of e4m3 numbers should compute: its graph in float64 over the numbers that the cache holds."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from trtc.core.dtypes import DType
from trtc.core.passes.cache import cache_type

from .opt_models import OptCheckpoint, save_hf
from .packed_steps import Reference


@dataclasses.dataclass(frozen=True)
class Fp8CacheEngine:
    """An engine, and the checkpoint it was built from."""

    path: Path
    checkpoint: OptCheckpoint

    @classmethod
    def build(cls, variant: str, dtype: DType, folder: Path, **options: object) -> Fp8CacheEngine:
        checkpoint = OptCheckpoint.open(save_hf(variant, folder / "hf"))
        path = checkpoint.build(folder / "engine", dtype=dtype, kv_cache_dtype="fp8", **options)
        return cls(path, checkpoint)

    def reference(self, page_size: int, num_pages: int, *, rounds: bool = True) -> Reference:
        """rounds: to e4m3; else with a cache that holds k and v as they are."""
        composed = self.checkpoint.family.compose(self.checkpoint.config)
        graph = cache_type(composed, DType.FLOAT8_E4M3 if rounds else None)
        source = self.checkpoint.weights()
        weights = {node.name: source.read(0, node.name).double() for node in graph.weights}
        return Reference(graph, weights, page_size, num_pages)
