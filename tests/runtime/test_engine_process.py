"""An engine in a process of its own. Oracles: `LLM` on the same engine; the operating system, which knows the processes."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from trtc.core.errors import ConfigError, EngineError, RequestError
from trtc.runtime import worker
from trtc.runtime.async_llm import AsyncLLM
from trtc.runtime.engine_thread import RequestStats
from trtc.runtime.llm import LLM
from trtc.runtime.outputs import RequestOutput
from trtc.runtime.sampling_params import SamplingParams

LIMIT_S = 120
ENDED: list[RequestStats] = []


def greedy(max_tokens: int, **others: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **others)


@pytest.fixture(scope="module")
def folder(opt_engine: Callable[[str], Path]) -> Path:
    return opt_engine("pre_norm")


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[AsyncLLM]:
    llm = AsyncLLM(folder, own_process=True, on_finished=ENDED.append)
    yield llm
    llm.shutdown()
    llm.shutdown()  # twice is harmless
    assert llm.failure == "the engine was shut down"
    assert llm._engine._process.returncode == 0  # type: ignore[union-attr]


async def last(llm: AsyncLLM, prompt: list[int], params: SamplingParams, **options: Any) -> RequestOutput:
    return [output async for output in llm.generate(prompt, params, **options)][-1]


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def idle(llm: AsyncLLM) -> bool:
    stats = llm.stats()
    return stats.num_running == stats.num_waiting == stats.num_used_pages == 0


def test_outputs_are_those_of_an_llm(llm: AsyncLLM, folder: Path) -> None:
    cases = [
        ([5, 6, 7], greedy(20)),
        ([9] * 40, greedy(12, logprobs=2, prompt_logprobs=1)),
        ([11, 12], SamplingParams(n=3, seed=4, max_tokens=9, ignore_eos=True)),
        ([13, 14], SamplingParams(n=2, best_of=4, seed=4, max_tokens=9, ignore_eos=True)),
    ]

    async def main() -> list[RequestOutput]:
        streamed = [last(llm, *case) for case in cases]
        whole = [last(llm, *case, stream=False) for case in cases]
        return list(await asyncio.gather(*streamed, *whole))

    ENDED.clear()
    until(lambda: idle(llm))
    before = llm.stats().num_output_tokens
    found = asyncio.run(main())
    with LLM(folder) as oracle:
        expected = oracle.generate([prompt for prompt, _ in cases], [params for _, params in cases]) * 2
    for one, other in zip(found, expected, strict=True):
        assert [each.token_ids for each in one.outputs] == [each.token_ids for each in other.outputs]
        assert one.prompt_token_ids == other.prompt_token_ids and one.finished
        for a, b in zip(one.outputs, other.outputs, strict=True):
            assert [list(entry) for entry in a.logprobs or ()] == [list(entry) for entry in b.logprobs or ()]
            assert (a.cumulative_logprob or 0.0) == pytest.approx(b.cumulative_logprob or 0.0, rel=1e-4)
    assert sorted(stats.outcome for stats in ENDED) == ["length"] * 8
    assert all(stats.ttft_s and 0 < stats.ttft_s <= stats.e2e_s < LIMIT_S for stats in ENDED)
    tokens = before + sum(stats.num_output_tokens for stats in ENDED)
    until(lambda: idle(llm) and llm.stats().num_output_tokens == tokens)


def test_what_cannot_be_served_is_refused_here(llm: AsyncLLM) -> None:
    with pytest.raises(RequestError, match="max_input_len = 100"):
        llm.check_request([1] * 101, greedy(1))
    with pytest.raises(RequestError, match=r"no beam search|max-beam-width"):
        llm.check_request([1], greedy(1, beam_width=2))


def test_a_reader_that_leaves_frees_its_pages(llm: AsyncLLM) -> None:
    async def leave() -> None:
        outputs = llm.generate([3, 4], greedy(100))
        await anext(outputs)
        assert llm._engine.desk.unfinished()
        await outputs.aclose()

    ENDED.clear()
    asyncio.run(leave())
    until(lambda: idle(llm) and [stats.outcome for stats in ENDED] == ["abort"])
    assert llm._engine.desk.wait_idle(LIMIT_S)


def test_who_is_told_of_ended_requests_may_fail(
    llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(stats: RequestStats) -> None:
        raise ValueError(f"no place for {stats.request_id}")

    async def main() -> list[str | None]:
        async with asyncio.timeout(LIMIT_S):
            ended = [await last(llm, [5, 6], greedy(3), request_id=name) for name in ("a", "b")]
        return [output.outputs[0].finish_reason for output in ended]

    monkeypatch.setattr(llm._engine, "_on_finished", broken)
    assert asyncio.run(main()) == ["length", "length"]
    assert "on_finished failed" in caplog.text and "ValueError: no place for b" in caplog.text


def test_errors_of_loading_are_those_of_an_llm(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError) as expected:
        LLM(tmp_path)
    with pytest.raises(EngineError) as found:
        AsyncLLM(tmp_path, own_process=True)
    assert str(found.value) == str(expected.value)
    with pytest.raises(ConfigError, match="cannot hold one sequence"):
        AsyncLLM(folder, num_pages=1, own_process=True)


def test_a_process_that_is_killed_ends_its_requests(folder: Path) -> None:
    llm = AsyncLLM(folder, own_process=True, on_finished=ENDED.append)
    process = llm._engine._process  # type: ignore[union-attr]

    async def main() -> None:
        outputs = llm.generate([3, 4], greedy(100))
        os.kill(process.pid, signal.SIGSTOP)  # so that the request cannot end by itself
        waiting = asyncio.ensure_future(anext(outputs))
        await asyncio.sleep(0)
        process.kill()
        with pytest.raises(EngineError, match="process has ended: exit code -9"):
            await waiting
        with pytest.raises(EngineError, match="exit code -9"):
            await last(llm, [1], greedy(1))

    ENDED.clear()
    asyncio.run(main())
    assert llm.failure == "the engine's process has ended: exit code -9"
    assert [stats.outcome for stats in ENDED] == ["error"]
    llm.shutdown()


BROKEN = """
import sys
from multiprocessing.connection import Connection
from trtc.runtime import load, worker_main

def fails(*arguments):
    raise RuntimeError("no more memory")

def broken(engine, budget):
    executor = load._cpu(engine, budget)
    executor.execute = executor.choose = executor.loop_load = fails
    return executor

load._EXECUTORS["cpu"] = broken
worker_main.main(Connection(int(sys.argv[1])))
"""


def test_an_engine_that_fails_says_why(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The log has the traceback of the other process."""
    (tmp_path / "broken_worker.py").write_text(BROKEN)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setattr(worker, "MODULE", "broken_worker")
    llm = AsyncLLM(folder, own_process=True)
    with caplog.at_level(logging.ERROR), pytest.raises(EngineError, match="RuntimeError: no more memory"):
        asyncio.run(last(llm, [1], greedy(1)))
    llm.shutdown()
    (record,) = [each for each in caplog.records if each.name == "trtc.runtime.engine_thread"]
    assert "in fails" in record.getMessage()


ORPHAN = """
import sys, time
from trtc.runtime.async_llm import AsyncLLM
llm = AsyncLLM(sys.argv[1], own_process=True)
print(llm._engine._process.pid, flush=True)
time.sleep(1000)
"""


def test_nothing_is_left_of_a_program_that_is_killed(folder: Path) -> None:
    program = subprocess.Popen([sys.executable, "-c", ORPHAN, str(folder)], stdout=subprocess.PIPE, text=True)
    assert program.stdout is not None
    pid = int(program.stdout.readline())
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(pid, number)  # as to all processes of a group: it is the program that decides
    time.sleep(0.1)
    assert running(pid)
    program.kill()
    program.wait()
    until(lambda: not running(pid))


def running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
