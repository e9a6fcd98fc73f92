"""Oracle: the toy model's own definition (`toy.greedy_tokens`, `toy.toy_logits`), which knows nothing of
batches, pages or chunks; for random tokens, the same request alone on a large cache."""

from __future__ import annotations

import os
import re
from typing import Any

import numpy as np
import pytest
import torch
from trtc.core.errors import ConfigError, EngineError, RequestError
from trtc.runtime.engine_core import EngineCore
from trtc.runtime.outputs import CompletionOutput, RequestOutput
from trtc.runtime.sampling_params import SamplingParams
from trtc.runtime.tokenizer import Tokenizer

from .toy import EOS, VOCAB_SIZE, ToyExecutor, greedy_tokens, toy_logits

PROMPTS = [[3, 4, 5], [9], list(range(1, 41)), [7, 7, 7, 7, 7, 7, 7, 7], [12, 13], [30] * 13]


def greedy(**values: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 12, **values})


def engine(tokenizer: Tokenizer | None = None, **limits: Any) -> EngineCore:
    return EngineCore(ToyExecutor(**limits), tokenizer)


def run(core: EngineCore) -> dict[str, RequestOutput]:
    """Steps until nothing is left, checking integrity after each step; the last output of every request."""
    last: dict[str, RequestOutput] = {}
    while core.has_unfinished:
        last |= {output.request_id: output for output in core.step()}
        core.check_integrity()
    assert core.scheduler.pool.num_used == 0
    return last


def alone(
    prompt: list[int], params: SamplingParams, tokenizer: Tokenizer | None = None
) -> list[CompletionOutput]:
    core = engine(tokenizer, num_pages=100, max_num_tokens=200)
    core.add_request("alone", prompt, params)
    return run(core)["alone"].outputs


def steps(core: EngineCore) -> int:
    assert isinstance(core.executor, ToyExecutor)
    return len(core.executor.steps)


LIMITS = [
    {"max_batch_size": 6, "max_num_tokens": 200, "num_pages": 100},  # everything at once
    {"max_batch_size": 1},
    {"max_num_tokens": 3},  # prompts in many chunks
    {"max_num_tokens": 1},
    {"num_pages": 13},  # one long request at a time, the others preempted
    {"num_pages": 13, "max_num_tokens": 5},
    {"page_size": 1, "num_pages": 53},
    {"page_size": 64, "num_pages": 2},
]


@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize("ignore_eos", [False, True])
def test_every_request_gets_the_tokens_of_the_model(limits: dict[str, int], ignore_eos: bool) -> None:
    core = engine(**limits)
    for index, prompt in enumerate(PROMPTS):
        core.add_request(str(index), prompt, greedy(ignore_eos=ignore_eos))
    outputs = run(core)
    for index, prompt in enumerate(PROMPTS):
        expected = greedy_tokens(prompt, 12, ignore_eos=ignore_eos)
        completion = outputs[str(index)].outputs[0]
        assert completion.token_ids == expected
        assert completion.finish_reason == ("stop" if expected[-1] == EOS and not ignore_eos else "length")


def test_few_pages_do_preempt() -> None:
    """Guards the tests above: with few pages prompts are computed more than once, with many they are not."""

    def tokens_run(num_pages: int) -> int:
        core = engine(num_pages=num_pages)
        for name in "abc":
            core.add_request(name, [ord(name) - 90] * 8, greedy(max_tokens=24, ignore_eos=True))
        run(core)
        return sum(step.num_tokens for step in core.executor.steps)  # type: ignore[attr-defined]

    assert tokens_run(24) == 3 * (8 + 24 - 1)
    assert tokens_run(12) > 3 * (8 + 24 - 1)


MIXED = [
    SamplingParams(seed=1, max_tokens=14),
    SamplingParams(seed=2, temperature=1.7, top_k=5, max_tokens=14, logprobs=3),
    greedy(repetition_penalty=1.4, prompt_logprobs=2),
    SamplingParams(seed=3, top_p=0.8, presence_penalty=1.0, frequency_penalty=0.5, max_tokens=14),
    greedy(min_tokens=12, logprobs=0),
    SamplingParams(seed=4, min_p=0.1, n=3, max_tokens=9, prompt_logprobs=0, stop_token_ids=[5, 6]),
]


@pytest.mark.parametrize("limits", LIMITS[2:7], ids=str)
def test_sampled_text_and_logprobs_do_not_depend_on_the_company(limits: dict[str, int]) -> None:
    core = engine(**limits)
    for index, (prompt, params) in enumerate(zip(PROMPTS, MIXED, strict=True)):
        core.add_request(str(index), prompt, params)
    outputs = run(core)
    for index, (prompt, params) in enumerate(zip(PROMPTS, MIXED, strict=True)):
        assert outputs[str(index)].outputs == alone(prompt, params)


def test_requests_that_arrive_later_join_the_running_batch() -> None:
    core = engine()
    core.add_request("first", PROMPTS[0], greedy(ignore_eos=True))
    core.step()
    core.add_request("second", PROMPTS[1], greedy(ignore_eos=True))
    outputs = run(core)
    assert steps(core) == 13  # 12 tokens, one step later for the second
    assert outputs["second"].outputs[0].token_ids == greedy_tokens(PROMPTS[1], 12, ignore_eos=True)


def test_n_completions_have_streams_of_their_own() -> None:
    core = engine()
    core.add_request("r", [3], SamplingParams(n=3, seed=11, max_tokens=10, ignore_eos=True))
    output = run(core)["r"]
    texts = [tuple(completion.token_ids) for completion in output.outputs]
    assert [completion.index for completion in output.outputs] == [0, 1, 2] and len(set(texts)) == 3
    single = alone([3], SamplingParams(seed=11, max_tokens=10, ignore_eos=True))
    assert single[0].token_ids == list(texts[0])


def test_a_prompt_is_scored_once_for_all_its_completions() -> None:
    core = engine()
    core.add_request("r", PROMPTS[3], SamplingParams(n=3, max_tokens=1, prompt_logprobs=0))
    run(core)
    rows = sum(len(step.logits_index) for step in core.executor.steps)  # type: ignore[attr-defined]
    assert rows == len(PROMPTS[3]) - 1 + 3


def test_without_a_seed_the_engine_draws_them_in_order_of_arrival() -> None:
    def tokens(seed: int) -> list[list[int]]:
        core = EngineCore(ToyExecutor(), seed=seed)
        for name in "ab":
            core.add_request(name, [3], SamplingParams(max_tokens=10, ignore_eos=True))
        return [output.outputs[0].token_ids for output in run(core).values()]

    first = tokens(0)
    assert first == tokens(0) and first != tokens(1) and first[0] != first[1]


def test_logprobs_of_prompt_and_output_are_log_softmax() -> None:
    """Oracle: float64 log_softmax of the toy model's logits over the true history."""
    core = engine(max_num_tokens=3)
    prompt = PROMPTS[3]
    core.add_request("r", prompt, greedy(logprobs=2, prompt_logprobs=1, ignore_eos=True))
    output = run(core)["r"]
    completion = output.outputs[0]
    assert output.prompt_logprobs is not None and completion.logprobs is not None
    assert output.prompt_logprobs[0] is None and len(output.prompt_logprobs) == len(prompt)
    history = [*prompt, *completion.token_ids]
    total = 0.0
    for position, table in enumerate([*output.prompt_logprobs, *completion.logprobs]):
        if table is None:
            continue
        reference = toy_logits(history[:position]).double().log_softmax(-1)
        top = reference.topk(1 if position < len(prompt) else 2).indices.tolist()
        assert next(iter(table)) == history[position] and set(table) == {history[position], *top}
        for token_id, entry in table.items():
            assert entry.logprob == pytest.approx(float(reference[token_id]), abs=1e-5)
            assert entry.rank == 1 + int((reference > reference[token_id]).sum())
        if position >= len(prompt):
            total += float(reference[history[position]])
    assert completion.cumulative_logprob == pytest.approx(total, abs=1e-4)


def test_logprobs_name_their_tokens(byte_level: Tokenizer) -> None:
    core = engine(byte_level)
    core.add_request("r", [1, 20], greedy(logprobs=2, prompt_logprobs=0))
    output = run(core)["r"]
    assert output.outputs[0].logprobs and output.prompt_logprobs
    tables = [*output.outputs[0].logprobs, *(table for table in output.prompt_logprobs if table)]
    for token_id, entry in (item for table in tables for item in table.items()):
        assert entry.decoded_token == byte_level.decode([token_id], skip_special_tokens=False)


def test_streaming_shows_every_token_once_and_grows(byte_level: Tokenizer) -> None:
    core = engine(byte_level)
    core.add_request("r", [1, 20], greedy(ignore_eos=True))
    core.add_request("quiet", [1, 21], greedy(ignore_eos=True), stream=False)
    seen: list[RequestOutput] = []
    while core.has_unfinished:
        seen += core.step()
    streamed = [output.outputs[0] for output in seen if output.request_id == "r"]
    assert [len(completion.token_ids) for completion in streamed] == list(range(1, 13))
    assert [completion.finish_reason for completion in streamed] == [None] * 11 + ["length"]
    assert streamed[-1].text == byte_level.decode(streamed[-1].token_ids)
    assert all(streamed[-1].text.startswith(completion.text) for completion in streamed)
    assert [output.finished for output in seen if output.request_id == "quiet"] == [True]


def test_the_token_that_ends_a_request_is_kept_but_not_in_the_text(byte_level: Tokenizer) -> None:
    tokens = greedy_tokens([1, 20], 12, ignore_eos=True)
    last = tokens.index(tokens[5])
    core = engine(byte_level)
    core.add_request(
        "r", [1, 20], greedy(ignore_eos=True, stop_token_ids=[tokens[5]], skip_special_tokens=False)
    )
    completion = run(core)["r"].outputs[0]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", tokens[5])
    assert completion.token_ids == tokens[: last + 1]
    assert completion.text == byte_level.decode(tokens[:last], skip_special_tokens=False)


@pytest.mark.parametrize("max_tokens", [12, 6])
def test_a_stop_string_ends_the_request(byte_level: Tokenizer, max_tokens: int) -> None:
    """Also when the last allowed token completes it: then the reason is the stop string, not the length."""
    tokens = greedy_tokens([1, 20], 12, ignore_eos=True)
    stop = byte_level.decode(tokens[4:6])
    before = byte_level.decode(tokens[:6])
    assert before.index(stop) == len(byte_level.decode(tokens[:4])), (
        "the toy text repeats: choose another prompt"
    )
    core = engine(byte_level)
    core.add_request("r", [1, 20], greedy(ignore_eos=True, stop=[stop], max_tokens=max_tokens))
    completion = run(core)["r"].outputs[0]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    assert completion.text == byte_level.decode(tokens[:4]) and completion.token_ids == tokens[:6]


def test_cancel_reports_nothing_more_and_frees_the_pages() -> None:
    core = engine()
    core.add_request("gone", PROMPTS[2], greedy(n=2))
    core.add_request("stays", PROMPTS[0], greedy())
    core.step()
    assert core.cancel("gone") and not core.cancel("gone") and not core.cancel("never was")
    core.check_integrity()
    assert set(run(core)) == {"stays"}


def test_a_failed_step_can_be_repeated() -> None:
    executor = ToyExecutor()
    core = EngineCore(executor)
    core.add_request("r", PROMPTS[0], greedy(prompt_logprobs=0))
    core.step()
    executor.fail_next = True
    with pytest.raises(RuntimeError, match="on fire"):
        core.step()
    core.check_integrity()
    assert run(core)["r"].outputs[0].token_ids == greedy_tokens(PROMPTS[0], 12)


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([1, 2, VOCAB_SIZE], {}, "token id 50 at position 2 is outside the vocabulary; accepted: 0 to 49"),
        ([-1], {}, "token id -1 at position 0 is outside the vocabulary"),
        ([1] * 49, {}, "max_input_len = 48"),
        ([1], {"stop_token_ids": [50]}, "stop_token_ids has 50; accepted: 0 to 49"),
        ([1], {"logit_bias": {50: 1}}, "logit_bias has 50; accepted: 0 to 49"),
        ([1], {"bad_words_ids": [[1], [2, 50]]}, "bad_words_ids has 50; accepted: 0 to 49"),
        ([1], {"bad_words": ["x"]}, "bad_words need a tokenizer and this engine has none; use bad_words_ids"),
        ([1], {"bad_words_ids": [[i] for i in range(50)]}, "may leave no token of the vocabulary's 50"),
        (
            [1],
            {"bad_words_ids": [[i] for i in range(1, 50)], "min_tokens": 1},
            "may leave no token of the vocabulary's 50",
        ),
        (
            [1],
            {"stop_token_ids": list(range(50)), "min_tokens": 1},
            "stop_token_ids may leave no token of the vocabulary's 50",
        ),
        ([1], {"logprobs": 51}, "logprobs is 51; accepted: 0 to the vocabulary's 50"),
        ([1], {"prompt_logprobs": 51}, "prompt_logprobs is 51"),
        ([1], {"stop": "x"}, "stop strings need a tokenizer and this engine has none; use stop_token_ids"),
    ],
)
def test_a_request_the_engine_cannot_serve_is_refused(
    prompt: list[int], params: dict[str, Any], message: str
) -> None:
    core = engine()
    with pytest.raises(RequestError, match=message):
        core.add_request("r", prompt, SamplingParams(**params))
    assert not core.has_unfinished and core.step() == []


def test_a_request_id_in_use_is_refused() -> None:
    core = engine()
    core.add_request("r", [1], greedy())
    with pytest.raises(RequestError, match="'r' is in use"):
        core.add_request("r", [1], greedy())
    run(core)
    core.add_request("r", [1], greedy())


@pytest.mark.parametrize(
    ("option", "value", "accepted"),
    [
        ("seed", "x", "an integer of at least 0"),
        ("seed", -1, "an integer of at least 0"),
        ("seed", 1.5, "an integer of at least 0"),
        ("prompt_lookup", "2:8", "PromptLookup(N, K), or None"),
    ],
)
def test_an_option_of_another_kind_is_refused(option: str, value: Any, accepted: str) -> None:
    options: Any = {option: value}
    with pytest.raises(ConfigError, match=re.escape(f"{option} is {value!r}; accepted: {accepted}")):
        EngineCore(ToyExecutor(), **options)


def test_a_seed_may_be_any_whole_number() -> None:
    def tokens(seed: Any) -> tuple[int, ...]:
        core = EngineCore(ToyExecutor(), seed=seed)
        core.add_request("a", [5], SamplingParams(max_tokens=9, ignore_eos=True))
        return tuple(run(core)["a"].outputs[0].token_ids)

    assert tokens(np.int64(7)) == tokens(7)


def test_a_forked_process_is_refused() -> None:
    """Its threads are gone, and a step would wait for them forever."""
    core = engine()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            core.add_request("x", [3], greedy())
        except EngineError as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with open(reader) as said:
        assert "before the process forked; load it in the process that generates" in said.read()
    core.add_request("x", [3], greedy())
    assert run(core)["x"].finished


def test_an_executor_that_returns_the_wrong_rows_is_an_assertion(monkeypatch: pytest.MonkeyPatch) -> None:
    core = engine()
    core.add_request("r", [1], greedy())
    monkeypatch.setattr(core.executor, "execute", lambda step: torch.zeros(2, VOCAB_SIZE))
    with pytest.raises(AssertionError, match=r"returned logits \(2, 50\), not \(1, 50\)"):
        core.step()


def test_a_request_past_its_deadline_ends_with_what_it_has() -> None:
    now = [0.0]
    core = EngineCore(ToyExecutor(), clock=lambda: now[0])
    prompt = PROMPTS[0]
    core.add_request("late", prompt, greedy(ignore_eos=True), deadline=3.0, stream=False)
    core.add_request("patient", prompt, greedy(ignore_eos=True), deadline=300.0)
    core.add_request("waits", list(range(1, 49)), greedy(n=2), deadline=1.0)
    outputs: dict[str, RequestOutput] = {}
    ended = {}
    while core.has_unfinished:
        for output in core.step():
            outputs[output.request_id] = output
            if output.finished:
                ended[output.request_id] = now[0]
        core.check_integrity()
        now[0] += 1
    late, waits = outputs["late"].outputs[0], outputs["waits"].outputs
    assert ended["late"] == 3.0 and ended["waits"] == 1.0
    assert late.finish_reason == "timeout" and 0 < len(late.token_ids) < 3
    assert late.token_ids == greedy_tokens(prompt, len(late.token_ids), ignore_eos=True)
    assert [(c.finish_reason, c.token_ids) for c in waits] == [("timeout", [])] * 2
    assert outputs["patient"].outputs[0].finish_reason == "length"
    assert core.scheduler.pool.num_used == 0


@pytest.mark.parametrize("steps", [0, 1])
def test_prompt_tokens_that_a_timeout_leaves_unscored_have_no_logprobs(steps: int) -> None:
    now = [0.0]
    core = EngineCore(ToyExecutor(max_num_tokens=5), clock=lambda: now[0])
    prompt = PROMPTS[2]
    core.add_request("a", prompt, greedy(prompt_logprobs=0), deadline=1.0)
    for _ in range(steps):
        core.step()
    now[0] = 1.0
    (output,) = core.step()
    scored = [entry is not None for entry in output.prompt_logprobs or ()]
    assert len(prompt) > 6 and scored == [
        False,
        *[True] * 5 * steps,
        *[False] * (len(prompt) - 1 - 5 * steps),
    ]


def test_the_best_of_several_that_a_timeout_ended_have_tokens() -> None:
    """Oracle: with two places, two of the four completions have begun."""
    now = [0.0]
    core = EngineCore(ToyExecutor(max_batch_size=2), clock=lambda: now[0])
    core.add_request("a", [5], SamplingParams(n=2, best_of=4, ignore_eos=True, seed=1), deadline=1.0)
    for _ in range(3):
        core.step()
    now[0] = 1.0
    (output,) = core.step()
    assert [len(completion.token_ids) for completion in output.outputs] == [3, 3]


def test_text_that_was_held_back_comes_with_the_timeout(byte_level: Tokenizer) -> None:
    """A stop string might have begun; nothing more comes, so the text is complete."""
    now = [0.0]
    core = EngineCore(ToyExecutor(vocab_size=VOCAB_SIZE), byte_level, clock=lambda: now[0])
    (expected,) = alone([9], greedy(max_tokens=4, ignore_eos=True), byte_level)
    assert len(expected.text) >= 2
    stop = expected.text[-1] + "no such end"
    core.add_request("a", [9], greedy(ignore_eos=True, stop=stop), deadline=1.0)
    while len((output := core.step()[0]).outputs[0].token_ids) < 4:
        pass
    assert output.outputs[0].text == expected.text[:-1]
    now[0] = 1.0
    (output,) = core.step()
    assert output.outputs[0].text == expected.text and output.outputs[0].finish_reason == "timeout"
