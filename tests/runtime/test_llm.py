"""Oracle: the toy model's definition; the errors as the docstrings word them."""

from __future__ import annotations

import inspect
import re
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
import trtc
from trtc.core.errors import ConfigError, EngineError, RequestError
from trtc.runtime import load_core
from trtc.runtime.async_llm import AsyncLLM
from trtc.runtime.llm import LLM
from trtc.runtime.outputs import RequestOutput
from trtc.runtime.prompt import Prompt
from trtc.runtime.sampling_params import SamplingParams
from trtc.runtime.tokenizer import Tokenizer

from .toy import ToyExecutor, greedy_tokens

GREEDY = SamplingParams(temperature=0, max_tokens=6)


class WideToy(ToyExecutor):
    """The toy model with room for the ids of the test tokenizer in its prompts."""

    def execute(self, step: Any) -> torch.Tensor:
        logits = super().execute(step)[:, :50]
        return torch.nn.functional.pad(logits, (0, 250), value=-100.0)


def llm(tokenizer: Tokenizer | None = None, **limits: Any) -> LLM:
    if tokenizer is not None:
        return LLM.from_executor(WideToy(**{"vocab_size": 300, **limits}), tokenizer)
    return LLM.from_executor(ToyExecutor(**limits))


def idle(model: LLM) -> bool:
    model.core.check_integrity()
    return not model.core.has_unfinished and model.core.scheduler.pool.num_used == 0


def token_ids(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ([3, 4], [[3, 4]]),
        ((3, 4), [[3, 4]]),
        ([np.int64(3), 4], [[3, 4]]),
        ([[3, 4], [5]], [[3, 4], [5]]),
        ([(3, 4), {"prompt_token_ids": [5]}], [[3, 4], [5]]),
        ({"prompt_token_ids": [3, 4]}, [[3, 4]]),
        ([], []),
    ],
    ids=repr,
)
def test_prompts_of_token_ids(prompts: Any, expected: list[list[int]]) -> None:
    outputs = llm().generate(prompts, GREEDY)
    assert [output.prompt_token_ids for output in outputs] == expected
    assert token_ids(outputs) == [greedy_tokens(prompt, 6) for prompt in expected]
    assert all(output.prompt is None and output.outputs[0].text == "" for output in outputs)


def test_public_names_can_be_completed() -> None:
    assert set(trtc.__all__) <= set(dir(trtc))


def test_type_checkers_take_a_list_of_several_kinds_of_prompts() -> None:
    """mypy refuses README's `["text", [2, 100, 7]]` where the parameter is a union of two kinds of sequences."""
    kinds = [
        kind for kind in get_args(get_type_hints(LLM.generate)["prompts"]) if get_origin(kind) is Sequence
    ]
    assert len(kinds) == 1 and set(get_args(Prompt)) < set(get_args(get_args(kinds[0])[0]))


def test_prompts_of_text(byte_level: Tokenizer) -> None:
    model = llm(byte_level)
    outputs = model.generate(["the cat", {"prompt": "sat"}, {"prompt_token_ids": [1, 20]}], GREEDY)
    assert [output.prompt for output in outputs] == ["the cat", "sat", None]
    assert outputs[0].prompt_token_ids == byte_level.encode("the cat")
    assert outputs[0].prompt_token_ids[0] == byte_level.bos_token_id
    for output in outputs:
        completion = output.outputs[0]
        assert completion.token_ids == greedy_tokens(output.prompt_token_ids, 6)
        assert completion.text == byte_level.decode(completion.token_ids)
    assert model.generate("the cat", GREEDY)[0].outputs == outputs[0].outputs


def test_results_are_in_the_order_of_the_prompts_whoever_ends_first() -> None:
    prompts = [[3], [4], [5], [6], [7], [8]]
    params = [SamplingParams(temperature=0, max_tokens=9 - i, ignore_eos=True) for i in range(6)]
    outputs = llm(max_batch_size=2).generate(prompts, params)
    assert token_ids(outputs) == [greedy_tokens([3 + i], 9 - i, ignore_eos=True) for i in range(6)]
    assert all(output.finished and output.outputs[0].finished for output in outputs)
    assert len({output.request_id for output in outputs}) == 6


def test_default_params_are_sampling_params() -> None:
    seeded = LLM.from_executor(ToyExecutor(), seed=5).generate([[3], [4]])
    assert token_ids(seeded) == token_ids(LLM.from_executor(ToyExecutor(), seed=5).generate([[3], [4]]))
    assert token_ids(seeded) != token_ids(LLM.from_executor(ToyExecutor(), seed=6).generate([[3], [4]]))


def test_on_output_streams_and_ends_with_the_result() -> None:
    seen: list[RequestOutput] = []
    outputs = llm().generate(
        [[3], [4]], SamplingParams(temperature=0, ignore_eos=True), on_output=seen.append
    )
    assert len(seen) == 2 * 16
    assert [output for output in seen if output.finished] == outputs


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[3], []], "prompt 1: the prompt is empty"),
        ([[3], [50]], "prompt 1: token id 50 at position 0 is outside the vocabulary; accepted: 0 to 49"),
        ([[3, 2**40]], "prompt 0: token id 1099511627776 at position 1 is outside the vocabulary"),
        ([[1] * 49], "prompt 0: the prompt has 49 tokens, the engine takes max_input_len = 48"),
        ("text", "prompt 0: text needs a tokenizer and this engine has none"),
        ([[3], "text"], "prompt 1: text needs a tokenizer"),
        ([[3], 4.5], "prompt 1: it is a float; accepted: text, a list of token ids"),
        ([[3], [4, "a"]], "prompt 1: its item 1 is 'a'; accepted: integers"),
        ([True, 3], "prompt 0: its item 0 is True; accepted: integers"),
        ([[3, 4, False]], "prompt 0: its item 2 is False; accepted: integers"),
        ([{"prompt_ids": [3]}], r"prompt 0: it has the keys \['prompt_ids'\]; accepted: text"),
        ([{"prompt": "a", "prompt_token_ids": [3]}], "prompt 0: it has the keys"),
        (7, "prompts is a int; accepted: text"),
        (None, "prompts is a NoneType; accepted"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_bad_prompt_is_refused_before_anything_runs(prompts: Any, message: str) -> None:
    model = llm()
    with pytest.raises(RequestError, match=message) as error:
        model.generate(prompts, GREEDY)
    assert "\n" not in str(error.value)
    assert model.core.executor.steps == [] and idle(model)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ([GREEDY], "1 sampling_params for 2 prompts"),
        ([GREEDY, {}], r"sampling_params\[1\] is a dict; accepted: SamplingParams"),
        ({"temperature": 0}, "sampling_params is a dict; accepted: SamplingParams"),
        ([GREEDY, SamplingParams(stop="x")], "prompt 1: stop strings need a tokenizer"),
    ],
)
def test_bad_params_are_refused(params: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        llm().generate([[3], [4]], params)


def test_an_error_in_a_step_leaves_nothing_behind() -> None:
    model = llm()
    model.core.executor.fail_next = True  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="on fire"):
        model.generate([[3], [4]], GREEDY)
    assert idle(model)
    assert token_ids(model.generate([3], GREEDY)) == [greedy_tokens([3], 6)]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_in_on_output_leaves_nothing_behind(error: type[BaseException]) -> None:
    model = llm()

    def fail(output: RequestOutput) -> None:
        raise error("enough")

    with pytest.raises(error, match="enough"):
        model.generate([[3], [4]], GREEDY, on_output=fail)
    assert idle(model)


def test_generate_within_generate_is_refused() -> None:
    model = llm()
    with pytest.raises(RequestError, match="already running"):
        model.generate([[3], [4]], GREEDY, on_output=lambda output: model.generate([5], GREEDY) and None)
    assert idle(model)


def test_close_releases_the_engine() -> None:
    executor = ToyExecutor()
    with LLM.from_executor(executor) as model:
        model.generate([3], GREEDY)
        assert not executor.closed
    assert executor.closed
    model.close()  # harmless
    with pytest.raises(EngineError, match="this LLM is closed"):
        model.generate([3], GREEDY)


def test_an_llm_whose_executor_fails_to_close_is_closed() -> None:
    """Not "already running", as it would be for ever with a lock that nobody releases; closing it again is another try."""
    failures = [OSError("no device"), OSError("still none")]

    class Failing(ToyExecutor):
        def close(self) -> None:
            if failures:
                raise failures.pop(0)
            super().close()

    executor = Failing()
    model = LLM.from_executor(executor)
    with pytest.raises(OSError, match="no device"):
        model.close()
    with pytest.raises(OSError, match="still none"):
        model.close()
    model.close()
    assert executor.closed
    with pytest.raises(EngineError, match="this LLM is closed"):
        model.generate([3], GREEDY)


def test_an_option_that_is_refused_releases_the_engine(
    monkeypatch: pytest.MonkeyPatch, byte_level: Tokenizer
) -> None:
    executor = ToyExecutor()
    monkeypatch.setattr(load_core, "load_executor", lambda *given, **options: executor)
    monkeypatch.setattr(load_core.Tokenizer, "from_dir", lambda engine_dir: byte_level)
    with pytest.raises(ConfigError, match="seed is -1"):
        LLM("engine", seed=-1)
    assert executor.closed


@pytest.mark.parametrize("kind", [LLM, AsyncLLM])
@pytest.mark.parametrize(
    "name", ["tensor_parallel_size", "model", "gpu_memory_utilization", "dtype", "max_model_len"]
)
def test_an_option_that_there_is_not_is_refused_with_those_that_there_are(kind: Any, name: str) -> None:
    """Oracle: the docstring of LLM, and the signature of AsyncLLM. Before anything is read: the engine is not there."""
    with pytest.raises(TypeError) as error:
        kind("no engine", **{name: 2})
    message = str(error.value)
    assert (
        message.startswith(f"{kind.__name__}() has no argument {name!r}; accepted: engine_dir, ")
        and "\n" not in message
    )
    accepted = set(message.partition(". ")[0].partition("accepted: ")[2].split(", "))
    documented = set(re.findall(r"^        (\w+): +\S", LLM.__init__.__doc__ or "", re.MULTILINE))
    own = set(inspect.signature(kind.__init__).parameters) - {"self", "options"}
    assert accepted == documented | own
    assert "trtc build" in message and "trtc run --nproc" in message


def test_close_waits_for_the_step_of_another_thread() -> None:
    """Oracle: the order of events. The engine is released once, after the step under way, by the thread that ran it."""
    stepping, closed = threading.Event(), threading.Event()

    @dataclass
    class WaitingToy(ToyExecutor):
        def execute(self, step: Any) -> torch.Tensor:
            assert not self.closed, "a step on a closed executor"
            stepping.set()
            assert closed.wait(60)
            assert not self.closed, "closed under a step"
            return super().execute(step)

    executor = WaitingToy()
    with ThreadPoolExecutor() as pool:
        with LLM.from_executor(executor) as model:
            outputs = pool.submit(model.generate, [3], GREEDY)
            assert stepping.wait(60)
        closed.set()
        with pytest.raises(EngineError, match="this LLM is closed"):
            outputs.result(60)
    assert executor.closed and len(executor.steps) == 1 and idle(model)


def test_priority_decides_who_runs_first() -> None:
    order: list[str] = []
    llm = LLM.from_executor(ToyExecutor(max_batch_size=1))
    params = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)
    llm.generate(
        [[5], [6], [7]], params, priority=[2, 0, 1], on_output=lambda output: order.append(output.request_id)
    )
    assert list(dict.fromkeys(order)) == ["1", "2", "0"]
    with pytest.raises(RequestError, match="2 priorities for 1 prompts"):
        llm.generate([[5]], params, priority=[1, 2])
    with pytest.raises(RequestError, match="priority is 'high'"):
        llm.generate([[5]], params, priority="high")  # type: ignore[arg-type]


def test_what_takes_too_long_ends_with_what_it_has() -> None:
    params = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True)
    llm = LLM.from_executor(ToyExecutor())
    later = [0]
    llm.core._clock = lambda: time.perf_counter() + later[0]

    def an_age_passes(output: RequestOutput) -> None:
        later[0] = 1000

    (output,) = llm.generate([[5]], params, timeout_s=1000, on_output=an_age_passes)
    assert output.outputs[0].finish_reason == "timeout" and len(output.outputs[0].token_ids) == 1
