"""What an executor says about its engine, read off the engine once."""

from __future__ import annotations

from ..core.engine import Engine


class EngineLimits:
    """The properties of `Executor`, for executors of an engine directory."""

    def __init__(self, engine: Engine, num_pages: int) -> None:
        self.num_pages = num_pages
        self.page_size = engine.build.page_size
        self.max_batch_size = engine.build.max_batch_size
        self.max_num_tokens = engine.build.max_num_tokens
        self.max_seq_len = engine.build.max_seq_len
        self.max_input_len = engine.build.max_input_len
        self.max_beam_width = engine.build.max_beam_width
        self.vocab_size = engine.model.vocab_size
        self.eos_token_ids = engine.model.eos_token_ids
