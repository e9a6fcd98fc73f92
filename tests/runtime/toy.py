"""A language model small enough to be its own oracle, behind the Executor interface.

Its logits are a hash of the true token history, and it knows the history only from its paged cache: a wrong
page table, position or length gives wrong tokens, and so does a page that two sequences write.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from trtc.runtime.step_input import StepInput

VOCAB_SIZE = 50
EOS = 0


@lru_cache(maxsize=20_000)
def _logits(history: bytes) -> np.ndarray:
    seed = int.from_bytes(hashlib.blake2b(history, digest_size=8).digest(), "little")
    return np.random.Generator(np.random.Philox(seed)).standard_normal(VOCAB_SIZE).astype(np.float32) * 2


def toy_logits(history: Sequence[int]) -> torch.Tensor:
    """Logits [VOCAB_SIZE] float32 of the token after `history`."""
    return torch.from_numpy(_logits(np.asarray(history, np.int32).tobytes()))


def greedy_tokens(prompt: Sequence[int], max_tokens: int, *, ignore_eos: bool = False) -> list[int]:
    """What greedy generation must give, by the model's definition and without any of the runtime."""
    history = list(prompt)
    while len(history) < len(prompt) + max_tokens:
        history.append(int(toy_logits(history).argmax()))
        if history[-1] == EOS and not ignore_eos:
            break
    return history[len(prompt) :]


@dataclass
class ToyExecutor:
    """An `Executor`. `steps` keeps what it was given; `fail_next` breaks one step."""

    num_pages: int = 64
    page_size: int = 4
    max_batch_size: int = 4
    max_num_tokens: int = 16
    max_seq_len: int = 64
    max_input_len: int = 48
    max_beam_width: int = 4
    vocab_size: int = VOCAB_SIZE
    eos_token_ids: tuple[int, ...] = (EOS,)
    fail_next: bool = False
    closed: bool = False
    steps: list[StepInput] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.cache = np.full((self.num_pages, self.page_size), -7, np.int32)

    def execute(self, step: StepInput) -> torch.Tensor:
        self._check(step)
        self.steps.append(step)
        if self.fail_next:
            self.fail_next = False
            raise RuntimeError("the device is on fire")
        written = set()
        for sequence in range(step.num_sequences):
            for row in range(step.query_start[sequence], step.query_start[sequence + 1]):
                slot = self._slot(step, sequence, int(step.positions[row]))
                assert slot not in written, f"two tokens are written to {slot}"
                written.add(slot)
                self.cache[slot] = step.token_ids[row]
        rows = [self._row(step, int(row)) for row in step.logits_index]
        return torch.stack(rows) if rows else torch.empty(0, self.vocab_size)

    def copy_pages(self, source: Sequence[int], target: Sequence[int]) -> None:
        assert not {*source} & {*target} and len({*target}) == len(target) == len(source)
        self.cache[list(target)] = self.cache[list(source)]

    def close(self) -> None:
        self.closed = True

    def _row(self, step: StepInput, row: int) -> torch.Tensor:
        sequence = int(np.searchsorted(step.query_start, row, side="right")) - 1
        slots = [self._slot(step, sequence, position) for position in range(int(step.positions[row]) + 1)]
        return toy_logits([int(self.cache[slot]) for slot in slots])

    def _slot(self, step: StepInput, sequence: int, position: int) -> tuple[int, int]:
        assert position < step.kv_length[sequence], f"position {position} is beyond the sequence"
        page = int(step.page_table[sequence, position // self.page_size])
        assert 0 <= page < self.num_pages, f"position {position} has page {page}"
        return page, position % self.page_size

    def _check(self, step: StepInput) -> None:
        for name, array in vars(step).items():
            assert array.dtype == np.int32 and array.flags.c_contiguous, f"{name} is {array.dtype}"
        assert 1 <= step.num_sequences <= self.max_batch_size
        assert 1 <= step.num_tokens <= self.max_num_tokens
        assert step.query_start[0] == 0 and step.query_start[-1] == step.num_tokens
        assert (np.diff(step.query_start) >= 1).all()
        assert (np.diff(step.logits_index) >= 1).all(), "logits rows are not ascending"
        assert (step.positions < self.max_seq_len).all()
