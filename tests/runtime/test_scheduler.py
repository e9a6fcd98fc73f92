"""Oracle: the scheduler's rules as its docstring states them; `check_integrity` after each step."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from trtc.core.errors import ConfigError, RequestError
from trtc.runtime.request import PRIORITY_STEP, Request, RequestStatus
from trtc.runtime.sampling_params import SamplingParams
from trtc.runtime.scheduler import Scheduler
from trtc.runtime.scheduler_config import SchedulerConfig

DEFAULTS = {
    "max_batch_size": 4,
    "max_num_tokens": 16,
    "max_seq_len": 64,
    "max_input_len": 48,
    "page_size": 4,
    "num_pages": 16,
}


def scheduler(**limits: Any) -> Scheduler:
    return Scheduler(SchedulerConfig(**{**DEFAULTS, **limits}))


def request(
    name: str, prompt: int, max_tokens: int | None = 8, *, priority: int = 0, **params: Any
) -> Request:
    """Each name has tokens of its own."""
    first = 100 * (1 + ord(name[0]))
    sampling = SamplingParams(max_tokens=max_tokens, **params)
    return Request(name, list(range(first, first + prompt)), sampling, frozenset({0}), priority=priority)


def step(scheduler: Scheduler, token: int = 1) -> dict[str, tuple[int, int]]:
    """Runs one step in which every request gets `token`; returns {name: (first token, number of tokens)}."""
    batch = scheduler.schedule()
    scheduler.check_integrity()
    assert batch.num_tokens <= scheduler.config.max_num_tokens
    scheduler.update(batch, [token] * len(batch.sampling))
    scheduler.check_integrity()
    return {part.request.request_id: (part.first, part.num_tokens) for part in batch.scheduled}


def test_a_long_prompt_runs_in_chunks_and_decodes_come_first() -> None:
    s = scheduler(max_num_tokens=8)
    s.add(request("a", 3))
    s.add(request("b", 20))
    assert step(s) == {"a": (0, 3), "b": (0, 5)}
    assert list(step(s).items()) == [("a", (3, 1)), ("b", (5, 7))]
    assert step(s) == {"a": (4, 1), "b": (12, 7)}
    assert step(s) == {"a": (5, 1), "b": (19, 1)}  # b's prompt is complete: it got its first token
    assert step(s) == {"a": (6, 1), "b": (20, 1)}


def test_only_the_last_chunk_of_a_prompt_samples() -> None:
    s = scheduler(max_num_tokens=8)
    s.add(request("a", 10))
    first = s.schedule()
    assert first.sampling == [] and first.scheduled[0].num_rows == 0
    s.update(first, [])
    second = s.schedule()
    assert [r.request_id for r in second.sampling] == ["a"] and second.scheduled[0].num_rows == 1


def test_admission_is_first_come_first_served_within_the_batch_size() -> None:
    s = scheduler(max_batch_size=2)
    for name in "abc":
        s.add(request(name, 2, max_tokens=2))
    assert set(step(s)) == {"a", "b"}
    assert set(step(s)) == {"a", "b"}
    assert set(step(s)) == {"c"}


def test_priority_decides_who_is_admitted_and_who_gives_way() -> None:
    s = scheduler(num_pages=6, max_batch_size=2, enable_prefix_cache=False)
    for name, priority in (("a", 1), ("b", 0), ("c", 0), ("d", -1)):
        s.add(request(name, 7, max_tokens=10, priority=priority))
    assert set(step(s)) == {"d", "b"}
    order = []
    while s.has_unfinished:
        running = step(s)
        order += [name for name in running if name not in order]
    assert order == ["d", "b", "c", "a"]


def test_the_last_in_line_gives_way_whenever_it_came() -> None:
    s = scheduler(num_pages=6, enable_prefix_cache=False)
    low, high = request("low", 8, max_tokens=12, priority=1), request("high", 7, max_tokens=12)
    s.add(low)
    step(s)
    s.add(high)
    assert set(step(s)) == {"low", "high"}
    while RequestStatus.WAITING not in (low.status, high.status):
        step(s)
    assert low.status is RequestStatus.WAITING and high.status is RequestStatus.RUNNING


def test_nobody_is_overtaken_for_ever() -> None:
    """Newcomers of a better priority pass a request that waits, until as many have come as the priority is worth."""
    s = scheduler(max_batch_size=1)
    patient = request("patient", 3, max_tokens=1, priority=1)
    s.add(request("x", 3, max_tokens=1))
    s.add(patient)
    passed = 0
    while not patient.finished:
        s.add(request("y", 3, max_tokens=1))
        s.add(request("z", 3, max_tokens=1))
        passed += "patient" not in step(s)
    assert passed == PRIORITY_STEP


def test_nobody_overtakes_a_request_that_waits_for_pages() -> None:
    s = scheduler(num_pages=8)
    s.add(request("a", 12, max_tokens=4))
    s.add(request("big", 24, max_tokens=4))
    s.add(request("small", 1, max_tokens=4))
    assert set(step(s)) == {"a"}
    assert set(step(s)) == {"a"}


def test_the_newest_gives_way_and_comes_back_with_its_tokens() -> None:
    s = scheduler(num_pages=6, enable_prefix_cache=False)
    old, new = request("old", 8, max_tokens=12), request("new", 7, max_tokens=12)
    s.add(old)
    s.add(new)
    assert step(s) == {"old": (0, 8), "new": (0, 7)}
    for _ in range(4):
        assert set(step(s)) == {"old", "new"}
    while new.status is RequestStatus.RUNNING:
        step(s)
    generated = list(new.output_token_ids)
    assert generated and new.page_ids == [] and new.num_computed_tokens == 0
    assert old.status is RequestStatus.RUNNING
    while not old.finished:
        step(s)
    assert step(s) == {"new": (0, 7 + len(generated))}  # computed again in one prefill
    while not new.finished:
        step(s)
    assert new.output_token_ids[: len(generated)] == generated and len(new.output_token_ids) == 12
    assert s.pool.num_used == 0


def test_a_newcomer_leaves_a_page_for_each_running_sequence() -> None:
    """Else it would be admitted only to be preempted at their next page, its prompt computed in vain."""
    s = scheduler(num_pages=4)
    s.add(request("old", 4, max_tokens=3))
    s.add(request("new", 11, max_tokens=2))
    assert [set(step(s)) for _ in range(3)] == [{"old"}] * 3
    assert step(s) == {"new": (0, 11)}


@pytest.mark.parametrize(
    ("params", "token", "reason", "stop_reason"),
    [
        ({}, 0, "stop", None),
        ({"ignore_eos": True}, 0, None, None),
        ({"stop_token_ids": [5]}, 5, "stop", 5),
        ({"stop_token_ids": [0]}, 0, "stop", None),
        ({"stop_token_ids": [0], "ignore_eos": True}, 0, "stop", 0),
        ({"max_tokens": 1}, 3, "length", None),
        ({"max_tokens": 1}, 0, "stop", None),
        ({"max_tokens": 9}, 3, None, None),
    ],
)
def test_what_ends_a_request(
    params: dict[str, Any], token: int, reason: str | None, stop_reason: int | None
) -> None:
    s = scheduler()
    r = request("a", 3, **params)
    s.add(r)
    step(s, token)
    assert (r.finish_reason, r.stop_reason, r.output_token_ids) == (reason, stop_reason, [token])
    assert s.has_unfinished == (reason is None)


@pytest.mark.parametrize("max_tokens", [None, 1000])
def test_a_request_ends_at_max_seq_len(max_tokens: int | None) -> None:
    s = scheduler(max_seq_len=10, page_size=3, num_pages=3)  # the tenth token needs no place in the cache
    r = request("a", 6, max_tokens=max_tokens)
    s.add(r)
    while s.has_unfinished:
        step(s)
    assert r.finish_reason == "length" and r.num_tokens == 10


@pytest.mark.parametrize("when", ["waiting", "running", "in a step", "finished"])
def test_cancel_anywhere_frees_the_pages(when: str) -> None:
    s = scheduler(max_batch_size=1)
    first, second = request("first", 3, max_tokens=2), request("second", 5, max_tokens=3)
    s.add(first)
    s.add(second)
    step(s)
    if when == "waiting":
        s.cancel(second)
        assert second.finish_reason == "abort"
    elif when == "running":
        s.cancel(first)
        assert set(step(s)) == {"second"}
    elif when == "in a step":
        batch = s.schedule()
        s.cancel(first)
        s.update(batch, [1])
        assert first.output_token_ids == [1]  # the token of the cancelled step was not taken
    else:
        step(s)
        s.cancel(first)
        assert first.finish_reason == "length"
    s.check_integrity()
    while s.has_unfinished:
        step(s)
    assert s.pool.num_used == 0


def test_a_step_that_failed_is_planned_again() -> None:
    s = scheduler()
    s.add(request("a", 4))
    step(s)
    once, again = s.schedule(), s.schedule()
    assert once == again
    s.check_integrity()


def test_no_more_sequences_run_than_a_step_has_tokens() -> None:
    s = scheduler(max_num_tokens=2)
    for name in "abc":
        s.add(request(name, 1, max_tokens=3))
    assert [set(step(s)) for _ in range(6)] == [{"a", "b"}] * 3 + [{"c"}] * 3
    assert not s.has_unfinished


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "limits", "message"),
    [
        (0, 1, {}, "the prompt is empty"),
        (49, 1, {}, "has 49 tokens, the engine takes max_input_len = 48"),
        (10, 1, {"max_seq_len": 10}, "leaves no room for output within max_seq_len = 10"),
        (9, 8, {"num_pages": 3}, "may need 4 cache pages of 4 tokens, the engine has num_pages = 3"),
        (9, None, {"num_pages": 3}, "may need 16 cache pages of 4 tokens, the engine has num_pages = 3"),
    ],
)
def test_what_can_never_run_is_refused_at_once(
    prompt: int, max_tokens: int | None, limits: dict[str, int], message: str
) -> None:
    s = scheduler(**limits)
    with pytest.raises(RequestError, match=message):
        s.add(request("a", prompt, max_tokens))
    assert not s.has_unfinished


@pytest.mark.parametrize("name", list(DEFAULTS))
def test_limits_are_positive(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is 0; accepted: an integer of at least 1"):
        scheduler(**{name: 0})


def test_check_integrity_sees_a_page_without_owner() -> None:
    s = scheduler()
    s.add(request("a", 4))
    step(s)
    s.running[0].page_ids.pop()
    with pytest.raises(AssertionError, match="counts 1 owners, 0 requests hold it"):
        s.check_integrity()


def test_the_scheduler_needs_no_tensor_library() -> None:
    """Oracle: a fresh interpreter in which `import torch` would fail."""
    code = "import sys; sys.modules['torch'] = None; import trtc.runtime.scheduler, trtc.runtime.step_input"
    subprocess.run([sys.executable, "-c", code], check=True)
