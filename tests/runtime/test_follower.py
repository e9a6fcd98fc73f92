"""Rank 0 tells, the others do the same. Oracle: what a lone executor would have been asked to do, in the same order."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from trtc.core.dtypes import DType
from trtc.core.engine import Engine
from trtc.core.errors import TargetError
from trtc.runtime.distributed import RankGroup
from trtc.runtime.executor import DecodeLoop, GreedyChooser, PageCopier
from trtc.runtime.follower import FIRST, LeadingCopier, LeadingExecutor, LeadingLoop, follow
from trtc.runtime.step_input import StepInput


class Wire:
    """The group of a rank: rank 0 writes into it and, once it is closed, another reads it all."""

    def __init__(self, messages: deque[torch.Tensor], *, reads: bool) -> None:
        self._messages, self._reads = messages, reads
        self.events: list[str] = []

    def broadcast(self, x: torch.Tensor) -> None:
        if self._reads:
            x.copy_(self._messages.popleft())
        else:
            self._messages.append(x.clone())

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        yield

    def close(self) -> None:
        self.events.append("group closed")

    def fail(self) -> None:
        self.events.append("failed")


class Recorder:
    """An executor that writes down what it is asked to do."""

    num_pages = 8

    def __init__(self, events: list[Any]) -> None:
        self.calls: list[Any] = []
        self._events = events

    def execute(self, step: StepInput) -> torch.Tensor:
        self.calls.append(("execute", {name: value.tolist() for name, value in vars(step).items()}))
        return torch.full((len(step.logits_index), 3), 7.0)

    def copy_pages(self, source: Any, target: Any) -> None:
        self.calls.append(("copy", list(source), list(target)))

    def close(self) -> None:
        self._events.append("local closed")


class LoopRecorder(Recorder):
    max_draft_tokens = 32

    def choose(self, step: StepInput) -> Any:
        raise AssertionError("a rank starts a step, and only rank 0 waits for it")

    def start_step(self, step: StepInput, source: Any) -> Any:
        where = None if source is None else source.tolist()
        self.calls.append(("start", {name: value.tolist() for name, value in vars(step).items()}, where))
        return len(step.logits_index)

    def finish_step(self, ticket: Any) -> Any:
        return np.full(ticket, 6, np.int32)

    def loop_load(self, token_ids: Any, kv_length: Any, page_table: Any) -> None:
        self.calls.append(("load", token_ids.tolist(), kv_length.tolist(), page_table.tolist()))

    def loop_enqueue(self, count: int) -> Any:
        self.calls.append(("enqueue", count))
        return count

    def loop_rest(self, rows: Any) -> None:
        self.calls.append(("rest", list(rows)))

    def loop_collect(self, ticket: Any) -> Any:
        return np.full((ticket, 2), 5, np.int32)


def array(*values: int) -> Any:
    return np.array(values, np.int32)


STEP = StepInput(
    token_ids=array(5, 6, 9),
    positions=array(0, 1, 40),
    query_start=array(0, 2, 3),
    kv_length=array(2, 41),
    page_table=np.array([[4, 2, -1], [1, 0, 3]], np.int32),
    logits_index=array(1, 2),
)


@pytest.fixture
def engine(opt_engine: Any) -> Engine:
    path: Path = opt_engine("pre_norm", DType.FLOAT32)
    return Engine.open(path)


def test_followers_do_what_rank_0_does(engine: Engine) -> None:
    messages: deque[torch.Tensor] = deque()
    lead, behind = Wire(messages, reads=False), Wire(messages, reads=True)
    first, second = LoopRecorder(lead.events), LoopRecorder(behind.events)
    executor = LeadingLoop(engine, 8, first, cast(RankGroup, lead))
    assert isinstance(executor, DecodeLoop) and isinstance(executor, PageCopier)
    assert executor.max_draft_tokens == 32

    assert executor.execute(STEP).shape == (2, 3)
    assert executor.choose(STEP).tolist() == [6, 6]
    nothing_wanted = replace(STEP, logits_index=array())
    tickets = [executor.start_step(step, array(-1, 0, 1)) for step in (STEP, nothing_wanted)]
    assert [executor.finish_step(ticket).tolist() for ticket in tickets] == [[6, 6], []]
    executor.loop_load(array(9, 8), array(41, 3), np.array([[4, 2], [1, -1]], np.int32))
    tickets = [executor.loop_enqueue(8), executor.loop_enqueue(1)]
    executor.loop_rest([])
    executor.loop_rest([1])
    executor.copy_pages([3, 5], [7, 6])
    many = FIRST  # a table that does not fit the first message
    executor.loop_load(array(*range(2)), array(1, 2), np.arange(2 * many, dtype=np.int32).reshape(2, many))
    assert [executor.loop_collect(ticket).shape for ticket in tickets] == [(8, 2), (1, 2)]
    executor.close()
    assert lead.events == ["local closed", "group closed"]

    with pytest.raises(SystemExit) as end:
        follow(second, cast(RankGroup, behind))
    assert end.value.code == 0 and behind.events == ["local closed", "group closed"] and not messages
    assert second.calls == first.calls
    assert [call[0] for call in second.calls] == [
        "execute",
        "start",
        "start",
        "start",
        "load",
        "enqueue",
        "enqueue",
        "rest",
        "copy",
        "load",
    ]


def test_an_executor_offers_what_its_ranks_do(engine: Engine) -> None:
    wire = Wire(deque(), reads=False)
    offers = {LeadingExecutor: (False, False), LeadingCopier: (True, False), LeadingLoop: (True, True)}
    for kind, (copies, loops) in offers.items():
        executor = kind(engine, 8, LoopRecorder(wire.events), cast(RankGroup, wire))
        assert (isinstance(executor, PageCopier), isinstance(executor, DecodeLoop)) == (copies, loops)
        assert isinstance(executor, GreedyChooser) == loops
        executor.close()


def test_after_a_burst_that_was_cut_short_nothing_runs(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    wire = Wire(deque(), reads=False)
    local = LoopRecorder(wire.events)
    executor = LeadingLoop(engine, 8, local, cast(RankGroup, wire))

    def interrupted(count: int) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(local, "loop_enqueue", interrupted)
    with pytest.raises(KeyboardInterrupt):
        executor.loop_enqueue(4)
    with pytest.raises(TargetError, match="out of step"):
        executor.execute(STEP)
    executor.close()
    assert wire.events == ["failed", "local closed"]
