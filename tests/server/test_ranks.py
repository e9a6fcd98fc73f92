"""A server whose engine is spread over ranks. Oracle: the tokens that one rank generates in this process."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from trtc.runtime.llm import LLM
from trtc.runtime.sampling_params import SamplingParams
from trtc.tests.tiny_opt import build_tiny_opt

from .running import LIMIT_S, RunningServer, wait_until

TOKENS = 64
PROMPT = "The council of"


@pytest.mark.slow
def test_ranks_serve_and_drain_together(engine: Path, tmp_path: Path) -> None:
    """A request that is under way when SIGTERM comes is finished by all ranks; then they end well."""
    folder = build_tiny_opt(tmp_path / "tiny-opt", "--tp-size", "2", "--use-parallel-embedding")
    server = RunningServer(folder, "--nproc", "2")
    body = {"model": "tiny-opt", "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(httpx.post, f"{server.url}/v1/completions", json=body, timeout=LIMIT_S)
        wait_until(lambda: answer.done() or server.metrics()["trtc_sequences_running"])
        server.process.send_signal(signal.SIGTERM)
        code = server.wait()
    assert code == 0
    assert [entry["event"] for entry in server.log][-1] == "stopped"
    with LLM(engine) as llm:
        expected = llm.generate(PROMPT, SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True))
    assert answer.result().raise_for_status().json()["choices"][0]["text"] == expected[0].outputs[0].text
