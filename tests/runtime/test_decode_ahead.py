"""Steps that run ahead of the host give the tokens of steps that do not. Oracle: the toy model's own definition."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from trtc.runtime.engine_core import EngineCore
from trtc.runtime.executor import DecodeLoop
from trtc.runtime.sampling_params import SamplingParams
from trtc.runtime.step_input import Int32Array, StepInput

from .toy import EOS, ToyExecutor, greedy_tokens

NOTHING = 0  # of the vocabulary, so that it can be fed back, and no token of any text


@dataclass
class LoopToy(ToyExecutor):
    """The toy with a decode loop: a step is computed as late as it can be, when its ticket is collected.

    So a step sees what the host did meanwhile, and a page given away while steps are under way gives wrong tokens.
    """

    pending: deque[int] = field(default_factory=deque)
    resting: set[int] = field(default_factory=set)
    rests: list[list[int]] = field(default_factory=list)
    loads: int = 0
    bursts: list[int] = field(default_factory=list)

    def loop_load(self, token_ids: Int32Array, kv_length: Int32Array, page_table: Int32Array) -> None:
        assert not self.pending, "new rows while steps of the old ones are under way"
        self._rows = (token_ids.copy(), kv_length.copy(), page_table.copy())
        self.resting = set()
        self.loads += 1

    def loop_enqueue(self, count: int) -> int:
        self.pending.append(count)
        self.bursts.append(count)
        return count

    def loop_rest(self, rows: Sequence[int]) -> None:
        """Later steps see it; those under way are computed after it, too, where they would not on a device."""
        assert rows and not self.resting & set(rows), f"{rows} rest already, or nobody"
        self.resting |= set(rows)
        self.rests.append(list(rows))

    def loop_collect(self, ticket: int) -> Int32Array:
        assert self.pending.popleft() == ticket
        return np.stack([self._step() for _ in range(ticket)])

    def _step(self) -> Int32Array:
        token_ids, kv_length, page_table = self._rows
        rows = np.arange(len(token_ids), dtype=np.int32)
        starts = np.arange(len(token_ids) + 1, dtype=np.int32)
        logits = self.execute(StepInput(token_ids, kv_length - 1, starts, kv_length, page_table, rows))
        chosen = logits.argmax(-1).numpy().astype(np.int32)
        chosen[list(self.resting)] = NOTHING
        self._rows = (chosen, kv_length + 1, page_table)
        return chosen


Prompt = tuple[list[int], int, bool]
PROMPTS = st.tuples(st.lists(st.integers(1, 49), min_size=1, max_size=12), st.integers(1, 30), st.booleans())


def generate(
    executor: ToyExecutor, prompts: list[Prompt], cancel: set[int] = frozenset()
) -> dict[str, list[int]]:
    core = EngineCore(executor)
    for index, (prompt, max_tokens, ignore_eos) in enumerate(prompts):
        core.add_request(
            str(index),
            prompt,
            SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=ignore_eos),
            stream=False,
        )
    results: dict[str, list[int]] = {}
    steps = 0
    while core.has_unfinished:
        for output in core.step():
            results[output.request_id] = output.outputs[0].token_ids
        core.check_integrity()
        steps += 1
        if steps == 4:
            for index in cancel:
                core.cancel(str(index))
        assert steps < 2000
    return results


def check_tokens(executor: ToyExecutor, prompts: list[Prompt], cancel: set[int]) -> None:
    """All prompts but those in `cancel` get the tokens of the model."""
    cancel = {index for index in cancel if index < len(prompts)}
    results = generate(executor, prompts, cancel)
    for index, (prompt, max_tokens, ignore_eos) in enumerate(prompts):
        if str(index) in results:
            assert results[str(index)] == greedy_tokens(prompt, max_tokens, ignore_eos=ignore_eos)
        else:
            assert index in cancel


def test_the_toy_is_a_decode_loop() -> None:
    assert isinstance(LoopToy(), DecodeLoop) and not isinstance(ToyExecutor(), DecodeLoop)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(PROMPTS, min_size=1, max_size=9),
    st.sampled_from([16, 20, 64]),
    st.sets(st.integers(0, 8), max_size=2),
)
def test_tokens_are_those_of_the_model(prompts: list[Prompt], num_pages: int, cancel: set[int]) -> None:
    """Any mix of lengths, ends and cancels, with pages plenty or scarce."""
    check_tokens(LoopToy(num_pages=num_pages), prompts, cancel)


def test_steps_really_run_ahead() -> None:
    executor = LoopToy()
    results = generate(executor, [([5, 6], 40, True), ([7], 40, True)])
    assert results == {
        "0": greedy_tokens([5, 6], 40, ignore_eos=True),
        "1": greedy_tokens([7], 40, ignore_eos=True),
    }
    assert sum(executor.bursts) >= 38


def test_rows_of_sequences_that_have_ended_rest() -> None:
    """The others go on as they are, without a new start, as far as pages are reserved."""
    prompts = [([5], 20, True), ([6], 30, True), ([7], 60, True), ([8], 60, True), ([9], 60, True)]
    executor = LoopToy(max_batch_size=8, num_pages=128)
    results = generate(executor, prompts)
    for index, (prompt, max_tokens, _) in enumerate(prompts):
        assert results[str(index)] == greedy_tokens(prompt, max_tokens, ignore_eos=True)
    assert executor.rests == [[0], [1]] and executor.loads == 1


def test_nobody_gets_pages_ahead_that_one_in_line_waits_for() -> None:
    """The one in line goes as soon as the first sequence has ended: until then nobody else takes free pages."""
    executor = LoopToy(max_batch_size=2, page_size=1)
    core = EngineCore(executor)
    for name, max_tokens in (("a", 4), ("b", 30), ("c", 2)):
        core.add_request(name, [5, 6], SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True))
    core.step()
    while core.scheduler.waiting:
        held = [len(request.page_ids) for request in core.scheduler.running]
        assert max(held) <= 2 + 4, f"pages held: {held}"
        core.step()


def test_what_is_not_plain_greedy_is_left_to_the_host() -> None:
    executor = LoopToy()
    core = EngineCore(executor)
    core.add_request("a", [5], SamplingParams(max_tokens=8, temperature=0, logprobs=1, ignore_eos=True))
    while core.has_unfinished:
        core.step()
    assert not executor.bursts


def test_a_sequence_that_ends_leaves_the_others_alone() -> None:
    """An end-of-sequence token is noticed late; the tokens after it are dropped."""
    prompts = [([seed], 40, False) for seed in range(1, 40)]
    ending = [p for p in prompts if EOS in greedy_tokens(p[0], 40)][:3]
    assert len(ending) == 3
    mixed = [*ending, ([9, 9, 9], 40, True)]
    results = generate(LoopToy(), mixed)
    for index, (prompt, max_tokens, ignore_eos) in enumerate(mixed):
        assert results[str(index)] == greedy_tokens(prompt, max_tokens, ignore_eos=ignore_eos)
