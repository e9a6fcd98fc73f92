"""Many tasks on one engine. Oracle: the toy model's definition; the page pool, which must be empty at the end."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Coroutine
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest
import torch
from trtc.core.errors import EngineError, RequestError
from trtc.runtime.async_llm import AsyncLLM
from trtc.runtime.engine_thread import RequestStats
from trtc.runtime.outputs import RequestOutput
from trtc.runtime.sampling_params import SamplingParams
from trtc.runtime.step_input import StepInput
from trtc.runtime.tokenizer import Tokenizer

from .toy import ToyExecutor, greedy_tokens

T = TypeVar("T")
LIMIT_S = 60


def greedy(max_tokens: int, **others: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **others)


@dataclass
class SteppedToy(ToyExecutor):
    """Takes a step only when it is allowed one."""

    allowed: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def execute(self, step: StepInput) -> torch.Tensor:
        assert self.allowed.acquire(timeout=LIMIT_S), "the test allows too few steps"
        return super().execute(step)


@dataclass
class PreparingToy(SteppedToy):
    """Has pieces to prepare; each waits until it is allowed."""

    pieces: int = 4
    begun: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    order: list[str] = field(default_factory=list)

    def prepare(self) -> bool:
        if not self.pieces:
            self.order.append("nothing")
            return False
        self.begun.release()
        assert self.allowed.acquire(timeout=LIMIT_S), "the test allows too few pieces"
        self.pieces -= 1
        self.order.append("piece")
        return True

    def execute(self, step: StepInput) -> torch.Tensor:
        self.order.append("step")
        return super().execute(step)


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(work, LIMIT_S))


async def read(llm: AsyncLLM, prompt: Any, params: SamplingParams, **options: Any) -> list[RequestOutput]:
    return [output async for output in llm.generate(prompt, params, **options)]


def assert_idle(llm: AsyncLLM) -> None:
    assert llm._engine.desk.wait_idle(LIMIT_S), "a request is stuck"
    llm._core.check_integrity()
    assert not llm._core.has_unfinished
    assert llm.stats().num_used_pages == llm.stats().num_running == llm.stats().num_waiting == 0


def test_an_idle_engine_prepares_until_somebody_comes() -> None:
    """A request waits for one piece at most; the rest follows when it has ended, and nobody asks again when all is done."""
    executor = PreparingToy()

    async def main() -> None:
        async with AsyncLLM.from_executor(executor) as llm:
            executor.allowed.release()
            for _ in range(2):  # the first piece is done, the second under way
                assert await asyncio.to_thread(executor.begun.acquire, timeout=LIMIT_S)
            reader = asyncio.create_task(read(llm, [5, 6], greedy(2)))
            while llm._engine._commands.empty():
                await asyncio.sleep(0.001)
            executor.allowed.release(10)
            assert (await reader)[-1].outputs[0].token_ids == greedy_tokens([5, 6], 2, ignore_eos=True)
            while "nothing" not in executor.order:
                await asyncio.sleep(0.001)
            await read(llm, [7], greedy(1))
            assert_idle(llm)

    run(main())
    assert executor.order == ["piece", "piece", "step", "step", "piece", "piece", "nothing", "step"]


def test_tasks_share_the_engine_and_each_gets_its_own_tokens() -> None:
    async def main() -> None:
        executor = ToyExecutor()
        async with AsyncLLM.from_executor(executor) as llm:
            prompts = [[3 + i, 7] for i in range(12)]
            results = await asyncio.gather(*(read(llm, p, greedy(5 + i)) for i, p in enumerate(prompts)))
            for i, (prompt, outputs) in enumerate(zip(prompts, results, strict=True)):
                expected = greedy_tokens(prompt, 5 + i, ignore_eos=True)
                assert outputs[-1].finished and not any(output.finished for output in outputs[:-1])
                for output in outputs:
                    ids = output.outputs[0].token_ids
                    assert ids == expected[: len(ids)]
                assert outputs[-1].outputs[0].token_ids == expected
            assert_idle(llm)
        assert executor.closed
        assert max(step.num_sequences for step in executor.steps) == 4, "requests did not run together"

    run(main())


def test_without_stream_there_is_one_output() -> None:
    async def main() -> None:
        async with AsyncLLM.from_executor(ToyExecutor()) as llm:
            (output,) = await read(llm, [5], greedy(9, n=3, seed=1), stream=False)
            assert [c.token_ids for c in output.outputs] == [greedy_tokens([5], 9, ignore_eos=True)] * 3

    run(main())


def test_text(byte_level: Tokenizer) -> None:
    """Oracle: the tokenizer itself."""

    async def main() -> None:
        executor = WideToy(vocab_size=300)
        async with AsyncLLM.from_executor(executor, byte_level) as llm:
            output = (await read(llm, "the cat", greedy(6)))[-1]
            assert (output.prompt, output.prompt_token_ids) == ("the cat", byte_level.encode("the cat"))
            assert output.outputs[0].text == byte_level.decode(output.outputs[0].token_ids)

    run(main())


class WideToy(ToyExecutor):
    """The toy model with room for the ids of the test tokenizer in its prompts."""

    def execute(self, step: StepInput) -> torch.Tensor:
        return torch.nn.functional.pad(super().execute(step)[:, :50], (0, 250), value=-100.0)


def test_a_slow_reader_misses_outputs_and_no_tokens() -> None:
    async def main() -> None:
        async with AsyncLLM.from_executor(ToyExecutor()) as llm:
            outputs = []
            async for output in llm.generate([5], greedy(30)):
                outputs.append(output)
                await asyncio.to_thread(llm._engine.desk.wait_idle, LIMIT_S)
            assert len(outputs) <= 3, "outputs pile up"
            assert outputs[-1].outputs[0].token_ids == greedy_tokens([5], 30, ignore_eos=True)

    run(main())


@pytest.mark.parametrize("way", ["task cancelled", "loop left", "generator closed"])
def test_a_reader_that_goes_away_frees_its_pages_and_disturbs_nobody(way: str) -> None:
    async def main() -> None:
        executor = SteppedToy()
        async with AsyncLLM.from_executor(executor) as llm:
            first = asyncio.Event()

            async def leave() -> None:
                async with aclosing(llm.generate([9, 9], greedy(40))) as outputs:
                    async for _ in outputs:
                        first.set()
                        if way == "loop left":
                            break
                        if way == "generator closed":
                            await outputs.aclose()

            leaver = asyncio.create_task(leave())
            stayer = asyncio.create_task(read(llm, [5], greedy(12)))
            executor.allowed.release(2)
            await first.wait()
            if way == "task cancelled":
                leaver.cancel()
            await asyncio.gather(leaver, return_exceptions=True)
            assert leaver.cancelled() == (way == "task cancelled")
            executor.allowed.release(14)  # not enough for the 40 tokens of the one who left
            assert (await stayer)[-1].outputs[0].token_ids == greedy_tokens([5], 12, ignore_eos=True)
            assert_idle(llm)
            executor.allowed.release(100)

    run(main())


def test_a_loop_that_is_closed_leaves_nothing_behind() -> None:
    executor = SteppedToy()
    llm = AsyncLLM.from_executor(executor)
    loop = asyncio.new_event_loop()
    executor.allowed.release(1)
    generator = llm.generate([5], greedy(40))
    loop.run_until_complete(asyncio.wait_for(anext(generator), LIMIT_S))
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()
    executor.allowed.release(5)
    assert_idle(llm)
    llm.shutdown()


def test_an_error_in_the_engine_reaches_everybody() -> None:
    async def main() -> None:
        executor = SteppedToy(fail_next=True)
        llm = AsyncLLM.from_executor(executor)
        readers = [asyncio.create_task(read(llm, [5 + i], greedy(8))) for i in range(6)]
        while llm.stats().num_running + llm.stats().num_waiting == 0:
            await asyncio.sleep(0.001)
        assert llm.failure is None
        executor.allowed.release(1)
        message = "the engine failed: RuntimeError: the device is on fire"
        for result in await asyncio.gather(*readers, return_exceptions=True):
            assert isinstance(result, EngineError) and str(result) == message
        with pytest.raises(EngineError, match=message):
            await read(llm, [5], greedy(1))
        assert llm.failure == message
        assert_idle(llm)
        llm.shutdown()

    run(main())


def test_drain_finishes_what_runs_and_takes_nothing_new() -> None:
    async def main() -> None:
        executor = SteppedToy()
        async with AsyncLLM.from_executor(executor) as llm:
            reader = asyncio.create_task(read(llm, [5], greedy(8)))
            while llm.stats().num_running == 0:
                await asyncio.sleep(0.001)
            assert not await llm.drain(timeout_s=0.01)
            with pytest.raises(RequestError, match="draining"):
                await read(llm, [6], greedy(1))
            executor.allowed.release(8)
            assert await llm.drain()
            assert (await reader)[-1].outputs[0].token_ids == greedy_tokens([5], 8, ignore_eos=True)

    run(main())


def test_shutdown_tells_who_still_waits() -> None:
    async def main() -> None:
        executor = SteppedToy()
        llm = AsyncLLM.from_executor(executor)
        reader = asyncio.create_task(read(llm, [5], greedy(40)))
        while llm.stats().num_running == 0:
            await asyncio.sleep(0.001)
        stopping = asyncio.create_task(asyncio.to_thread(llm.shutdown))
        while llm._engine._commands.empty():  # the thread is in its first step
            await asyncio.sleep(0.001)
        executor.allowed.release(1)
        await stopping
        with pytest.raises(EngineError, match="the engine was shut down"):
            await reader
        assert executor.closed and len(executor.steps) == 1
        assert_idle(llm)
        llm.shutdown()

    run(main())


def test_an_engine_that_nobody_holds_is_released() -> None:
    executor = ToyExecutor()
    llm = AsyncLLM.from_executor(executor)
    assert run(read(llm, [5], greedy(2)))[-1].finished
    thread = llm._engine._thread
    del llm
    gc.collect()
    thread.join(LIMIT_S)
    assert not thread.is_alive()
    deadline = time.monotonic() + LIMIT_S
    while not executor.closed and time.monotonic() < deadline:
        time.sleep(0.001)
    assert executor.closed


def test_request_ids() -> None:
    async def main() -> None:
        executor = SteppedToy()
        async with AsyncLLM.from_executor(executor) as llm:
            reader = asyncio.create_task(read(llm, [5], greedy(4), request_id="mine"))
            while llm.stats().num_running == 0:
                await asyncio.sleep(0.001)
            with pytest.raises(RequestError, match="'mine' is in use"):
                await read(llm, [6], greedy(1), request_id="mine")
            executor.allowed.release(20)
            assert {output.request_id for output in await reader} == {"mine"}
            assert (await read(llm, [6], greedy(1), request_id="mine"))[-1].finished

    run(main())


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ("text", greedy(1), "needs a tokenizer"),
        ([], greedy(1), "empty"),
        ([1, 50], greedy(1), "token id 50 at position 1"),
        ([1] * 49, greedy(1), "max_input_len = 48"),
        ([1.5], greedy(1), "its item 0 is 1.5"),
        (None, greedy(1), "it is a NoneType"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_the_engine_cannot_do_is_refused_before_it_runs(
    prompt: Any, params: SamplingParams, message: str
) -> None:
    async def main() -> None:
        executor = ToyExecutor()
        async with AsyncLLM.from_executor(executor) as llm:
            with pytest.raises(RequestError, match=message):
                await read(llm, prompt, params)
        assert not executor.steps

    run(main())


def test_params_of_another_kind_are_refused() -> None:
    async def main() -> None:
        async with AsyncLLM.from_executor(ToyExecutor()) as llm:
            params: Any = {"max_tokens": 3}
            with pytest.raises(
                RequestError, match="sampling_params is a dict; accepted: SamplingParams, or None"
            ):
                await read(llm, [3], params)

    run(main())


def test_the_statistics_of_ended_requests() -> None:
    """Oracle: counts by hand; times must stand in their order."""
    ended: list[RequestStats] = []

    async def main() -> None:
        executor = SteppedToy()
        async with AsyncLLM.from_executor(executor, on_finished=ended.append) as llm:
            executor.allowed.release(6)
            await read(llm, [5, 6, 7], greedy(6, n=2), request_id="done")
            leaver = asyncio.create_task(read(llm, [5], greedy(40), request_id="left", stream=False))
            executor.allowed.release(3)
            while len(executor.steps) < 9:
                await asyncio.sleep(0.001)
            leaver.cancel()
            await asyncio.gather(leaver, return_exceptions=True)
            executor.allowed.release(1)
            assert_idle(llm)

    run(main())
    done, left = ended
    assert (done.request_id, done.outcome, done.num_prompt_tokens, done.num_output_tokens) == (
        "done",
        "length",
        3,
        12,
    )
    assert done.ttft_s is not None and done.tpot_s is not None
    assert 0 < done.ttft_s < done.e2e_s
    assert done.tpot_s == pytest.approx((done.e2e_s - done.ttft_s) / 5)
    assert (left.request_id, left.outcome, left.num_prompt_tokens) == ("left", "abort", 1)
    assert left.num_output_tokens in (3, 4) and left.ttft_s is not None


def test_who_is_told_of_ended_requests_may_fail(caplog: pytest.LogCaptureFixture) -> None:
    """Neither that request nor another one suffers."""

    def broken(stats: RequestStats) -> None:
        raise ValueError(f"no place for {stats.request_id}")

    async def main() -> None:
        async with AsyncLLM.from_executor(ToyExecutor(), on_finished=broken) as llm:
            for name in ("a", "b"):
                outputs = await read(llm, [5, 6], greedy(3), request_id=name)
                assert outputs[-1].outputs[0].token_ids == greedy_tokens([5, 6], 3, ignore_eos=True)
            assert llm.failure is None
            assert_idle(llm)

    run(main())
    assert "on_finished failed" in caplog.text and "ValueError: no place for b" in caplog.text


def test_a_request_that_takes_too_long_ends_and_says_so() -> None:
    async def main() -> None:
        ended: list[RequestStats] = []
        executor = SteppedToy()
        async with AsyncLLM.from_executor(executor, on_finished=ended.append) as llm:
            later = [0.0]
            llm._core._clock = lambda: time.perf_counter() + later[0]
            executor.allowed.release(3)
            outputs = llm.generate([5, 6], greedy(30), timeout_s=1000)
            async with aclosing(outputs):
                async for output in outputs:
                    last = output
                    if len(output.outputs[0].token_ids) == 3:
                        later[0] = 1000
                        executor.allowed.release(30)  # a step under way ends, and the deadline is noticed
            assert last.finished and last.outputs[0].finish_reason == "timeout"
            count = len(last.outputs[0].token_ids)
            assert count in (3, 4)
            assert last.outputs[0].token_ids == greedy_tokens([5, 6], count, ignore_eos=True)
            assert_idle(llm)
            assert [(stats.outcome, stats.num_output_tokens) for stats in ended] == [("timeout", count)]

    run(main())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timeout_s": 0}, "timeout_s is 0; accepted: a number of seconds above 0"),
        ({"timeout_s": float("nan")}, "timeout_s is nan"),
        ({"timeout_s": True}, "timeout_s is True"),
        ({"timeout_s": 10**400}, "timeout_s is 1000"),
        ({"timeout_s": "5"}, "timeout_s is '5'"),
        ({"priority": 1.5}, "priority is 1.5; accepted: an integer"),
        ({"priority": None}, "priority is None"),
    ],
)
def test_bad_places_in_line_are_refused(options: dict[str, Any], message: str) -> None:
    async def main() -> None:
        async with AsyncLLM.from_executor(ToyExecutor()) as llm:
            with pytest.raises(RequestError, match=message):
                await read(llm, [5], greedy(2), **options)

    run(main())
