"""The table of a scaling run. Oracle: numbers worked out by hand."""

from __future__ import annotations

from typing import Any

from trtc.bench.tensor_parallel import table


def run(tp_size: int, step: float, prefill: float) -> dict[str, Any]:
    batch = {"kind": "batch", "batch": 8, "decode_ms_per_token": step, "prefill_s": prefill}
    return {"model": "1.3b", "tp_size": tp_size, "records": [{"kind": "setup"}, batch]}


def test_speed_up_and_efficiency() -> None:
    failed = {"model": "1.3b", "tp_size": 8, "records": [{"kind": "error", "message": "no"}]}
    lines = table([run(2, 3.0, 0.04), run(4, 2.0, 0.025), failed]).splitlines()[1:]
    assert [line.split() for line in lines] == [
        ["1.3b", "2", "8", "3.000", "1.00", "100%", "40.0", "1.00"],
        ["1.3b", "4", "8", "2.000", "1.50", "75%", "25.0", "1.60"],
    ]
