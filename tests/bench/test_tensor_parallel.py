"""The tables of runs on several GPUs. Oracle: numbers worked out by hand."""

from __future__ import annotations

from typing import Any

from trtc.bench import all_reduce, tensor_parallel


def run(tp_size: int, step: float, prefill: float) -> dict[str, Any]:
    batch = {
        "kind": "batch",
        "batch": 8,
        "decode_ms_per_token": step,
        "prefill_s": prefill,
        "in_len": 512,
        "out_len": 128,
    }
    setup = {"kind": "setup", "device": "GPU", "torch": "2", "dtype": "float16"}
    return {"model": "1.3b", "tp_size": tp_size, "records": [setup, batch]}


def test_speed_up_and_efficiency() -> None:
    failed = {"model": "1.3b", "tp_size": 8, "records": [{"kind": "error", "message": "no"}]}
    runs = [run(2, 3.0, 0.04), run(4, 2.0, 0.025), failed]
    lines = tensor_parallel.table(runs).splitlines()[1:]
    assert [line.split() for line in lines] == [
        ["1.3b", "2", "8", "3.000", "1.00", "100%", "40.0", "1.00"],
        ["1.3b", "4", "8", "2.000", "1.50", "75%", "25.0", "1.60"],
    ]
    runs.append({**run(2, 2.0, 0.02), "pp_size": 2})
    assert tensor_parallel.rows(runs)[-1] == (
        "1.3b",
        "2 x 2 stages",
        "8",
        "2.000",
        "1.50",
        "75%",
        "20.0",
        "2.00",
    )
    assert [tensor_parallel.split_of(text) for text in ("2", "1x2")] == [(2, 1), (1, 2)]
    where = {"driver": "5", "commit": "abc", "date": "today"}
    text = tensor_parallel.pipeline_markdown({"runs": runs[-1:], **where})
    assert "| 1.3b | 2 | 8 | 2.000 | 20.0 |\n\nA GPU a stage: GPU, driver 5" in text
    text = tensor_parallel.markdown({"runs": runs, "driver": "5", "commit": "abc", "date": "today"})
    assert "| 1.3b | 4 | 8 | 2.000 | 1.50 | 75% | 25.0 | 1.60 |\n" in text
    assert (
        "GPU, driver 5, torch 2, trtc at abc on today; OPT with random weights, float16, greedy, 512 tokens in"
        in text
    )


def test_models_that_were_measured_apart_are_named() -> None:
    data: dict[str, Any] = {
        "driver": "5",
        "commit": "abc",
        "date": "today",
        "runs": [run(1, 3.0, 0.1), run(2, 2.0, 0.1)],
    }
    data["runs"].append({**run(1, 9.0, 0.2), "model": "13b", "commit": "def"})
    assert tensor_parallel.where_and_when(data) == (
        "1.3b: GPU, driver 5, torch 2, trtc at abc on today; 13b: GPU, driver 5, torch 2, trtc at def on today"
    )


def test_a_way_that_does_not_work_has_no_column() -> None:
    rows = [
        {"way": way, "bytes": 1 << 13, "us": us}
        for way, us in (("trtc", 4.0), ("nccl", 10.0), ("torch one-shot", None))
    ]
    rows.append({"way": "nccl", "bytes": 1 << 14, "us": 12.0})
    where = {"device": "GPU", "driver": "5", "torch": "2", "nccl": "2.28", "commit": "abc"}
    text = all_reduce.markdown({"ranks": 2, "launches": 40, "environment": where, "rows": rows})
    header, _, first, second, after, *_ = text.splitlines()
    assert header == "| a rank's part | trtc | nccl | NCCL / best of trtc |"
    assert (first, second) == (
        "| 8 KB | 4.0 us | 10.0 us | 2.50 |",
        "| 16 KB |  | 12.0 us |  |",
    ) and not after


def test_sums_with_norms_have_a_table_of_their_own() -> None:
    """Oracle: by hand. A way that is missing leaves its cell empty."""
    where = {"device": "GPU", "driver": "5", "torch": "2", "nccl": "2.28", "commit": "abc"}
    data: dict[str, Any] = {"ranks": 2, "launches": 40, "environment": where, "rows": []}
    data["rows"] = [{"way": "trtc", "bytes": 1 << 13, "us": 4.0}]
    assert "With a residual" not in all_reduce.markdown(data)
    data["normed"] = [
        {"way": way, "rows": 17, "columns": 2048, "us": us, "samples": [us]}
        for way, us in (("sum, norm", 6.0), ("one kernel", 4.0))
    ]
    text = all_reduce.markdown(data)
    assert "| 17 | 2048 | 68 KB | 6.00 us | 4.00 us | 1.50 |\n\n2 x GPU" in text
