"""How many pages a KV cache has."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral

from ..core.engine import Engine
from ..core.errors import ConfigError
from ..core.targets.base import CacheShape
from .kv_cache import pages_for


@dataclass(frozen=True, kw_only=True)
class CacheBudget:
    """What a KV cache may have.

    num_pages:    pages; None: as many as memory_bytes hold
    memory_bytes: None: enough for the engine's max_batch_size sequences of max_seq_len tokens
    Raises ConfigError for what is no whole number.
    """

    num_pages: int | None = None
    memory_bytes: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("num_pages", self.num_pages), ("kv_cache_memory_bytes", self.memory_bytes)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, Integral)):
                raise ConfigError(f"{name} is {value!r}; accepted: a whole number, or None")

    def pages(self, engine: Engine, shape: CacheShape) -> int:
        """Raises ConfigError when they could not hold one sequence of full length."""
        one = pages_for(engine.build.max_seq_len, engine.build.page_size)
        if self.num_pages is not None:
            pages = self.num_pages
        elif self.memory_bytes is not None:
            pages = self.memory_bytes // shape.bytes_per_page
        else:
            pages = one * engine.build.max_batch_size
        if pages < one:
            raise ConfigError(
                f"a KV cache of {pages} pages ({pages * shape.bytes_per_page} bytes) cannot hold one sequence of "
                f"max_seq_len {engine.build.max_seq_len}: at least {one} pages ({one * shape.bytes_per_page} bytes) are needed"
            )
        return int(pages)  # not one of numpy's


ENOUGH = CacheBudget()
"""For as many and as long sequences as the engine was built for."""
