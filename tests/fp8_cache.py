"""What an engine with a KV cache of e4m3 numbers should compute: its graph in float64 over the numbers that the cache holds."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from trtc.core.dtypes import DType
from trtc.core.interpreter import interpret
from trtc.core.ops import ReferenceContext
from trtc.core.passes.cache import cache_type

from .opt_models import OptCheckpoint, save_hf
from .packed_steps import Inputs, filled_cache


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
        return Reference(self.checkpoint, page_size, num_pages, DType.FLOAT8_E4M3 if rounds else None)


class Reference:
    """The composed graph in float64, step by step."""

    def __init__(
        self, checkpoint: OptCheckpoint, page_size: int, num_pages: int, cache_dtype: DType | None
    ) -> None:
        self._graph = cache_type(checkpoint.family.compose(checkpoint.config), cache_dtype)
        weights = checkpoint.weights()
        self._weights = {node.name: weights.read(0, node.name).double() for node in self._graph.weights}
        self._context = ReferenceContext(filled_cache(self._graph, page_size, num_pages, torch.float64))

    def run(self, inputs: Inputs) -> torch.Tensor:
        logits: torch.Tensor = interpret(self._graph, {**self._weights, **inputs}, self._context)
        return logits
