"""The prefix cache. Oracles: the scheduler's rules as its docstring states them, and the toy model's own definition."""

from __future__ import annotations

from typing import Any

import pytest
from trtc.core.errors import ConfigError
from trtc.runtime.engine_core import EngineCore
from trtc.runtime.outputs import RequestOutput
from trtc.runtime.sampling_params import SamplingParams
from trtc.runtime.step_input import Int32Array, StepInput

from .test_decode_ahead import LoopToy
from .test_step_queue import BehindToy, QueueToy
from .toy import ToyExecutor, greedy_tokens

PROMPT = list(range(1, 15))  # three full pages of 4, and two tokens


def generate(core: EngineCore, *prompts: list[int], **params: Any) -> list[RequestOutput]:
    """Runs prompts that arrive together to their end."""
    sampling = SamplingParams(**{"max_tokens": 6, "temperature": 0, "ignore_eos": True, **params})
    names = [f"{len(core.executor.steps)}-{index}" for index in range(len(prompts))]
    for name, prompt in zip(names, prompts, strict=True):
        core.add_request(name, prompt, sampling)
    finished: dict[str, RequestOutput] = {}
    while core.has_unfinished:
        finished |= {output.request_id: output for output in core.step() if output.finished}
        core.check_integrity()
    return [finished[name] for name in names]


def computed(executor: ToyExecutor) -> int:
    """Tokens computed since the last call."""
    total = sum(step.num_tokens for step in executor.steps)
    executor.steps.clear()
    return total


def right(output: RequestOutput, prompt: list[int]) -> bool:
    tokens = greedy_tokens(prompt, len(output.outputs[0].token_ids), ignore_eos=True)
    return all(completion.token_ids == tokens for completion in output.outputs)


@pytest.mark.parametrize("executor", [ToyExecutor, LoopToy, QueueToy, BehindToy])
@pytest.mark.parametrize(
    ("second", "cached"),
    [
        (PROMPT, 12),
        (PROMPT[:12], 8),  # full pages to the end: the last token is computed again, so its page is
        (PROMPT[:13], 12),
        ([*PROMPT[:10], 40, 41, 42], 8),
        ([9, *PROMPT[1:]], 0),
        (PROMPT[4:], 0),  # equal tokens at other positions are other content
        (PROMPT[:3], 0),
    ],
)
def test_a_prompt_starts_behind_the_pages_that_it_shares(
    executor: type[ToyExecutor], second: list[int], cached: int
) -> None:
    core = EngineCore(executor())
    (first,) = generate(core, PROMPT)
    assert first.num_cached_tokens == 0 and right(first, PROMPT)
    computed(core.executor)
    (output,) = generate(core, second)
    assert output.num_cached_tokens == cached and right(output, second)
    assert computed(core.executor) == len(second) - cached + 5 or issubclass(executor, LoopToy)
    assert core.scheduler.pool.num_used == 0
    assert (core.scheduler.prefix_cache.num_found, core.scheduler.prefix_cache.num_looked_up) == (
        cached // 4,
        3 + (len(second) - 1) // 4,
    )


def test_outputs_are_found_too() -> None:
    """A chat goes on: the next prompt is the last one, its answer and more."""
    core = EngineCore(ToyExecutor())
    (first,) = generate(core, PROMPT, max_tokens=8)
    longer = PROMPT + first.outputs[0].token_ids + [7, 8]
    (output,) = generate(core, longer)
    assert output.num_cached_tokens == 20 and right(output, longer)  # 21 tokens were computed


def test_the_n_completions_of_a_prompt_compute_it_once() -> None:
    core = EngineCore(ToyExecutor(max_batch_size=8))
    (output,) = generate(core, PROMPT, n=4)
    assert right(output, PROMPT) and output.num_cached_tokens == 0
    assert computed(core.executor) == 14 + 3 * 2 + 4 * 5


def test_prompts_that_arrive_together_compute_their_beginning_once() -> None:
    core = EngineCore(ToyExecutor(max_batch_size=8))
    prompts = [[*PROMPT, 40 + index] for index in range(4)]
    outputs = generate(core, *prompts)
    assert all(map(right, outputs, prompts))
    assert [output.num_cached_tokens for output in outputs] == [0, 12, 12, 12]
    assert computed(core.executor) == 15 + 3 * 3 + 4 * 5


def test_nobody_waits_for_less_than_half_of_its_prompt() -> None:
    core = EngineCore(ToyExecutor(max_num_tokens=64))
    outputs = generate(core, PROMPT, [*PROMPT[:4], *range(20, 30)])
    assert [output.num_cached_tokens for output in outputs] == [0, 0]
    assert core.executor.steps[0].num_tokens == 28


def test_a_preempted_request_finds_its_pages_again() -> None:
    """Two sequences outgrow the pages; the newer gives way, and the older needs only one of its pages meanwhile."""
    core = EngineCore(ToyExecutor(num_pages=8, max_seq_len=30))
    old, new = [5] * 9, [6] * 14
    outputs = generate(core, old, new, max_tokens=10)
    assert right(outputs[0], old) and right(outputs[1], new)
    with_cache = computed(core.executor)
    core = EngineCore(ToyExecutor(num_pages=8, max_seq_len=30), enable_prefix_cache=False)
    assert generate(core, old, new, max_tokens=10) == outputs
    assert with_cache < computed(core.executor)


def test_pages_are_found_until_others_need_them() -> None:
    core = EngineCore(ToyExecutor(num_pages=9))
    generate(core, PROMPT)
    generate(core, [30] * 20)  # 7 pages: two blank ones, and of PROMPT's four with content the last first
    (output,) = generate(core, PROMPT)
    assert 0 < output.num_cached_tokens < 12 and right(output, PROMPT)


@pytest.mark.parametrize("count", [0, 2])
def test_prompt_logprobs_are_made_from_logits_all_the_same(count: int) -> None:
    core = EngineCore(ToyExecutor())
    (plain,) = generate(core, PROMPT, prompt_logprobs=count)
    (again,) = generate(core, PROMPT, prompt_logprobs=count)
    assert again.num_cached_tokens == 0 and again.prompt_logprobs == plain.prompt_logprobs
    assert plain.prompt_logprobs is not None and len(plain.prompt_logprobs) == len(PROMPT)


def test_it_can_be_switched_off() -> None:
    core = EngineCore(ToyExecutor(), enable_prefix_cache=False)
    outputs = [generate(core, PROMPT)[0] for _ in range(2)]
    assert [output.num_cached_tokens for output in outputs] == [0, 0]
    assert core.scheduler.pool.num_cached == core.scheduler.prefix_cache.num_looked_up == 0
    with pytest.raises(ConfigError, match="enable_prefix_cache is 1; accepted: True or False"):
        EngineCore(ToyExecutor(), enable_prefix_cache=1)  # type: ignore[arg-type]


def test_a_step_that_failed_on_cached_pages_is_planned_again() -> None:
    core = EngineCore(ToyExecutor())
    generate(core, PROMPT)
    core.executor.fail_next = True
    core.add_request("a", PROMPT, SamplingParams(max_tokens=2, temperature=0))
    with pytest.raises(RuntimeError):
        core.step()
    core.check_integrity()
    while core.has_unfinished:
        outputs = core.step()
    assert outputs[0].outputs[0].token_ids == greedy_tokens(PROMPT, 2)


def test_pages_are_hashed_while_the_device_computes_them() -> None:
    """Before that, only the page that tells that nothing of a prompt is there."""
    hashed = []

    class Watched(QueueToy):
        def start_step(self, step: StepInput, source: Int32Array | None) -> int:
            hashed.append([len(request.page_keys) for request in core.scheduler.running])
            return super().start_step(step, source)

    core = EngineCore(Watched(max_num_tokens=64))
    core.add_request("a", PROMPT, SamplingParams(max_tokens=2, temperature=0))
    core.add_request("b", [9, *PROMPT], SamplingParams(max_tokens=2, temperature=0))
    core.advance()
    assert hashed == [[1, 1]]
    assert [len(request.page_keys) for request in core.scheduler.running] == [3, 3]


def test_check_integrity_sees_a_page_with_other_content() -> None:
    """A page that was found by a wrong key, as with a hash that leaves out what comes before it."""
    core = EngineCore(ToyExecutor())
    s = core.scheduler
    core.add_request("a", PROMPT, SamplingParams(max_tokens=2))
    core.step()
    (request,) = s.running
    s.pool._key_of[request.page_ids[0]] = b"wrong"
    s.pool._page_of = {key: page for page, key in s.pool._key_of.items()}
    with pytest.raises(AssertionError, match="number 0 of request a, is known by other content"):
        s.check_integrity()
