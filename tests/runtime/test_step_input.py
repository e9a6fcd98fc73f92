"""Oracle: arrays written out by hand for batches small enough to check by eye."""

from __future__ import annotations

import numpy as np
from trtc.runtime.batch import Batch
from trtc.runtime.request import Request
from trtc.runtime.sampling_params import SamplingParams
from trtc.runtime.scheduler import Scheduler
from trtc.runtime.scheduler_config import SchedulerConfig
from trtc.runtime.step_input import StepInput

CONFIG = SchedulerConfig(
    max_batch_size=4, max_num_tokens=8, max_seq_len=64, max_input_len=48, page_size=4, num_pages=16
)


def as_lists(step: StepInput) -> dict[str, list[int]]:
    assert all(array.dtype == np.int32 for array in vars(step).values())
    return {name: array.tolist() for name, array in vars(step).items()}


def test_decode_and_prefill_are_packed_without_padding() -> None:
    scheduler = Scheduler(CONFIG)
    scheduler.add(Request("a", [10, 11, 12, 13], SamplingParams()))
    scheduler.update(scheduler.schedule(), [14])
    scheduler.add(Request("b", [20, 21, 22, 23, 24, 25, 26, 27, 28], SamplingParams()))
    step = as_lists(StepInput.from_batch(scheduler.schedule()))
    assert step == {
        "token_ids": [14, 20, 21, 22, 23, 24, 25, 26],
        "positions": [4, 0, 1, 2, 3, 4, 5, 6],
        "query_start": [0, 1, 8],
        "kv_length": [5, 7],
        "page_table": [[0, 1, -1], [2, 3, 4]],
        "logits_index": [0],  # b's prompt is not complete
    }


def test_prompt_logprobs_ask_for_each_row_once() -> None:
    scheduler = Scheduler(CONFIG)
    request = Request("a", list(range(10, 20)), SamplingParams(prompt_logprobs=0))
    scheduler.add(request)
    batch = scheduler.schedule()
    assert StepInput.from_batch(batch).logits_index.tolist() == list(range(8))
    assert (batch.scheduled[0].num_prompt_rows, batch.scheduled[0].samples) == (8, False)
    request.prompt_logprobs += [{}] * 8
    scheduler.update(batch, [])
    batch = scheduler.schedule()
    # token 8 scores token 9; token 9 samples
    assert StepInput.from_batch(batch).logits_index.tolist() == [0, 1]
    assert (batch.scheduled[0].num_prompt_rows, batch.scheduled[0].samples) == (1, True)


def test_a_prompt_scored_before_a_preemption_is_not_scored_again() -> None:
    scheduler = Scheduler(CONFIG)
    request = Request("a", [10, 11, 12, 13, 14, 15], SamplingParams(prompt_logprobs=0))
    request.prompt_logprobs += [{}] * 3  # tokens 0 to 3 are reported
    scheduler.add(request)
    assert StepInput.from_batch(scheduler.schedule()).logits_index.tolist() == [3, 4, 5]


def test_a_part_without_wanted_logits_gives_no_rows() -> None:
    scheduler = Scheduler(CONFIG)
    scheduler.add(Request("a", list(range(20)), SamplingParams()))
    batch = scheduler.schedule()
    assert isinstance(batch, Batch)
    assert StepInput.from_batch(batch).logits_index.tolist() == []
