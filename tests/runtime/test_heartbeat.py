"""Who is to blame when an exchange fails. Oracle: the rank that was made to hang."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]
from trtc.runtime import heartbeat
from trtc.runtime.heartbeat import Heartbeat

NAMES = ("first", "second", "third")


@pytest.mark.parametrize("guilty", range(3))
def test_a_stage_that_waits_is_not_behind_the_one_it_waits_for(
    guilty: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three stages; one computes and never gets done, after more exchanges of its own than the others ever had."""
    for name, seconds in (("INTERVAL_S", 0.02), ("SILENCE_S", 1.0), ("COURTESY_S", 0.0)):
        monkeypatch.setattr(heartbeat, name, seconds)
    monkeypatch.setattr(Heartbeat, "_judge", lambda self, now: None)  # it would end this process
    store = HashStore()
    stages = [Heartbeat(store, rank, NAMES) for rank in range(3)]
    with ExitStack() as stack:
        for rank, beat in enumerate(stages):
            store.set(f"beat/{rank}", heartbeat.FIRST)
            stack.callback(beat.stop)
        for rank, beat in enumerate(stages):
            beat.progress += 7 * rank  # an earlier round, in which later stages had more to do
            beat.next_round()
            if rank == guilty:
                beat.progress += 5
            else:
                stack.enter_context(beat.waiting())
            beat.start()
        with ThreadPoolExecutor(3) as pool:
            assert set(pool.map(Heartbeat.wait_for_verdict, stages)) == {NAMES[guilty]}
