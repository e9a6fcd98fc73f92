"""Whether what a request asks of beam search goes together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core.errors import RequestError

if TYPE_CHECKING:
    from .sampling_params import SamplingParams

_MAX_LENGTH_PENALTY = 5.0
"""To this power, and to its opposite, any length that fits a cache is a number of float32."""

_OTHERS = {
    "best_of": None,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "logit_bias": None,
    "bad_words": None,
    "bad_words_ids": None,
    "stop": None,
    "logprobs": None,
    "prompt_logprobs": None,
}
"""What has no part in a beam search, with the values at which it asks for nothing."""


def check_beam_params(params: SamplingParams) -> None:
    """Raises RequestError naming the field that is wrong. Whether it is of the right kind is known already."""
    penalty = params.length_penalty
    number = isinstance(penalty, int | float) and not isinstance(penalty, bool)
    if not number or not abs(penalty) <= _MAX_LENGTH_PENALTY:
        limit = f"{_MAX_LENGTH_PENALTY:g}"
        raise _refusal("length_penalty", penalty, f"a number from -{limit} to {limit}")
    if not isinstance(params.early_stopping, bool) and params.early_stopping != "never":
        raise _refusal("early_stopping", params.early_stopping, 'True, False or "never"')
    if params.beam_width == 1:
        if penalty != 1:
            raise _refusal("length_penalty", penalty, "1 without beam_width")
        if params.early_stopping:
            raise _refusal("early_stopping", params.early_stopping, "False without beam_width")
        return
    if params.n > params.beam_width:
        raise _refusal("n", params.n, f"at most beam_width ({params.beam_width})")
    if params.temperature not in (0.0, 1.0):
        raise _refusal("temperature", params.temperature, "0 or 1 with beam_width: beams are not drawn")
    for name, neutral in _OTHERS.items():
        value = getattr(params, name)
        if value != neutral and value not in ([], (), {}) and (name, value) != ("top_k", -1):
            raise _refusal(name, value, f"{neutral} with beam_width")


def _refusal(name: str, value: object, accepted: str) -> RequestError:
    return RequestError(f"{name} is {value!r}; accepted: {accepted}", name)
