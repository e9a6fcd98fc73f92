"""Steps that begin before the tokens of the one before are known give the tokens of steps that do not. Oracle: the toy model's
own definition."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trtc.core.errors import EngineError, RequestError
from trtc.runtime.decode_ahead import CROWD
from trtc.runtime.engine_core import EngineCore
from trtc.runtime.executor import LoopBehindSteps, StepStarter
from trtc.runtime.llm import LLM
from trtc.runtime.prompt_lookup import PromptLookup
from trtc.runtime.sampling_params import SamplingParams
from trtc.runtime.step_input import Int32Array, StepInput

from .test_decode_ahead import PROMPTS, LoopToy, Prompt, check_tokens, generate
from .toy import EOS, VOCAB_SIZE, ToyExecutor, greedy_tokens


@dataclass
class QueueToy(LoopToy):
    """The toy with a queue of steps: each is computed as late as it can be, when its ticket is collected."""

    max_draft_tokens: int | None = None
    queued: deque[tuple[StepInput, Int32Array | None]] = field(default_factory=deque)
    most_queued: int = 0
    widest: int = 0
    """Tokens of the largest step that began with another one under way."""

    def choose(self, step: StepInput) -> Int32Array:
        assert not self.queued, "a step in between"
        return self._choose(step)

    def start_step(self, step: StepInput, source: Int32Array | None) -> int:
        assert not self.pending, "a step while the loop runs"
        assert source is None or self.queued, "tokens of a step that is not under way"
        assert step.kv_length.max() < self.max_seq_len, "a sequence goes on behind its end"
        if source is not None:
            decoding = np.cumprod(np.diff(step.query_start) == 1).sum()
            assert (source[decoding:] < 0).all(), "a token to come behind a sequence with several"
        if self.queued:
            self.widest = max(self.widest, step.num_tokens)
        self.queued.append((step, source))
        self.most_queued = max(self.most_queued, len(self.queued))
        return len(self.queued)

    def finish_step(self, ticket: int) -> Int32Array:
        step, source = self.queued.popleft()
        token_ids = step.token_ids
        if source is not None:
            token_ids = np.where(source >= 0, self._last[source], token_ids)
        try:
            self._last = self._choose(replace(step, token_ids=token_ids))
        except RuntimeError:
            self.queued.clear()  # nobody collects what is behind a step that has failed
            raise
        return self._last

    def _choose(self, step: StepInput) -> Int32Array:
        assert ((step.token_ids >= 0) & (step.token_ids < VOCAB_SIZE)).all(), "a token that nobody knows"
        return self.execute(step).argmax(-1).numpy().astype(np.int32)

    def loop_load(self, token_ids: Int32Array, kv_length: Int32Array, page_table: Int32Array) -> None:
        assert not self.queued, "the loop while a step is under way"
        super().loop_load(token_ids, kv_length, page_table)


@dataclass
class BehindToy(QueueToy):
    """The toy whose loop may go on from a step that is under way: it takes that step's tokens when they are there."""

    source: Int32Array | None = None
    loads_behind: int = 0
    _last: Int32Array = field(default_factory=lambda: np.zeros(64, np.int32))

    def loop_load_behind(
        self, token_ids: Int32Array, source: Int32Array, kv_length: Int32Array, page_table: Int32Array
    ) -> None:
        assert len(self.queued) == 1, "behind which step?"
        assert ((token_ids < 0) == (source >= 0)).all(), "a token that is known, or one that nobody chooses"
        LoopToy.loop_load(self, token_ids, kv_length, page_table)
        self.source = source
        self.loads_behind += 1

    def loop_collect(self, ticket: int) -> Int32Array:
        assert not self.queued, "the step before has not been collected"
        if self.source is not None:
            token_ids, kv_length, page_table = self._rows
            # not so many where that step has failed: what follows is thrown away
            chosen = np.resize(self._last, 64)
            self._rows = (
                np.where(self.source >= 0, chosen[self.source], token_ids),
                kv_length,
                page_table,
            )
            self.source = None
        return super().loop_collect(ticket)


TOYS = pytest.mark.parametrize("toy", [QueueToy, BehindToy])


def test_the_toys_are_what_the_engine_looks_for() -> None:
    assert isinstance(QueueToy(), StepStarter) and not isinstance(LoopToy(), StepStarter)
    assert isinstance(BehindToy(), LoopBehindSteps) and not isinstance(QueueToy(), LoopBehindSteps)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(PROMPTS, min_size=1, max_size=9),
    st.sampled_from([16, 20, 64]),
    st.integers(2, 6),
    st.sets(st.integers(0, 8), max_size=2),
)
@TOYS
def test_tokens_are_those_of_the_model(
    toy: type[QueueToy], prompts: list[Prompt], num_pages: int, max_batch_size: int, cancel: set[int]
) -> None:
    """Any mix of lengths, ends and cancels, with pages plenty or scarce."""
    check_tokens(toy(num_pages=num_pages, max_batch_size=max_batch_size), prompts, cancel)


def test_prompts_are_computed_one_behind_the_other() -> None:
    """A prompt of three steps beside a sequence that decodes: each step begins before the one before has ended."""
    executor = QueueToy(max_num_tokens=8)
    prompts = [([5, 6], 20, True), (list(range(1, 23)), 4, True)]
    results = generate(executor, prompts)
    assert results == {
        str(index): greedy_tokens(prompt, max_tokens, ignore_eos=True)
        for index, (prompt, max_tokens, _) in enumerate(prompts)
    }
    assert executor.most_queued == 2 and executor.widest == 8


def test_the_loop_begins_before_the_last_prompts_have_their_tokens() -> None:
    """One of three ends with its first token, another is at its length then: nothing of them is kept but that."""
    pairs = product(range(1, VOCAB_SIZE), repeat=2)
    ending = next([*pair] for pair in pairs if greedy_tokens(pair, 1) == [EOS])
    executor = BehindToy()
    results = generate(executor, [(ending, 9, False), ([5, 6], 1, True), ([7, 8, 9], 20, True)])
    assert results == {
        "0": [EOS],
        "1": greedy_tokens([5, 6], 1),
        "2": greedy_tokens([7, 8, 9], 20, ignore_eos=True),
    }
    assert executor.loads_behind == 1 and executor.loads == 1
    prompt_step, loop_step = executor.steps[:2]
    assert prompt_step.num_tokens == 7 and loop_step.num_sequences == 2, (
        "nobody waits behind the length of the second"
    )


def test_guesses_are_made_of_tokens_that_are_there() -> None:
    executor = BehindToy(max_draft_tokens=8)
    core = EngineCore(executor, prompt_lookup=PromptLookup(2, 4))
    core.add_request("a", [5, 6, 5, 6], SamplingParams(max_tokens=12, temperature=0, ignore_eos=True))
    results: dict[str, list[int]] = {}
    while core.has_unfinished:
        results |= {output.request_id: output.outputs[0].token_ids for output in core.step()}
    assert results == {"a": greedy_tokens([5, 6, 5, 6], 12, ignore_eos=True)} and not executor.loads_behind


def test_the_time_of_the_step_before_is_not_that_of_the_loop() -> None:
    """Steps of the loop take 0.75 ms, that of the prompts a second: bursts of 1.5 ms have two of them."""
    now = [0.0]

    @dataclass
    class Timed(BehindToy):
        def finish_step(self, ticket: int) -> Int32Array:
            now[0] += 1.0
            return super().finish_step(ticket)

        def loop_collect(self, ticket: int) -> Int32Array:
            now[0] += 0.00075 * ticket
            return super().loop_collect(ticket)

    executor = Timed()
    core = EngineCore(executor, clock=lambda: now[0])
    core.add_request("a", [5, 6], SamplingParams(max_tokens=20, temperature=0, ignore_eos=True))
    while core.has_unfinished:
        core.step()
    assert executor.bursts[:4] == [1, 1, 2, 2]


@pytest.mark.parametrize("fails", ["the step", "the loop behind it"])
def test_what_is_behind_a_step_that_failed_is_forgotten(fails: str) -> None:
    executor = BehindToy()
    core = EngineCore(executor)
    for index in range(3):
        core.add_request(
            str(index), [5 + index, 6], SamplingParams(max_tokens=9, temperature=0, ignore_eos=True)
        )
    name = "finish_step" if fails == "the step" else "loop_collect"
    call = getattr(executor, name)

    def failing(ticket: int) -> Int32Array:
        setattr(executor, name, call)
        call(ticket)
        raise RuntimeError("the device is on fire")

    setattr(executor, name, failing)
    assert run(core, RuntimeError) == {
        str(index): greedy_tokens([5 + index, 6], 9, ignore_eos=True) for index in range(3)
    }
    if fails == "the step":
        assert executor.loads_behind == 2, "and again when the prompts were"
    else:
        assert executor.loads == 2, "the first of them behind the step"


def crowd(executor: ToyExecutor) -> EngineCore:
    """More sequences than run at once."""
    core = EngineCore(executor)
    for index in range(40):
        params = SamplingParams(max_tokens=4 + index % 3, temperature=0, ignore_eos=True)
        core.add_request(str(index), [1 + index, 3], params, stream=False)
    return core


def test_a_crowd_decodes_step_by_step_while_others_wait() -> None:
    executor = QueueToy(max_batch_size=36, max_num_tokens=128, num_pages=400)
    core = crowd(executor)
    while core.scheduler.waiting or not core.scheduler.running:
        core.step()
        core.check_integrity()
    assert executor.most_queued == 2 and executor.loads == 0


def test_nobody_gives_way_to_one_in_line_while_his_last_token_is_chosen() -> None:
    """The pages of one that is about to end are what the other waits for."""
    executor = QueueToy(num_pages=2 * CROWD + 2, max_batch_size=64, max_num_tokens=256)
    core = EngineCore(executor)
    for index in range(CROWD):
        params = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)
        core.add_request(str(index), [1 + index, 3], params, stream=False)
    params = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)
    core.add_request("late", list(range(1, 49)), params, stream=False, priority=1)
    finished = []
    while core.has_unfinished:
        finished += [output.request_id for output in core.step()]
        core.check_integrity()
    assert finished[-1] == "late" and len(finished) == CROWD + 1
    assert sum(step.num_tokens for step in executor.steps) == CROWD * (2 + 1) + 48 + 1, "computed twice"


def test_nothing_is_computed_behind_the_longest_sequence() -> None:
    """Sequences reach max_seq_len one after the other while others wait for their places."""
    executor = QueueToy(max_batch_size=33, max_num_tokens=128, num_pages=600)
    core = EngineCore(executor)
    for index in range(36):
        prompt = [1 + index, *range(1, 45)]
        core.add_request(str(index), prompt, SamplingParams(max_tokens=None, temperature=0, ignore_eos=True))
    outputs: dict[str, list[int]] = {}
    while core.has_unfinished:
        for output in core.step():
            before, tokens = outputs.get(output.request_id, []), output.outputs[0].token_ids
            assert tokens[:-1] == before, "one more token at a time, each known"
            outputs[output.request_id] = tokens
    assert {len(tokens) for tokens in outputs.values()} == {executor.max_seq_len - 45}


@TOYS
@pytest.mark.parametrize("breaks", [1, 2, 4])
def test_steps_that_failed_are_planned_again(breaks: int, toy: type[QueueToy]) -> None:
    """Nothing of the step that failed, and of what is behind it, is left."""
    executor = toy(max_batch_size=8, max_num_tokens=12)
    core = crowd(executor)
    finish, count = executor.finish_step, 0

    def failing(ticket: int) -> Int32Array:
        nonlocal count
        count += 1
        if count == breaks:
            executor.queued.clear()
            raise RuntimeError("the device is on fire")
        return finish(ticket)

    executor.finish_step = failing  # type: ignore[method-assign]
    results = run(core, RuntimeError)
    assert results == {
        str(index): greedy_tokens([1 + index, 3], 4 + index % 3, ignore_eos=True) for index in range(40)
    }


def run(core: EngineCore, expected: type[Exception]) -> dict[str, list[int]]:
    results: dict[str, list[int]] = {}
    raised = 0
    while core.has_unfinished:
        try:
            outputs = core.step()
        except expected:
            raised += 1
            outputs = []
        core.check_integrity()
        results |= {output.request_id: output.outputs[0].token_ids for output in outputs}
    assert raised == 1
    return results


@TOYS
def test_logits_that_are_not_finite_are_found(toy: type[QueueToy]) -> None:
    executor = toy()
    core = EngineCore(executor)
    core.add_request("a", [5], SamplingParams(max_tokens=8, temperature=0))
    choose: Callable[[StepInput], Int32Array] = executor._choose
    executor._choose = lambda step: np.full_like(choose(step), -1)  # type: ignore[method-assign]
    assert core.step() == []  # it has begun
    with pytest.raises(EngineError, match="not finite"):
        core.step()
    core.check_integrity()
    assert core.cancel("a") and core.scheduler.pool.num_used == 0


@dataclass
class WatchedToy(BehindToy):
    """Keeps how many requests are in the engine when a step begins."""

    known: list[int] = field(default_factory=list)
    llm: LLM | None = None

    def start_step(self, step: StepInput, source: Int32Array | None) -> int:
        assert self.llm is not None
        self.known.append(len(self.llm.core.scheduler.waiting) + len(self.llm.core.scheduler.running))
        return super().start_step(step, source)


def watched(**sizes: int) -> tuple[LLM, WatchedToy]:
    executor = WatchedToy(**sizes)
    executor.llm = LLM.from_executor(executor)
    return executor.llm, executor


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)


SIX = [[1 + i, *range(1, 8)] for i in range(6)]
"""Prompts of 8 tokens; two fill a step."""


@pytest.mark.parametrize(
    ("sizes", "priority", "known"),
    [
        ({}, 0, 2),
        ({"max_num_tokens": 20}, 0, 3),
        ({"max_num_tokens": 48}, 0, 4),
        ({"max_num_tokens": 64}, 3, 4),
    ],
    ids=["fill a step", "a chunk of the third", "as many as run at once", "a priority of all"],
)
def test_the_device_begins_before_the_last_prompts_are_added(
    sizes: dict[str, int], priority: int, known: int
) -> None:
    llm, executor = watched(**sizes)
    results = llm.generate(SIX, greedy(3), priority=priority)
    assert [r.outputs[0].token_ids for r in results] == [greedy_tokens(p, 3, ignore_eos=True) for p in SIX]
    assert executor.known[0] == known
    assert executor.steps[0].num_tokens == min(executor.max_num_tokens, 8 * executor.max_batch_size)


def test_who_goes_first_is_not_found_at_the_end() -> None:
    llm, executor = watched()
    llm.generate(SIX, greedy(3), priority=[1, 1, 1, 1, 1, 0])
    assert executor.known[0] == 6 and executor.steps[0].token_ids[0] == SIX[-1][0]


def test_nothing_begins_before_all_prompts_were_checked() -> None:
    llm, executor = watched()
    with pytest.raises(RequestError, match="prompt 5: token id 50"):
        llm.generate([*SIX[:-1], [VOCAB_SIZE]], greedy(3))
    assert not executor.known and not executor.queued and not llm.core.has_unfinished
    llm.core.check_integrity()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(PROMPTS, min_size=1, max_size=6), min_size=2, max_size=4), st.integers(8, 24))
def test_what_is_left_of_an_earlier_call_disturbs_no_later_one(
    calls: list[list[Prompt]], max_num_tokens: int
) -> None:
    """Surplus steps of sequences that have ended may still be under way."""
    llm, _ = watched(max_num_tokens=max_num_tokens)
    for prompts in calls:
        params = [
            SamplingParams(max_tokens=n, temperature=0.0, ignore_eos=ignore) for _, n, ignore in prompts
        ]
        results = llm.generate([prompt for prompt, _, _ in prompts], params)
        assert [result.outputs[0].token_ids for result in results] == [
            greedy_tokens(prompt, n, ignore_eos=ignore) for prompt, n, ignore in prompts
        ]
        llm.core.check_integrity()


IDS = st.lists(st.integers(1, 49), min_size=1, max_size=12)
TOKENS = st.integers(1, 10)
PARAMS = st.one_of(
    st.builds(SamplingParams, max_tokens=TOKENS, temperature=st.just(0.0), ignore_eos=st.booleans()),
    st.builds(SamplingParams, max_tokens=TOKENS, seed=st.integers(0, 99), n=st.integers(1, 2)),
    st.builds(SamplingParams, max_tokens=TOKENS, temperature=st.just(0.0), beam_width=st.just(2)),
    st.builds(SamplingParams, max_tokens=TOKENS, temperature=st.just(0.0), prompt_logprobs=st.just(1)),
    st.builds(
        SamplingParams,
        max_tokens=TOKENS,
        temperature=st.just(0.0),
        prompt_lookup=st.just(PromptLookup(2, 3)),
    ),
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(IDS, PARAMS, st.integers(0, 2)), min_size=1, max_size=8), min_size=1, max_size=3
    ),
    st.fixed_dictionaries(
        {
            "num_pages": st.sampled_from([20, 40, 200]),
            "max_batch_size": st.integers(2, 6),
            "max_num_tokens": st.integers(8, 24),
        }
    ),
    st.booleans(),
)
@TOYS
def test_whoever_asks_for_what_gets_what_one_step_after_the_other_gives(
    toy: type[QueueToy],
    calls: list[list[tuple[list[int], SamplingParams, int]]],
    sizes: dict[str, int],
    with_priorities: bool,
) -> None:
    """Greedy, sampled, beams, log-probabilities and guesses in one call. Oracle: the toy that is nothing but an executor."""
    found = []
    for executor in (ToyExecutor(**sizes), toy(**sizes, max_draft_tokens=8)):
        llm = LLM.from_executor(executor, seed=3)
        results = []
        for rows in calls:
            prompts, params, priorities = map(list, zip(*rows, strict=True))
            results += llm.generate(prompts, params, priority=priorities if with_priorities else 0)
            llm.core.check_integrity()
        found.append([[output.token_ids for output in result.outputs] for result in results])
    assert found[0] == found[1]
