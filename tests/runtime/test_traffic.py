"""Random traffic against one engine core: arrivals, cancels, deadlines, priorities, shared beginnings, failing steps.

Oracle: `check_integrity` after every step, and at the end each request's tokens when it runs alone on a fresh cache. The toy
executor knows a text only from the pages that its page table names, so a page that is shared by mistake gives other tokens.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import chain

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from trtc.core.errors import RequestError
from trtc.runtime.engine_core import EngineCore
from trtc.runtime.outputs import CompletionOutput
from trtc.runtime.sampling_params import SamplingParams

from .test_decode_ahead import LoopToy
from .test_step_queue import BehindToy, QueueToy
from .toy import ToyExecutor

MOST_TOKENS = 13
TICK_S = 0.0005
"""Time that a step takes: short beside `BURST_SECONDS`, so that steps that run ahead do so in bursts."""
WORDS = [[1, 2, 3, 4], [1, 2, 3, 5], [5, 1, 1, 1, 1, 1, 1, 1]]
LONGEST_PROMPT = 3 * 8 + 3

# Texts of few words: many begin alike, and the same words come behind different ones.
PROMPTS = st.tuples(
    st.lists(st.sampled_from(WORDS), max_size=3), st.lists(st.integers(0, 5), min_size=1, max_size=3)
).map(lambda parts: (*chain.from_iterable(parts[0]), *parts[1]))

PARAMS = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, MOST_TOKENS),
    temperature=st.sampled_from([0.0, 0.0, 1.0]),
    seed=st.integers(0, 3),
    n=st.sampled_from([1, 1, 1, 3]),
    ignore_eos=st.booleans(),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.2]),
    prompt_logprobs=st.sampled_from([None, None, 0]),
    logprobs=st.sampled_from([None, None, 1]),
)

BEAMS = st.builds(
    lambda width, **values: SamplingParams(beam_width=width, n=width, **values),
    width=st.integers(2, 3),
    max_tokens=st.integers(1, MOST_TOKENS),
    ignore_eos=st.booleans(),
    length_penalty=st.sampled_from([0.5, 1.0]),
    early_stopping=st.booleans(),
)


@lru_cache(maxsize=1000)
def alone(prompt: tuple[int, ...], params: SamplingParams) -> list[CompletionOutput]:
    core = EngineCore(ToyExecutor(num_pages=100, max_num_tokens=100), enable_prefix_cache=False)
    core.add_request("alone", prompt, params)
    while core.has_unfinished:
        outputs = core.step()
    return outputs[0].outputs


def is_right(output: CompletionOutput, expected: CompletionOutput) -> bool:
    """A completion that ran out of time has the first of the tokens that it would have got."""
    if output.finish_reason != "timeout":
        return output == expected
    return output.token_ids == expected.token_ids[: len(output.token_ids)]


class Traffic(RuleBasedStateMachine):
    @initialize(
        executor=st.sampled_from([ToyExecutor, LoopToy, QueueToy, BehindToy]),
        page_size=st.sampled_from([1, 2, 4, 8]),
        spare_pages=st.integers(0, 16),
        max_batch_size=st.integers(1, 5),
        max_num_tokens=st.sampled_from([1, 2, 7, 64]),
        enable_prefix_cache=st.sampled_from([True, True, True, False]),
    )
    def start(
        self,
        executor: type[ToyExecutor],
        page_size: int,
        spare_pages: int,
        max_batch_size: int,
        max_num_tokens: int,
        enable_prefix_cache: bool,
    ) -> None:
        enough_for_one = -(-(LONGEST_PROMPT + MOST_TOKENS - 1) // page_size)
        self.executor = executor(
            num_pages=enough_for_one + spare_pages,
            page_size=page_size,
            max_batch_size=max_batch_size,
            max_num_tokens=max_num_tokens,
            max_beam_width=max_batch_size,
        )
        self.now = 0.0
        self.core = EngineCore(self.executor, enable_prefix_cache=enable_prefix_cache, clock=lambda: self.now)
        self.requests: dict[str, tuple[tuple[int, ...], SamplingParams]] = {}
        self.unfinished: list[str] = []

    @rule(
        prompt=PROMPTS,
        params=PARAMS,
        priority=st.sampled_from([0, 0, 0, -1, 2]),
        patience=st.sampled_from([None, None, None, 5, 20]),
    )
    def arrive(
        self, prompt: tuple[int, ...], params: SamplingParams, priority: int, patience: int | None
    ) -> None:
        name = str(len(self.requests))
        self.requests[name] = (prompt, params)
        self.unfinished.append(name)
        deadline = None if patience is None else self.now + patience * TICK_S
        self.core.add_request(name, prompt, params, priority=priority, deadline=deadline)

    @rule(prompt=PROMPTS, params=BEAMS)
    def arrive_to_search(self, prompt: tuple[int, ...], params: SamplingParams) -> None:
        try:
            self.core.check_request(prompt, params)
        except RequestError:  # too many beams for this engine
            return
        self.arrive(prompt, params, 0, None)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), params=PARAMS)
    def arrive_again(self, data: st.DataObject, params: SamplingParams) -> None:
        """A prompt that was seen before, whole or in part."""
        prompt = self.requests[data.draw(st.sampled_from(list(self.requests)))][0]
        self.arrive(prompt[: data.draw(st.integers(1, len(prompt)))], params, 0, None)

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
        while self.unfinished and self.executor.fail_next:
            try:
                self.step()  # fails, unless there was only a deadline to be noticed
            except RuntimeError:
                return
        assert not self.unfinished, "the step did not fail"
        self.executor.fail_next = False

    @invariant()
    def is_sound(self) -> None:
        if hasattr(self, "core"):
            self.core.check_integrity()
            assert self.core.has_unfinished == bool(self.unfinished)

    def step(self) -> None:
        self.now += TICK_S
        for output in self.core.step():
            assert output.request_id in self.unfinished, "an output of a request that is not in the engine"
            if output.finished:
                self.unfinished.remove(output.request_id)
                expected = alone(*self.requests[output.request_id])
                assert all(map(is_right, output.outputs, expected)), (output.outputs, expected)
        self.core.check_integrity()

    def teardown(self) -> None:
        if not hasattr(self, "core"):
            return
        tokens_left = len(self.unfinished) * 3 * (LONGEST_PROMPT + MOST_TOKENS)
        for _ in range(10 * tokens_left):
            if self.unfinished:
                self.step()
        assert not self.unfinished, f"{self.unfinished} never end"
        assert self.core.scheduler.pool.num_used == 0


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(
    max_examples=80, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
