"""Steps in parts. Oracle: the step in one, on an engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from trtc.core.engine import Engine
from trtc.runtime.cache_size import CacheBudget
from trtc.runtime.cpu_executor import CpuExecutor
from trtc.runtime.micro_steps import split
from trtc.runtime.step_input import StepInput
from trtc.tests.tolerances import LOGITS_FLOAT32_ABS, max_error


def int32(values: object) -> np.ndarray:
    return np.array(values, np.int32)


def prompts(lengths: list[int]) -> StepInput:
    """Whole prompts of these lengths, and the logits of the last token of each and of a few others."""
    ends = np.cumsum(lengths, dtype=np.int32)
    rng = np.random.default_rng(0)
    pages = [-(-length // 16) for length in lengths]
    table = np.full((len(lengths), max(pages)), -1, np.int32)
    ids = iter(rng.permutation(sum(pages)))
    for row, count in zip(table, pages, strict=True):
        row[:count] = [next(ids) for _ in range(count)]
    return StepInput(
        token_ids=rng.integers(4, 96, ends[-1]).astype(np.int32),
        positions=np.concatenate([np.arange(length, dtype=np.int32) for length in lengths]),
        query_start=int32([0, *ends]),
        kv_length=int32(lengths),
        page_table=table,
        logits_index=int32(sorted({*(ends - 1), 3, 20})),
    )


def decode(step: StepInput) -> StepInput:
    """One more token of each sequence of `step`; no page more."""
    every = np.arange(step.num_sequences, dtype=np.int32)
    length = step.kv_length + 1
    return StepInput(5 + every, length - 1, int32([*every, len(every)]), length, step.page_table, every)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("lengths", [[40], [5, 61, 1, 30]])
def test_the_parts_of_a_step_do_what_it_does(
    lengths: list[int], count: int, opt_engine: Callable[[str], Path]
) -> None:
    """The logits, and those of a decode step after it, which show what was left in the cache."""
    engine = Engine.open(opt_engine("pre_norm"))
    whole, parted = (CpuExecutor(engine, CacheBudget(num_pages=16)) for _ in range(2))
    step = prompts(lengths)
    parts = split(step, count)
    assert len(parts) == count
    assert max(part.num_tokens for part in parts) - min(part.num_tokens for part in parts) <= 1
    for part in parts:
        for name, value in vars(part).items():
            assert value.dtype == np.int32, name
    found = torch.cat([parted.execute(part).clone() for part in parts])
    assert max_error(found, whole.execute(step)) <= LOGITS_FLOAT32_ABS
    after = decode(step)
    assert max_error(parted.execute(after), whole.execute(after)) <= LOGITS_FLOAT32_ABS


def test_a_part_has_the_sequences_that_it_holds_tokens_of() -> None:
    """By hand: 3 and 5 tokens, cut after the fourth."""
    first, second = split(prompts([3, 5]), 2)
    assert first.query_start.tolist() == [0, 3, 4] and second.query_start.tolist() == [0, 4]
    assert first.kv_length.tolist() == [3, 1] and second.kv_length.tolist() == [5]
    assert second.positions.tolist() == [1, 2, 3, 4]
    assert (first.logits_index.tolist(), second.logits_index.tolist()) == ([2, 3], [3])
