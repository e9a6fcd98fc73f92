"""Beam search. Oracle: `generate` of transformers on the same weights, float32; the same search alone on a large cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from trtc.core.build import build_engine
from trtc.core.errors import EngineError, RequestError
from trtc.runtime.engine_core import EngineCore
from trtc.runtime.llm import LLM
from trtc.runtime.outputs import RequestOutput
from trtc.runtime.sampling_params import SamplingParams
from trtc.runtime.step_input import StepInput
from trtc.runtime.tokenizer import Tokenizer
from trtc.tests.opt_models import BUILD, OptCheckpoint, hf_model
from trtc.tests.tiny_opt import TINY_OPT, build_tiny_opt

from .toy import EOS, VOCAB_SIZE, ToyExecutor, toy_logits

TEXTS = [
    "The mayor of the town said",
    "A company",
    "Police said that the fire in the old building near the river",
]
VARIANTS = ("pre_norm", "post_norm_projected")
PROMPTS = [[5, 17, 1, 90, 23, 64, 2, 11], [7], list(range(30, 63))]


def hf_beams(
    model: Any, prompt: list[int], params: SamplingParams, eos_token_ids: list[int]
) -> list[list[int]]:
    """The outputs of all beams in their order, each to its end-of-sequence token."""
    ids = torch.tensor([prompt])
    found = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        num_beams=params.beam_width,
        num_return_sequences=params.n,
        length_penalty=params.length_penalty,
        early_stopping=params.early_stopping,
        max_new_tokens=params.max_tokens,
        min_new_tokens=params.min_tokens or None,
        do_sample=False,
        eos_token_id=eos_token_ids,
        pad_token_id=1,
    )
    outputs = [row[len(prompt) :] for row in found.tolist()]
    ends = [
        next((i + 1 for i, token in enumerate(row) if token in eos_token_ids), len(row)) for row in outputs
    ]
    return [row[:end] for row, end in zip(outputs, ends, strict=True)]


def assert_equal(
    llm: LLM, model: Any, prompts: list[list[int]], params: SamplingParams, eos_token_ids: list[int]
) -> set[str | None]:
    """Returns the reasons for which beams have ended."""
    outputs = llm.generate(prompts, params)
    llm.core.check_integrity()
    assert llm.core.scheduler.pool.num_used == 0
    for prompt, output in zip(prompts, outputs, strict=True):
        expected = hf_beams(model, prompt, params, eos_token_ids)
        assert [completion.token_ids for completion in output.outputs] == expected
    return {completion.finish_reason for output in outputs for completion in output.outputs}


@pytest.fixture(scope="module")
def tiny_opt(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LLM, Any]]:
    from transformers import AutoModelForCausalLM

    options = ("--max_beam_width", "4", "--page-size", "16")
    engine = build_tiny_opt(tmp_path_factory.mktemp("beams") / "engine", *options)
    with LLM(engine) as llm:
        yield llm, AutoModelForCausalLM.from_pretrained(TINY_OPT, dtype=torch.float32)


@pytest.fixture(scope="module")
def opt_llm(
    opt_checkpoint: Callable[[str], OptCheckpoint], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], LLM]:
    @cache
    def llm(variant: str) -> LLM:
        source, path = opt_checkpoint(variant), tmp_path_factory.mktemp("beams") / variant
        build = dataclasses.replace(BUILD, max_beam_width=4)
        build_engine(source.family, source.config, source.weights(), build, path)
        return LLM(path)

    return llm


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("beam_width", [2, 4])
def test_all_beams_of_the_tiny_opt_are_those_of_transformers(
    tiny_opt: tuple[LLM, Any], beam_width: int, length_penalty: float, early_stopping: bool | str
) -> None:
    """A full stop ends a beam, too: so some end early and others late."""
    llm, model = tiny_opt
    assert llm.tokenizer is not None
    (full_stop,) = llm.tokenizer.encode(".")[1:]
    params = SamplingParams(
        beam_width=beam_width,
        n=beam_width,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        max_tokens=20,
        stop_token_ids=[full_stop],
    )
    eos = [*llm.core.executor.eos_token_ids, full_stop]
    reasons = assert_equal(llm, model, [llm.tokenizer.encode(text) for text in TEXTS], params, eos)
    assert "stop" in reasons


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(beam_width=4, n=4, max_tokens=30),
        SamplingParams(beam_width=4, n=2, max_tokens=30, length_penalty=0.5, early_stopping=True),
        SamplingParams(beam_width=3, n=3, max_tokens=30, length_penalty=2.0, early_stopping="never"),
        SamplingParams(beam_width=2, n=1, max_tokens=30, length_penalty=-1.0),
        SamplingParams(beam_width=4, n=4, max_tokens=1),
        SamplingParams(beam_width=4, n=4, max_tokens=20, min_tokens=12, length_penalty=0.0),
    ],
    ids=str,
)
def test_all_beams_of_random_weights_are_those_of_transformers(
    opt_llm: Callable[[str], LLM], variant: str, params: SamplingParams
) -> None:
    """Ends are frequent here: seven tokens of the vocabulary end a beam."""
    ends = list(range(40, 46))
    llm = opt_llm(variant)
    params = dataclasses.replace(params, stop_token_ids=ends)
    assert_equal(llm, hf_model(variant), PROMPTS, params, [*llm.core.executor.eos_token_ids, *ends])


def beams(width: int = 4, **values: Any) -> SamplingParams:
    return SamplingParams(**{"beam_width": width, "n": width, "max_tokens": 12, **values})


def run(core: EngineCore) -> dict[str, RequestOutput]:
    last: dict[str, RequestOutput] = {}
    for _ in range(2000):
        if core.has_unfinished:
            last |= {output.request_id: output for output in core.step()}
            core.check_integrity()
    assert not core.has_unfinished, "requests never end"
    assert core.scheduler.pool.num_used == 0
    return last


def toy_beams(prompt: list[int], params: SamplingParams) -> list[tuple[list[int], float]]:
    """Beam search as its definition says, for `early_stopping=False`: (tokens, log probability), best first."""
    width, running, ended = params.beam_width, [((), 0.0)], []
    for length in range(1, (params.max_tokens or 0) + 1):
        best = []
        for tokens, logprob in running:
            scores = toy_logits([*prompt, *tokens]).log_softmax(-1) + torch.tensor(logprob)
            best += [((*tokens, token), score) for token, score in enumerate(scores.tolist())]
        best = sorted(best, key=lambda beam: -beam[1])[: 2 * width]
        over = [beam[0][-1] == EOS or length == params.max_tokens for beam in best]
        ended += [beam for beam, end in zip(best[:width], over, strict=False) if end]
        ended = sorted(ended, key=lambda beam: -beam[1] / len(beam[0]) ** params.length_penalty)[:width]
        running = [beam for beam, end in zip(best, over, strict=True) if not end][:width]
        worst = ended[-1][1] / len(ended[-1][0]) ** params.length_penalty if len(ended) == width else None
        if worst is not None and (not running or running[0][1] / length**params.length_penalty <= worst):
            break
    return [(list(tokens), logprob) for tokens, logprob in ended[: params.n]]


LIMITS = [
    {"num_pages": 100, "max_num_tokens": 100, "max_batch_size": 16},
    {"num_pages": 100, "max_batch_size": 4},  # one search at a time
    {"num_pages": 28, "max_num_tokens": 4},  # as few as the longest of these searches may need
    {"num_pages": 104, "page_size": 1},
    {"num_pages": 8, "page_size": 32},
]


@pytest.mark.parametrize("enable_prefix_cache", [True, False])
@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_searches_do_not_depend_on_their_company(limits: dict[str, int], enable_prefix_cache: bool) -> None:
    core = EngineCore(ToyExecutor(**limits), enable_prefix_cache=enable_prefix_cache)
    prompts = [[3, 4, 5], list(range(1, 15)), [9], [7] * 8]
    for index, prompt in enumerate(prompts):
        core.add_request(str(index), prompt, beams())
        core.add_request(f"greedy {index}", prompt, SamplingParams(max_tokens=12, temperature=0))
    outputs = run(core)
    for index, prompt in enumerate(prompts):
        found = [(c.token_ids, c.cumulative_logprob) for c in outputs[str(index)].outputs]
        expected = toy_beams(prompt, beams())
        assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]
        assert [p for _, p in found] == pytest.approx([p for _, p in expected], abs=1e-4)


def test_few_pages_do_preempt_beams() -> None:
    """Guards the test above: there beams have to be computed again."""

    def tokens_run(num_pages: int) -> int:
        executor = ToyExecutor(num_pages=num_pages, max_batch_size=16, max_num_tokens=64)
        core = EngineCore(executor, enable_prefix_cache=False)
        for name in "abcd":
            core.add_request(name, [5] * 13, beams(ignore_eos=True))
        run(core)
        return sum(step.num_tokens for step in executor.steps)

    assert tokens_run(100) == 4 * (13 + 4 * 11)
    assert tokens_run(24) > 4 * (13 + 4 * 11)


def test_beams_share_the_pages_of_the_prompt() -> None:
    core = EngineCore(ToyExecutor(max_num_tokens=64))
    core.add_request("a", list(range(1, 38)), beams(ignore_eos=True))
    core.step()
    core.step()
    assert len(core.scheduler.running) == 4
    assert core.scheduler.pool.num_used == 9 + 4, "nine full pages, and the last page of each beam"


def test_text_and_order(byte_level: Tokenizer) -> None:
    executor = ToyExecutor(vocab_size=VOCAB_SIZE)
    core = EngineCore(executor, byte_level)
    core.add_request("a", [3, 4, 5], beams())
    output = run(core)["a"]
    assert [c.index for c in output.outputs] == [0, 1, 2, 3]
    for completion in output.outputs:
        shown = completion.token_ids[:-1] if completion.finish_reason == "stop" else completion.token_ids
        assert completion.text == byte_level.decode(shown, skip_special_tokens=True)


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_search_that_is_cancelled_or_late_leaves_nothing_behind(steps: int) -> None:
    now = [0.0]
    core = EngineCore(ToyExecutor(max_batch_size=8), clock=lambda: now[0])
    core.add_request("gone", [5, 6], beams(ignore_eos=True))
    core.add_request("late", [6, 5], beams(ignore_eos=True), deadline=1.0)
    for _ in range(steps):
        core.step()
    assert core.cancel("gone")
    core.check_integrity()
    now[0] = 1.0
    (late,) = core.step()
    core.check_integrity()
    assert not core.has_unfinished and core.scheduler.pool.num_used == 0
    assert {c.finish_reason for c in late.outputs} == {"timeout"}
    assert [len(c.token_ids) for c in late.outputs] == [steps] * (4 if steps else 1)


@dataclasses.dataclass
class BreakingToy(ToyExecutor):
    """breaks: the copy that fails; its first pages are copied."""

    breaks: int = -1
    copies: int = 0

    def copy_pages(self, source: Any, target: Any) -> None:
        self.copies += 1
        if self.copies == self.breaks:
            self.cache[list(target)] = -1
            raise RuntimeError("no copy today")
        super().copy_pages(source, target)


def test_after_a_copy_that_failed_beams_are_computed_again() -> None:
    executor = BreakingToy(breaks=2)
    core = EngineCore(executor)
    core.add_request("a", [3, 4, 5], beams(ignore_eos=True))
    with pytest.raises(RuntimeError, match="no copy today"):
        run(core)
    core.check_integrity()
    found = run(core)["a"].outputs
    core = EngineCore(ToyExecutor())
    core.add_request("a", [3, 4, 5], beams(ignore_eos=True))
    assert found == run(core)["a"].outputs


def test_a_model_may_end_at_a_token_beyond_its_vocabulary() -> None:
    """As config.json may have it: nothing can choose that token, so only the length ends a search."""
    core = EngineCore(ToyExecutor(eos_token_ids=(10**9,)))
    core.add_request("a", [3], beams(max_tokens=4, min_tokens=2))
    assert [output.finish_reason for output in run(core)["a"].outputs] == ["length"] * 4


def test_logits_that_are_not_finite_are_an_error() -> None:
    class NanToy(ToyExecutor):
        def execute(self, step: StepInput) -> torch.Tensor:
            return super().execute(step) * torch.nan

    core = EngineCore(NanToy())
    core.add_request("a", [3], beams())
    with pytest.raises(EngineError, match="logits for a are not finite"):
        core.step()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"beam_width": 0}, "beam_width is 0"),
        ({"beam_width": 2, "n": 3}, "n is 3; accepted: at most beam_width"),
        ({"beam_width": 2, "temperature": 0.7}, "temperature is 0.7; accepted: 0 or 1"),
        ({"beam_width": 2, "top_p": 0.5}, "top_p is 0.5; accepted: 1.0 with beam_width"),
        ({"beam_width": 2, "logprobs": 1}, "logprobs is 1"),
        ({"beam_width": 2, "stop": ["x"]}, "stop is"),
        ({"beam_width": 2, "best_of": 3}, "best_of is 3"),
        ({"beam_width": 2, "length_penalty": float("inf")}, "length_penalty is inf"),
        (
            {"beam_width": 2, "length_penalty": 1e308},
            "length_penalty is 1e\\+308; accepted: a number from -5 to 5",
        ),
        ({"beam_width": 2, "length_penalty": -(10**400)}, "length_penalty is -1000"),
        ({"beam_width": 2, "early_stopping": "maybe"}, "early_stopping is 'maybe'; accepted: True, False or"),
        ({"beam_width": 2, "early_stopping": 1}, "early_stopping is 1"),
        ({"length_penalty": 2.0}, "length_penalty is 2.0; accepted: 1 without beam_width"),
        ({"early_stopping": True}, "early_stopping is True; accepted: False without beam_width"),
    ],
)
def test_what_does_not_go_together_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        SamplingParams(**values)


def test_what_the_engine_is_too_small_for_is_refused() -> None:
    core = EngineCore(ToyExecutor(max_beam_width=2))
    with pytest.raises(
        RequestError, match="beam_width is 3; accepted: 1 to 2, or build with a larger --max-beam"
    ):
        core.check_request([5], beams(3))

    class WithoutCopies(ToyExecutor):
        copy_pages = None  # type: ignore[assignment]

    with pytest.raises(RequestError, match="beam_width is 2; accepted: 1, this target has no beam search"):
        EngineCore(WithoutCopies()).check_request([5], beams(2))
    core = EngineCore(ToyExecutor(num_pages=16))
    core.check_request([5] * 4, beams(max_tokens=13))
    with pytest.raises(
        RequestError,
        match="beam_width = 4 may need 20 cache pages of 4 tokens, the engine has num_pages = 16",
    ):
        core.check_request([5] * 4, beams(max_tokens=14))
