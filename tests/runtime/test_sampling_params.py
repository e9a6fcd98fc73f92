"""Oracle: the table of accepted ranges in the docstring of SamplingParams; vLLM's defaults."""

from __future__ import annotations

import math
from typing import Any

import pytest
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
    ("temperature", -0.1),
    ("temperature", math.nan),
    ("temperature", math.inf),
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
    ("repetition_penalty", math.inf),
    ("presence_penalty", 2.1),
    ("frequency_penalty", -2.1),
    ("stop", ""),
    ("stop", ["a", ""]),
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


@pytest.mark.parametrize(("name", "value"), REFUSED, ids=[f"{name}={value!r}" for name, value in REFUSED])
def test_a_bad_value_is_refused_in_one_line_that_names_it(name: str, value: Any) -> None:
    with pytest.raises(RequestError) as error:
        SamplingParams(**{name: value})
    message = str(error.value)
    assert message.startswith(f"{name} is {value!r}; accepted: ")
    assert "\n" not in message


def test_edges_are_accepted() -> None:
    SamplingParams(temperature=0, top_k=-1, top_p=1, min_p=1, presence_penalty=-2, frequency_penalty=2)
    SamplingParams(max_tokens=None, min_tokens=10_000, seed=2**64 - 1, logprobs=0, top_p=1e-9)
    SamplingParams(min_tokens=16, stop=("a", "b"), stop_token_ids=[], repetition_penalty=1e-3)


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
