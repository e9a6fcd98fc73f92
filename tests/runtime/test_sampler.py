"""Oracles: transformers' logits processors for filters and penalties, torch's log_softmax for logprobs, the
probabilities themselves for how often a token is drawn."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from trtc.core.errors import EngineError
from trtc.runtime import sampler
from trtc.runtime.bad_words import BadWords
from trtc.runtime.request import Request
from trtc.runtime.sampler import Filters, adjusted, filtered_weights, sample, top_logprobs, uniform
from trtc.runtime.sampling_params import SamplingParams

VOCAB = 200


def request(prompt: list[int] | None = None, output: list[int] | None = None, **params: Any) -> Request:
    r = Request(
        "r", prompt or [1, 2, 3], SamplingParams(**params), frozenset({0}), seed=params.get("seed") or 0
    )
    for token_id in output or []:
        r.append_output(token_id)
    return r


def random_logits(rows: int, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def probabilities(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """The distribution `sample` draws from, back in vocabulary order: float64 [rows, VOCAB]."""
    scaled = (logits - logits.amax(-1, keepdim=True)) / params.temperature
    ordered, ids = scaled.sort(dim=-1, descending=True, stable=True)
    rows = len(logits)
    weights = filtered_weights(
        ordered,
        Filters(
            min_p=torch.full((rows, 1), params.min_p),
            top_k=torch.full((rows, 1), params.top_k if params.top_k > 0 else logits.shape[1]),
            top_p=torch.full((rows, 1), params.top_p),
        ),
    )
    return torch.zeros_like(weights).scatter_(1, ids, weights / weights.sum(-1, keepdim=True))


FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 10},
    {"top_k": 10_000},
    {"top_p": 0.05},
    {"top_p": 0.9},
    {"min_p": 0.02},
    {"min_p": 1.0},
    {"temperature": 1.3, "min_p": 0.01, "top_k": 20, "top_p": 0.8},
]


@pytest.mark.parametrize("values", FILTERS, ids=str)
def test_filters_are_those_of_transformers(values: dict[str, Any]) -> None:
    params, logits = SamplingParams(**values), random_logits(32)
    reference = LogitsProcessorList()
    if params.temperature != 1:
        reference.append(TemperatureLogitsWarper(params.temperature))
    if params.min_p:
        reference.append(MinPLogitsWarper(params.min_p))
    if params.top_k:
        reference.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        reference.append(TopPLogitsWarper(params.top_p))
    expected = reference(torch.zeros(32, 1, dtype=torch.long), logits).double().softmax(-1)
    torch.testing.assert_close(probabilities(logits, params), expected, rtol=1e-5, atol=1e-7)


def test_ties_with_the_kth_token_stay() -> None:
    """Oracle: TopKLogitsWarper, which compares with the k-th score."""
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]])
    kept = probabilities(logits, SamplingParams(top_k=2)) > 0
    expected = TopKLogitsWarper(2)(torch.zeros(1, 1, dtype=torch.long), logits).isfinite()
    assert kept.tolist() == expected.tolist() == [[False, True, True, True, True, False]]


def test_top_p_reached_exactly_keeps_no_more() -> None:
    """Oracle: TopPLogitsWarper; of two equal halves, one already reaches one half."""
    logits = torch.tensor([[2.0, 2.0, -torch.inf]])
    kept = probabilities(logits, SamplingParams(top_p=0.5)) > 0
    expected = TopPLogitsWarper(0.5)(torch.zeros(1, 1, dtype=torch.long), logits).isfinite()
    assert kept.sum() == expected.sum() == 1


def test_top_p_of_one_keeps_what_rounding_would_lose() -> None:
    """Oracle: a filter that is off removes nothing, not even a token of probability 4e-18."""
    assert (probabilities(torch.tensor([[0.0, -40.0]]), SamplingParams()) > 0).all()


def test_every_token_that_ties_with_the_kth_is_drawn() -> None:
    """Oracle: TopKLogitsWarper keeps all four; each has probability above 0.1, 300 draws miss none."""
    requests = [request(top_k=2, seed=seed) for seed in range(300)]
    tokens = sample(torch.tensor([[0.0, 5.0, 4.0, 4.0, 4.0]]).expand(300, 5), requests)
    assert {token.token_id for token in tokens} == {1, 2, 3, 4}


@pytest.mark.parametrize("penalty", [0.8, 1.3])
def test_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    prompts, outputs = [[5, 6, 7, 7], [1], [9, 10]], [[8, 8], [3, 4, 199], []]
    requests = [request(p, o, repetition_penalty=penalty) for p, o in zip(prompts, outputs, strict=True)]
    logits = random_logits(3)
    processor = RepetitionPenaltyLogitsProcessor(penalty)
    expected = [
        processor(torch.tensor([r.token_ids]), logits[i : i + 1].clone())[0] for i, r in enumerate(requests)
    ]
    assert torch.equal(adjusted(logits, requests), torch.stack(expected))


def test_logit_bias_is_that_of_transformers_and_comes_first() -> None:
    """Also together with a penalty: the biased logit is what it divides or multiplies."""
    bias = {5: 2.5, 9: -100.0, 100: 100}
    plain, penalized = (request([5, 7], logit_bias=bias, repetition_penalty=p) for p in (1.0, 1.5))
    logits = random_logits(3)
    biased = SequenceBiasLogitsProcessor([[[token], float(value)] for token, value in bias.items()])(
        torch.tensor([[5, 7]]), logits[:1].clone()
    )
    scores = adjusted(logits[:1].expand(2, -1).contiguous(), [plain, penalized])
    torch.testing.assert_close(scores[:1], biased)
    expected = RepetitionPenaltyLogitsProcessor(1.5)(torch.tensor([[5, 7]]), biased)
    torch.testing.assert_close(scores[1:], expected)
    ever = [request(logit_bias={100: 100}, temperature=t, seed=3) for t in (0, 1)]
    assert [token.token_id for token in sample(logits[:2], ever)] == [100, 100]


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_bad_words_are_those_of_transformers(data: st.DataObject) -> None:
    """Sequences of which prompt and output together may hold the beginning."""
    ids = st.integers(1, 4)
    words = data.draw(st.lists(st.lists(ids, min_size=1, max_size=4), min_size=1, max_size=5))
    prompt = data.draw(st.lists(ids, min_size=1, max_size=3))
    output = data.draw(st.lists(ids, max_size=3))
    r = request(prompt, output)
    r.bad_words = BadWords(words)
    logits = random_logits(1, vocab=10)
    processor = NoBadWordsLogitsProcessor(words, eos_token_id=torch.tensor([0]))
    expected = processor(torch.tensor([r.token_ids]), logits.clone())
    assert torch.equal(adjusted(logits, [r]), expected)


def test_presence_and_frequency_count_output_tokens_only() -> None:
    """Oracle: OpenAI's formula, logit - count * frequency - (count > 0) * presence."""
    logits = random_logits(2)
    requests = [
        request([5, 6], [7, 7, 8], presence_penalty=0.5, frequency_penalty=0.25),
        request([5, 6], [7, 7, 8]),
    ]
    expected = logits.clone()
    expected[0, 7] -= 2 * 0.25 + 0.5
    expected[0, 8] -= 0.25 + 0.5
    torch.testing.assert_close(adjusted(logits, requests), expected)


def test_min_tokens_bans_what_would_end_the_request() -> None:
    early = request(min_tokens=2, stop_token_ids=[4, VOCAB + 1], output=[9])
    late = request(min_tokens=2, stop_token_ids=[4], output=[9, 9])
    ignoring = request(min_tokens=2, ignore_eos=True)
    scores = adjusted(random_logits(3), [early, late, ignoring])
    assert (scores == -torch.inf).nonzero().tolist() == [[0, 0], [0, 4]]


def test_without_adjustments_logits_pass_untouched() -> None:
    logits = random_logits(1)
    assert adjusted(logits, [request(temperature=0)]) is logits


def test_greedy_rows_take_the_first_maximum_whatever_the_others_do() -> None:
    logits = random_logits(3)
    logits[0, [17, 40]] = 99.0
    expected = [17, int(logits[1].argmax())]
    greedy = [request(temperature=0), request(temperature=0, top_p=0.1)]
    assert [t.token_id for t in sample(logits[:2], greedy)] == expected
    mixed = sample(logits, [*greedy, request(temperature=2.0, seed=3)])
    assert [t.token_id for t in mixed[:2]] == expected


def test_sampling_leaves_the_logits_unchanged() -> None:
    logits = random_logits(2)
    before = logits.clone()
    sample(
        logits,
        [request(presence_penalty=1.0, output=[3]), request(temperature=0.5, min_tokens=2, logprobs=2)],
    )
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    "values", [{}, {"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.2, "temperature": 1.5}], ids=str
)
def test_tokens_come_as_often_as_their_probability_says(values: dict[str, Any]) -> None:
    """Oracle: chi-square against the filtered distribution; 39.4: its 99.999% point, 9 degrees of freedom."""
    draws, logits = 4000, random_logits(1, seed=5, vocab=10) / 3
    expected = draws * probabilities(logits, SamplingParams(**values))[0]
    requests = [request(seed=seed, **values) for seed in range(draws)]
    tokens = [token.token_id for token in sample(logits.expand(draws, 10), requests)]
    counts = torch.bincount(torch.tensor(tokens), minlength=10).double()
    possible = expected > 0
    assert not counts[~possible].any()
    assert float(((counts - expected)[possible] ** 2 / expected[possible]).sum()) < 39.4


def test_a_top_k_shared_by_all_rows_draws_what_the_full_sort_draws() -> None:
    """Oracle: a row without top_k in the batch forces the full sort; ties at the k-th place included."""
    logits = random_logits(20).round()
    requests = [request(seed=i, top_k=1 + i % 7, output=[1] * i) for i in range(20)]
    short = [t.token_id for t in sample(logits, requests)]
    full = sample(torch.cat([logits, logits[:1]]), [*requests, request(seed=1)])
    assert short == [t.token_id for t in full[:20]]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_the_best_tokens_alone_draw_what_the_whole_vocabulary_draws(data: st.DataObject) -> None:
    """Oracle: the same rows with all of the vocabulary put in order, and each row without the others."""
    rows = data.draw(st.integers(1, 4))
    spread = data.draw(st.sampled_from([0.3, 3.0, 12.0]))  # from nearly uniform to nearly certain
    logits = (random_logits(rows, data.draw(st.integers(0, 999)), 60) * spread).round(
        decimals=data.draw(st.integers(0, 2))
    )
    requests = [
        request(
            seed=data.draw(st.integers(0, 2**32)),
            temperature=data.draw(st.sampled_from([0.5, 1.0, 2.0])),
            top_k=data.draw(st.sampled_from([-1, -1, 1, 3, 7, 20])),
            top_p=data.draw(st.sampled_from([1.0, 1.0, 0.5, 0.9, 0.99])),
            min_p=data.draw(st.sampled_from([0.0, 0.0, 0.01, 0.5])),
        )
        for _ in range(rows)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "CANDIDATES", 60)
        whole = sample(logits, requests)
        patch.setattr(sampler, "CANDIDATES", data.draw(st.integers(1, 8)))
        assert sample(logits, requests) == whole
        assert [sample(logits[row : row + 1], [one])[0] for row, one in enumerate(requests)] == whole


@pytest.mark.parametrize("values", [{}, {"top_p": 0.9}], ids=str)
def test_a_row_of_ties_leaves_the_others_alone(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: each row without the other. All tokens of the first are equally likely, so that all are its candidates."""
    monkeypatch.setattr(sampler, "CANDIDATES", 2)
    logits = torch.cat((torch.zeros(1, VOCAB), random_logits(1) / 10))
    for seed in range(40):
        requests = [request(seed=seed, **values) for _ in range(2)]
        assert sample(logits, requests)[1] == sample(logits[1:], requests[1:])[0]


def test_a_token_depends_on_seed_sample_index_and_position_alone() -> None:
    logits = random_logits(64).div(10)

    def tokens(requests: list[Request]) -> list[int]:
        return [t.token_id for t in sample(logits[: len(requests)], requests)]

    base = tokens([request(seed=7, output=[1] * i) for i in range(64)])
    assert base == tokens([request([4] * (i + 1), output=[2] * i, seed=7) for i in range(64)])
    assert base != tokens([request(seed=8, output=[1] * i) for i in range(64)])
    alone = sample(logits[9:10], [request(seed=7, output=[1] * 9)])
    assert alone[0].token_id == base[9]


def test_uniforms_are_spread_and_reproducible() -> None:
    """Oracle: the mean of 4000 lies within five standard errors of one half, and none occurs twice."""
    values = torch.tensor([uniform(2**64 - 1, 3, position) for position in range(4000)], dtype=torch.float64)
    assert values.min() >= 0 and values.max() < 1
    assert abs(float(values.mean()) - 0.5) < 5 / (12 * 4000) ** 0.5
    assert len(set(values.tolist())) == 4000
    assert len({uniform(1, 0, 0), uniform(0, 1, 0), uniform(0, 0, 1), uniform(0, 0, 0)}) == 4


def test_the_last_kept_token_is_the_last_that_can_be_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: a number just below 1 may round up to the total; the least probable kept token comes out."""
    monkeypatch.setattr("trtc.runtime.sampler.uniform", lambda *_: 1.0)
    logits = random_logits(1)
    third = int(logits[0].topk(3).indices[2])
    full = sample(logits.expand(2, VOCAB), [request(top_k=3), request()])
    assert full[0].token_id == third
    assert full[1].token_id == int(logits[0].argmin())


@pytest.mark.parametrize("temperature", [1e-5, 1e-3])
def test_a_tiny_temperature_is_greedy_without_overflow(temperature: float) -> None:
    logits = random_logits(8) * 1e4
    tokens = [
        t.token_id for t in sample(logits, [request(temperature=temperature, seed=i) for i in range(8)])
    ]
    assert tokens == logits.argmax(-1).tolist()


@pytest.mark.parametrize(
    "values",
    [
        {"top_p": 5e-324},
        {"top_k": 2**70},
        {"temperature": sys.float_info.max},
        {"repetition_penalty": 0.001},
        {"repetition_penalty": 1000},
        {"logit_bias": {3: 100, 5: -100}, "repetition_penalty": 0.001},
    ],
)
def test_the_ends_of_what_is_accepted_give_tokens(values: dict[str, Any]) -> None:
    """One request with a value that float32 or int64 cannot hold would end the engine for all the others."""
    logits = random_logits(1) * 1e4
    (token,) = sample(logits, [request(seed=1, **values)])
    assert 0 <= token.token_id < VOCAB
    if "top_p" in values:
        assert token.token_id == int(logits.argmax())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_not_finite_are_an_error(value: float, temperature: float) -> None:
    logits = random_logits(2)
    logits[1] = value
    with pytest.raises(EngineError, match="logits for request r are not finite"):
        sample(logits, [request(temperature=temperature)] * 2)


def test_a_banned_token_of_the_model_is_no_error() -> None:
    logits = random_logits(1)
    logits[0, 5:] = -torch.inf
    assert sample(logits, [request(seed=1)])[0].token_id < 5


def test_logprobs_are_log_softmax_of_the_raw_logits() -> None:
    """Oracle: torch.log_softmax in float64; penalties and temperature must not show."""
    logits = random_logits(3)
    requests = [
        request(temperature=0, logprobs=4, repetition_penalty=5.0),
        request(temperature=0),
        request(seed=2, temperature=9.0, logprobs=0),
    ]
    first, second, third = sample(logits, requests)
    reference = logits.double().log_softmax(-1)
    assert second.logprobs is None and first.logprobs is not None and third.logprobs is not None
    assert list(third.logprobs) == [third.token_id]
    top = reference[0].topk(4).indices.tolist()
    assert next(iter(first.logprobs)) == first.token_id and set(first.logprobs) == {first.token_id, *top}
    for row, token in ((0, first), (2, third)):
        order = reference[row].argsort(descending=True).tolist()
        for token_id, entry in (token.logprobs or {}).items():
            assert entry.logprob == pytest.approx(float(reference[row, token_id]), abs=1e-5)
            assert entry.rank == order.index(token_id) + 1
            assert entry.decoded_token is None


def test_top_logprobs_of_the_whole_vocabulary() -> None:
    table = top_logprobs(random_logits(1), [7], [VOCAB])
    assert len(table[0]) == VOCAB and next(iter(table[0])) == 7
    assert sum(2.718281828459045**entry.logprob for entry in table[0].values()) == pytest.approx(1, abs=1e-4)


def test_no_requests_no_tokens() -> None:
    assert sample(torch.empty(0, VOCAB), []) == []
