"""Which steps of target cuda are replayed, and with which rows. Oracle: the step itself, token by token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from trtc.core.targets.cuda.code import decode_buckets, verify_buckets
from trtc.runtime.cuda_executor import CudaExecutor
from trtc.runtime.step_input import StepInput
from trtc.tests.engine_steps import step_input
from trtc.tests.packed_steps import PagedSequences


class Recorder:
    """The loop of an engine for 4 sequences, without a GPU."""

    def __init__(self) -> None:
        self.loaded: tuple[Any, ...] = ()

    def max_rows(self, *, verify: bool) -> int:
        return (verify_buckets(4) if verify else decode_buckets(4))[-1]

    def load(self, *rows: Any, verify: bool = False) -> None:
        self.loaded = (*rows, verify)


def step_of(work: dict[str, list[int]], sequences: PagedSequences, **options: bool) -> StepInput:
    return step_input(sequences.step(work, **options))


@pytest.mark.parametrize(
    ("work", "verify"),
    [
        ({"a": [1], "b": [2]}, False),
        ({"b": [3, 4, 5], "a": [6], "c": [7, 8]}, True),
        ({"a": [1] * 32}, True),
        ({"a": [1] * 33}, None),
        ({"a": [1] * 20, "b": [2] * 20}, None),
    ],
)
def test_rows_are_tokens_each_with_its_own_length(work: dict[str, list[int]], verify: bool | None) -> None:
    sequences = PagedSequences(4, 64)
    step_of({"a": [9] * 5, "b": [9] * 2}, sequences)
    step = step_of(work, sequences)
    executor: Any = object.__new__(CudaExecutor)
    executor._loop = Recorder()
    assert executor._load_step(step) == (verify is not None)
    if verify is None:
        assert executor._loop.loaded == ()
        return
    token_ids, kv_length, page_table, found = executor._loop.loaded
    assert found == verify and token_ids.tolist() == [token for new in work.values() for token in new]
    row = 0
    for sequence, (name, new) in enumerate(work.items()):
        past = {"a": 5, "b": 2}.get(name, 0)
        for index in range(len(new)):
            assert kv_length[row] == past + index + 1
            assert page_table[row].tolist() == step.page_table[sequence].tolist()
            row += 1
    assert kv_length.dtype == page_table.dtype == np.int32 and row == len(kv_length)


def test_prompts_whose_logits_are_not_all_wanted_are_not_replayed() -> None:
    executor: Any = object.__new__(CudaExecutor)
    executor._loop = Recorder()
    assert not executor._load_step(step_of({"a": [1, 2, 3]}, PagedSequences(4, 8), last_rows_only=True))
