"""Random traffic against one engine core: arrivals, cancels, failing steps, few pages.

Oracle: `check_integrity` after every step, and at the end each request's tokens when it runs alone.
"""

from __future__ import annotations

from functools import lru_cache

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from trtc.runtime.engine_core import EngineCore
from trtc.runtime.outputs import CompletionOutput
from trtc.runtime.sampling_params import SamplingParams

from .toy import ToyExecutor

LONGEST_PROMPT, MOST_TOKENS = 20, 13

PARAMS = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, MOST_TOKENS),
    temperature=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 3),
    n=st.sampled_from([1, 1, 1, 2]),
    ignore_eos=st.booleans(),
    repetition_penalty=st.sampled_from([1.0, 1.2]),
    prompt_logprobs=st.sampled_from([None, None, 0]),
    logprobs=st.sampled_from([None, 1]),
)


@lru_cache(maxsize=1000)
def alone(prompt: tuple[int, ...], params: SamplingParams) -> list[CompletionOutput]:
    core = EngineCore(ToyExecutor(num_pages=100, max_num_tokens=100))
    core.add_request("alone", prompt, params)
    while core.has_unfinished:
        outputs = core.step()
    return outputs[0].outputs


class Traffic(RuleBasedStateMachine):
    @initialize(
        page_size=st.sampled_from([1, 4, 8]),
        spare_pages=st.integers(0, 12),
        max_batch_size=st.integers(1, 5),
        max_num_tokens=st.sampled_from([1, 2, 7, 64]),
    )
    def start(self, page_size: int, spare_pages: int, max_batch_size: int, max_num_tokens: int) -> None:
        enough_for_one = -(-(LONGEST_PROMPT + MOST_TOKENS - 1) // page_size)
        self.executor = ToyExecutor(
            num_pages=enough_for_one + spare_pages,
            page_size=page_size,
            max_batch_size=max_batch_size,
            max_num_tokens=max_num_tokens,
        )
        self.core = EngineCore(self.executor)
        self.requests: dict[str, tuple[tuple[int, ...], SamplingParams]] = {}
        self.unfinished: list[str] = []
        self.num_cancelled = 0

    @rule(prompt=st.lists(st.integers(0, 5), min_size=1, max_size=LONGEST_PROMPT), params=PARAMS)
    def arrive(self, prompt: list[int], params: SamplingParams) -> None:
        name = str(len(self.requests))
        self.requests[name] = (tuple(prompt), params)
        self.unfinished.append(name)
        self.core.add_request(name, prompt, params)

    @precondition(lambda self: self.unfinished)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.unfinished))
        assert self.core.cancel(name)
        self.unfinished.remove(name)

    @precondition(lambda self: self.unfinished)
    @rule(count=st.integers(1, 6))
    def run_steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    @precondition(lambda self: self.unfinished)
    @rule()
    def fail_a_step(self) -> None:
        self.executor.fail_next = True
        try:
            self.core.step()
        except RuntimeError:
            return
        raise AssertionError("the step did not fail")

    @invariant()
    def is_sound(self) -> None:
        if hasattr(self, "core"):
            self.core.check_integrity()
            assert self.core.has_unfinished == bool(self.unfinished)

    def step(self) -> None:
        for output in self.core.step():
            assert output.request_id in self.unfinished, "an output of a request that is not in the engine"
            if output.finished:
                self.unfinished.remove(output.request_id)
                assert output.outputs == alone(*self.requests[output.request_id])
        self.core.check_integrity()

    def teardown(self) -> None:
        if not hasattr(self, "core"):
            return
        tokens_left = len(self.unfinished) * 2 * (LONGEST_PROMPT + MOST_TOKENS)
        for _ in range(10 * tokens_left):
            if self.unfinished:
                self.step()
        assert not self.unfinished, f"{self.unfinished} never end"
        assert self.core.scheduler.pool.num_used == 0


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(
    max_examples=80, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
