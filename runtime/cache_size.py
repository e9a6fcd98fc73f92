"""How many pages a KV cache has."""

from __future__ import annotations

from ..core.engine import Engine
from ..core.errors import ConfigError
from ..core.targets.base import CacheShape
from .kv_cache import pages_for


def cache_pages(
    engine: Engine, shape: CacheShape, num_pages: int | None, kv_cache_memory_bytes: int | None
) -> int:
    """Pages of the KV cache. Raises ConfigError when they could not hold one sequence of full length."""
    one = pages_for(engine.build.max_seq_len, engine.build.page_size)
    if num_pages is None:
        if kv_cache_memory_bytes is None:
            num_pages = one * engine.build.max_batch_size
        else:
            num_pages = kv_cache_memory_bytes // shape.bytes_per_page
    if num_pages < one:
        raise ConfigError(
            f"a KV cache of {num_pages} pages ({num_pages * shape.bytes_per_page} bytes) cannot hold one sequence of "
            f"max_seq_len {engine.build.max_seq_len}: at least {one} pages ({one * shape.bytes_per_page} bytes) are needed"
        )
    return num_pages
