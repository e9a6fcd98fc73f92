"""Who is to blame when an exchange fails. Oracle: the rank that was made to hang."""

from __future__ import annotations

import os
import subprocess
import sys
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


ALONE = """
import threading
from torch.distributed import HashStore
from trtc.runtime import heartbeat

heartbeat.INTERVAL_S, heartbeat.SILENCE_S = 0.05, 0.5
store = HashStore()
store.set("beat/1", heartbeat.FIRST)
heartbeat.Heartbeat(store, 0, ("rank 0", "rank 1")).start()
threading.Event().wait(60)
"""


@pytest.mark.parametrize("heard", [True, False], ids=["somebody listens", "nobody listens"])
def test_a_rank_ends_when_another_is_lost_even_if_nobody_hears_why(heard: bool) -> None:
    """As when mpirun is gone, too: what the rank writes to is closed."""
    reads, writes = os.pipe()
    with subprocess.Popen([sys.executable, "-c", ALONE], stderr=writes) as process:
        os.close(writes)
        if not heard:
            os.close(reads)
        try:
            assert process.wait(timeout=30) == 1
        finally:
            process.kill()
    if heard:
        with os.fdopen(reads) as said:
            assert "trtc: error: rank 1 died or hangs: no sign of life for " in said.read()
