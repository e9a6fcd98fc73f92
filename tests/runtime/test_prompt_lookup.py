"""Prompt lookup. Oracle: the same requests without it; what is guessed, by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trtc.core.errors import RequestError
from trtc.runtime.engine_core import EngineCore
from trtc.runtime.outputs import CompletionOutput
from trtc.runtime.prompt_lookup import Lookup, PromptLookup
from trtc.runtime.sampling_params import SamplingParams
from trtc.runtime.step_input import Int32Array, StepInput

from .test_decode_ahead import LoopToy
from .toy import EOS, ToyExecutor, toy_logits

GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)


class BigramToy(ToyExecutor):
    """Its next token depends on the last two alone, so that its texts soon repeat themselves; from page and table, as ever."""

    def _row(self, step: StepInput, row: int) -> torch.Tensor:
        sequence = int(step.query_start.searchsorted(row, side="right")) - 1
        last = int(step.positions[row])
        slots = [self._slot(step, sequence, position) for position in range(max(0, last - 1), last + 1)]
        return toy_logits([int(self.cache[slot]) % 5 for slot in slots])


def run(core: EngineCore, requests: list[tuple[list[int], SamplingParams]]) -> list[CompletionOutput]:
    for index, (prompt, params) in enumerate(requests):
        core.add_request(str(index), prompt, params)
    finished = {}
    while core.has_unfinished:
        for output in core.step():
            if output.finished:
                finished[output.request_id] = output.outputs[0]
        core.check_integrity()
    return [finished[str(index)] for index in range(len(requests))]


@pytest.mark.parametrize(
    ("token_ids", "limit", "guess"),
    [
        ([1, 2, 3, 4, 1, 2], 9, (3, 4, 1)),  # K of them, from behind the earlier 1 2
        ([1, 2, 3, 4, 1, 2], 2, (3, 4)),
        ([1, 2, 3, 1, 2, 4, 1, 2], 9, (4, 1, 2)),  # behind the last of several
        ([7, 7, 7], 9, (7, 7, 7)),  # what overlaps with the end goes on as it began
        ([5, 1, 2, 1, 2], 9, (1, 2, 1)),
        ([1, 2, 3], 9, ()),
        ([1], 9, ()),
    ],
)
def test_what_is_guessed(token_ids: list[int], limit: int, guess: tuple[int, ...]) -> None:
    """By hand; and token by token as the sequence grows, with the same guess at the end."""
    config = PromptLookup(2, 3)
    assert Lookup(config).propose(token_ids, limit) == guess
    growing = Lookup(config)
    for end in range(1, len(token_ids)):
        growing.propose(token_ids[:end], limit)
    assert growing.propose(token_ids, limit) == guess
    assert growing.propose(token_ids, limit) == guess  # a step that failed is planned again


class ChoosingToy(BigramToy):
    """A `GreedyChooser`."""

    max_draft_tokens: int | None = None

    def choose(self, step: StepInput) -> Int32Array:
        return self.execute(step).argmax(-1).int().numpy()


@pytest.mark.parametrize("executor", [BigramToy, ChoosingToy, ToyExecutor, LoopToy])
def test_fewer_steps_and_the_same_tokens(executor: type[ToyExecutor]) -> None:
    """A text that repeats itself takes far fewer steps; one that does not, no more. LoopToy would decode ahead."""
    long = replace(GREEDY, max_tokens=50)
    requests = [([1, 2, 3], long), ([4, 4, 4, 4], long)]
    plain = EngineCore(executor())
    expected = run(plain, requests)
    core = EngineCore(executor(), clock=lambda: 0.0)  # no step costs more than another
    lookup = PromptLookup(2, 4)
    found = run(core, [(prompt, replace(params, prompt_lookup=lookup)) for prompt, params in requests])
    assert [output.token_ids for output in found] == [output.token_ids for output in expected]
    stats = core.lookup_stats
    assert 0 <= stats.accepted <= stats.proposed and stats.steps <= 2 * 50
    if issubclass(executor, BigramToy):
        assert len(core.executor.steps) < 0.6 * len(plain.executor.steps) and stats.acceptance > 0.5  # type: ignore[attr-defined]
        total = sum(len(output.token_ids) for output in found)
        rows = sum(len(step.logits_index) for step in core.executor.steps)  # type: ignore[attr-defined]
        assert rows == total - stats.accepted + stats.proposed


def test_an_engine_may_look_up_for_all_that_are_plain_greedy() -> None:
    """Of an engine with a lookup of its own: a request with one keeps it, one that cannot have one does without."""
    core = EngineCore(BigramToy(), clock=lambda: 0.0, prompt_lookup=PromptLookup(1, 2))
    requests = [
        ([1, 2, 3], GREEDY),
        ([1, 2, 3], replace(GREEDY, prompt_lookup=PromptLookup(3, 1))),
        ([1, 2, 3], replace(GREEDY, logprobs=0)),
    ]
    for index, (prompt, params) in enumerate(requests):
        core.add_request(str(index), prompt, params)
    first, second, third = core.scheduler.waiting
    assert first.params.prompt_lookup == PromptLookup(1, 2) and first.lookup is not None
    assert second.params.prompt_lookup == PromptLookup(3, 1) and second.lookup is not None
    assert third.params.prompt_lookup is None and third.lookup is None


class WithTokenizer:
    """Tokens are letters; enough of a tokenizer for stop strings."""

    def decode(self, token_ids: Any, *, skip_special_tokens: bool = True) -> str:
        return "".join(chr(97 + token % 26) for token in token_ids)

    def token_bytes(self, token_id: int) -> bytes:
        return self.decode([token_id]).encode()


@pytest.mark.parametrize(
    "change", [{"stop": None}, {"stop_token_ids": None}, {"max_tokens": 3}, {"max_tokens": 1}]
)
def test_an_end_within_a_draft(change: dict[str, Any]) -> None:
    """A stop string, a stop token and the length end a request in the middle of what was accepted at once."""
    base = run(EngineCore(BigramToy()), [([1, 2, 3], GREEDY)])[0].token_ids
    text = WithTokenizer().decode(base)
    if "stop" in change:
        change = {"stop": text[12:15]}
    if "stop_token_ids" in change:
        change = {"stop_token_ids": [base[13]]}
    params = replace(GREEDY, **change)
    tokenizer: Any = WithTokenizer()
    expected = run(EngineCore(BigramToy(), tokenizer), [([1, 2, 3], params)])
    params = replace(params, prompt_lookup=PromptLookup(2, 8))
    assert run(EngineCore(BigramToy(), tokenizer), [([1, 2, 3], params)]) == expected


def test_an_end_of_sequence_within_a_draft() -> None:
    requests = [([1, 2, EOS, 1, 2], replace(GREEDY, ignore_eos=False, max_tokens=30))]
    expected = run(EngineCore(BigramToy()), requests)
    looked = [(prompt, replace(params, prompt_lookup=PromptLookup(1, 8))) for prompt, params in requests]
    assert run(EngineCore(BigramToy()), looked) == expected


REQUESTS = st.lists(
    st.tuples(
        st.lists(st.integers(1, 4), min_size=1, max_size=20),
        st.builds(
            SamplingParams,
            temperature=st.just(0.0),
            max_tokens=st.integers(1, 20),
            ignore_eos=st.booleans(),
            prompt_logprobs=st.sampled_from([None, None, 0]),
            prompt_lookup=st.sampled_from([None, PromptLookup(1, 3), PromptLookup(2, 8)]),
        ),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(
    requests=REQUESTS,
    page_size=st.sampled_from([1, 4]),
    spare_pages=st.integers(0, 12),
    max_batch_size=st.integers(1, 4),
    max_num_tokens=st.sampled_from([1, 3, 8, 64]),
)
def test_any_traffic_has_the_tokens_of_plain_decoding(
    requests: list[tuple[list[int], SamplingParams]],
    page_size: int,
    spare_pages: int,
    max_batch_size: int,
    max_num_tokens: int,
) -> None:
    """With and without guesses in one batch, short of tokens and pages, preempted."""

    def core() -> EngineCore:
        executor = BigramToy(
            num_pages=-(-39 // page_size) + spare_pages,
            page_size=page_size,
            max_batch_size=max_batch_size,
            max_num_tokens=max_num_tokens,
        )
        return EngineCore(executor)

    plain = [(prompt, replace(params, prompt_lookup=None)) for prompt, params in requests]
    assert run(core(), requests) == run(core(), plain)


@pytest.mark.parametrize(
    "text",
    ["3", "3:", ":8", "0:8", "3:0", "-1:8", "a:b", "3:8:1", "", "3:1001", f"{10**20}:8", f"3:{'1' * 5000}"],
    ids=lambda text: text[:9],
)
def test_what_is_no_lookup(text: str) -> None:
    with pytest.raises(RequestError, match=r"prompt_lookup is .*accepted: N:K"):
        PromptLookup.parse(text)
    assert PromptLookup.parse("3:8") == PromptLookup(3, 8)


def test_numbers_of_numpy_become_pythons() -> None:
    lookup = PromptLookup(np.int64(3), np.uint8(8))  # type: ignore[arg-type]
    assert repr(lookup) == repr(PromptLookup(3, 8))
    for bad in (np.float32(3), np.bool_(True), np.int64(0), 3.0, True):
        with pytest.raises(RequestError, match=r"prompt_lookup is .*:8; accepted: N:K"):
            PromptLookup(bad, 8)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 1.0},
        {"repetition_penalty": 1.1},
        {"logprobs": 0},
        {"min_tokens": 2},
        {"prompt_lookup": "3:8"},
    ],
)
def test_only_plain_greedy_requests(change: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="prompt_lookup"):
        SamplingParams(**{"temperature": 0.0, "prompt_lookup": PromptLookup(3, 8), **change})
