"""What a scheduler has to keep to."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ..core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Limits of one engine. Raises ConfigError when one is not a positive integer.

    max_batch_size: sequences in one step       max_num_tokens: tokens in one step
    max_seq_len:    prompt and output tokens    max_input_len:  prompt tokens
    page_size:      tokens per page             num_pages:      pages in the cache
    enable_prefix_cache: use pages that an earlier request with the same beginning has computed
    """

    max_batch_size: int
    max_num_tokens: int
    max_seq_len: int
    max_input_len: int
    page_size: int
    num_pages: int
    enable_prefix_cache: bool = True

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "bool":
                if not isinstance(value, bool):
                    raise ConfigError(f"{field.name} is {value!r}; accepted: True or False")
            elif not isinstance(value, int) or value < 1:
                raise ConfigError(f"{field.name} is {value!r}; accepted: an integer of at least 1")
