"""The stand-in for a GPU, and the measuring of a server on it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("fastapi")

from trtc.bench import paced, server_load, server_tables
from trtc.core.engine import Engine
from trtc.runtime.llm import LLM
from trtc.runtime.sampling_params import SamplingParams

from ..opt_models import BUILD


def test_it_takes_its_time_and_goes_on_from_the_last_token(opt_engine: Callable[[str], Path]) -> None:
    """Alone a request decodes in the device's loop; beside one that samples in steps of their own: the same tokens."""
    executor = paced.PacedExecutor(Engine.open(opt_engine("pre_norm")))
    greedy = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    with LLM.from_executor(executor) as llm:
        started = time.perf_counter()
        (alone,) = llm.generate([[7] * 50], greedy)
        seconds = time.perf_counter() - started
        beside, _ = llm.generate([[7] * 50, [8]], [greedy, SamplingParams(max_tokens=20, top_k=5)])
    assert seconds > 12 * paced.STEP_S + 50 * paced.PREFILL_S
    token_ids = alone.outputs[0].token_ids
    assert len(set(token_ids)) > 6 and beside.outputs[0].token_ids == token_ids


@pytest.mark.slow
def test_rates_are_measured_and_become_a_table(
    opt_engine: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The engine takes 128 tokens, the shortest requests of the load no more."""
    monkeypatch.setattr(
        "trtc.bench.server_rates.mixed_lengths", lambda count, seed: ([64] * count, [32] * count)
    )
    monkeypatch.setattr("trtc.bench.server_rates.offline_throughput", lambda *_: 1000.0)
    folder, out = opt_engine("pre_norm"), tmp_path / "rates.json"
    options = f"--paced --engine-dir {folder} --requests 20 --rates 200 inf --seconds 0.05 --json {out}"
    monkeypatch.setattr(sys, "argv", ["server_load", *options.split()])
    server_load.main()
    record = json.loads(out.read_text())
    assert [each["requests"] for each in record["rates"]] == [10, 20]
    for each in record["rates"]:
        assert (
            0 < each["ttft_p50_ms"] <= each["ttft_p99_ms"] and 0 < each["tpot_p50_ms"] <= each["tpot_p99_ms"]
        )
        # at most `max_batch_size` tokens a step
        assert 0 < each["output_tok_s"] < BUILD.max_batch_size / paced.STEP_S
        assert each["of_offline"] == pytest.approx(each["output_tok_s"] / 1000, abs=1e-3)
    table = server_tables.rates(record)
    assert f"| all at once | {record['rates'][1]['ttft_p50_ms']}" in table
    assert all(line in table for line in capsys.readouterr().out.split() if line.startswith("TTFT"))
