"""Oracle: the table of accepted ranges in the docstring of SamplingParams; vLLM's defaults."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from trtc.core.errors import RequestError
from trtc.runtime.sampling_params import SamplingParams

REFUSED: list[tuple[str, Any]] = [
    ("n", 0),
    ("n", 1.0),
    ("max_tokens", 0),
    ("max_tokens", -1),
    ("max_tokens", True),
    ("min_tokens", -1),
    ("min_tokens", 17),
    ("n", 10_001),
    ("best_of", 10**9),
    ("best_of", 0),
    ("best_of", 2.0),
    ("logit_bias", {5: 100.5}),
    ("logit_bias", {5: math.nan}),
    ("logit_bias", {5: "1"}),
    ("logit_bias", {5: True}),
    ("logit_bias", {"5": 1}),
    ("logit_bias", {-1: 1}),
    ("logit_bias", [5]),
    ("bad_words", "word"),
    ("bad_words", [""]),
    ("bad_words", [5]),
    ("bad_words_ids", [5]),
    ("bad_words_ids", [[]]),
    ("bad_words_ids", [[-1]]),
    ("bad_words_ids", "5"),
    ("include_stop_str_in_output", 1),
    ("temperature", -0.1),
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("temperature", 10**400),
    ("temperature", "1"),
    ("temperature", None),
    ("top_k", -2),
    ("top_k", 0.5),
    ("top_p", 0.0),
    ("top_p", 1.01),
    ("top_p", -0.5),
    ("top_p", math.nan),
    ("min_p", -0.1),
    ("min_p", 1.1),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", -1.0),
    ("repetition_penalty", 1e-320),
    ("repetition_penalty", 1001),
    ("repetition_penalty", math.inf),
    ("presence_penalty", 2.1),
    ("presence_penalty", -(10**400)),
    ("frequency_penalty", -2.1),
    ("stop", ""),
    ("stop", ["a", ""]),
    ("stop", ["a", "\udcff"]),
    ("bad_words", ["\ud800"]),
    ("stop", 3),
    ("stop", ["a", 3]),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", ["a"]),
    ("stop_token_ids", 3),
    ("stop_token_ids", [True]),
    ("ignore_eos", 1),
    ("seed", -1),
    ("seed", 2**64),
    ("seed", 1.5),
    ("logprobs", -1),
    ("logprobs", True),
    ("prompt_logprobs", -1),
    ("skip_special_tokens", None),
]


@pytest.mark.parametrize(("name", "value"), REFUSED, ids=[f"{name}={value!r:.40}" for name, value in REFUSED])
def test_a_bad_value_is_refused_in_one_line_that_names_it(name: str, value: Any) -> None:
    with pytest.raises(RequestError) as error:
        SamplingParams(**{name: value})
    message = str(error.value)
    assert message.startswith(f"{name} is {value!r}; accepted: ")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("max_tokens", np.int64(0), "0"),
        ("max_tokens", np.float32(3), "3.0"),
        ("max_tokens", np.bool_(True), "np.True_"),
        ("max_tokens", np.array(3), "array(3)"),
        ("max_tokens", torch.tensor(3), "tensor(3)"),  # of a device perhaps, for which its reader would wait
        ("temperature", np.float32("nan"), "nan"),
        ("temperature", np.bool_(True), "np.True_"),
        ("temperature", torch.tensor(0.5), "tensor(0.5000)"),
        ("temperature", Fraction(10**400, 3), f"Fraction({10**400}, 3)"),
        ("stop_token_ids", [np.int32(-1)], "[-1]"),
        ("stop_token_ids", [np.bool_(True)], "[np.True_]"),
        ("logit_bias", {5: np.float32(100.5)}, "{5: 100.5}"),
    ],
)
def test_what_is_no_number_of_the_range_is_refused_from_libraries_too(
    name: str, value: Any, shown: str
) -> None:
    with pytest.raises(RequestError) as error:
        SamplingParams(**{name: value})
    assert str(error.value).startswith(f"{name} is {shown}; accepted: ")


def test_edges_are_accepted() -> None:
    SamplingParams(temperature=0, top_k=-1, top_p=1, min_p=1, presence_penalty=-2, frequency_penalty=2)
    SamplingParams(max_tokens=None, min_tokens=10_000, seed=2**64 - 1, logprobs=0, top_p=1e-9)
    SamplingParams(min_tokens=16, stop=("a", "b"), stop_token_ids=[], repetition_penalty=1e-3)


@pytest.mark.parametrize("integer", [np.int64, np.uint8, np.int32])
@pytest.mark.parametrize("number", [np.float32, np.float64, np.float16, np.longdouble])
def test_numbers_of_numpy_become_pythons(integer: Any, number: Any) -> None:
    """Oracle: the same parameters of Python's numbers, as JSON, which knows no others."""

    def params(integer: Any, number: Any) -> SamplingParams:
        return SamplingParams(
            n=integer(2),
            best_of=integer(3),
            max_tokens=integer(4),
            min_tokens=integer(1),
            temperature=number(0.5),
            top_k=integer(7),
            top_p=number(0.25),
            min_p=number(0.125),
            repetition_penalty=number(2),
            presence_penalty=number(-1),
            frequency_penalty=number(1),
            logit_bias={integer(5): number(-1.5)},
            bad_words_ids=[(integer(5), 6), [integer(7)]],
            stop_token_ids=(integer(8), 9),
            seed=integer(3),
            logprobs=integer(1),
            prompt_logprobs=integer(0),
        )

    ours, theirs = params(int, float), params(integer, number)
    assert ours == theirs and json.dumps(asdict(ours)) == json.dumps(asdict(theirs))
    assert "np." not in repr(theirs)
    beams = SamplingParams(beam_width=integer(2), temperature=number(0), length_penalty=number(1.5))
    assert (type(beams.beam_width), type(beams.length_penalty), type(beams.temperature)) == (
        int,
        float,
        float,
    )


def test_values_that_do_not_fit_each_other_are_refused() -> None:
    with pytest.raises(RequestError, match=r"best_of is 2; accepted: at least n \(3\)") as error:
        SamplingParams(n=3, best_of=2)
    assert error.value.field == "best_of"


@pytest.mark.parametrize(
    "value",
    [
        {"logit_bias": {5: -100, 6: 100.0}},
        {"bad_words": ["a"]},
        {"bad_words_ids": [(1, 2)]},
        {"min_tokens": 1},
    ],
    ids=str,
)
def test_what_changes_the_choice_is_not_left_to_the_device(value: dict[str, Any]) -> None:
    assert SamplingParams(temperature=0).plain_greedy
    assert not SamplingParams(temperature=0, **value).plain_greedy


def test_the_defaults_are_vllms() -> None:
    params = SamplingParams()
    assert (params.n, params.max_tokens, params.temperature, params.top_p) == (1, 16, 1.0, 1.0)
    assert params.stop_strings == () and params.seed is None and params.logprobs is None
    assert not params.greedy and not params.has_penalties


@pytest.mark.parametrize(
    ("stop", "strings"), [(None, ()), ("ab", ("ab",)), (["a", "b"], ("a", "b")), ([], ())], ids=repr
)
def test_stop_takes_one_string_or_many(stop: Any, strings: tuple[str, ...]) -> None:
    assert SamplingParams(stop=stop).stop_strings == strings


def test_zero_and_tiny_temperatures_are_greedy() -> None:
    assert SamplingParams(temperature=0).greedy and SamplingParams(temperature=9e-6).greedy
    assert not SamplingParams(temperature=1e-5).greedy
