"""What the tests of the server send."""

from __future__ import annotations

from typing import Any

from trtc.runtime.sampling_params import SamplingParams

PROMPTS = ["The city council of Norwick", "A storm", "Holt Motors said on Monday that it"]
MODEL = "tiny-opt"
MESSAGES: list[Any] = [
    {"role": "system", "content": "You write news."},
    {
        "role": "user",
        "content": [{"type": "text", "text": " The city "}, {"type": "text", "text": "council"}],
    },
]


def greedy(max_tokens: int, **others: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, **others)


def completion(**fields: Any) -> dict[str, Any]:
    """A good body with some fields changed; ... takes one out."""
    body = {"model": MODEL, "prompt": "x", **fields}
    return {name: value for name, value in body.items() if value is not ...}


DEEP: Any = "x"
for _ in range(400):
    DEEP = [DEEP]

MALFORMED: list[tuple[Any, int, str | None, str]] = [
    # body, status, field, part of the message
    (b"", 400, None, "the body is not JSON"),
    (b"{", 400, None, "the body is not JSON"),
    (b"\xff\xfe", 400, None, "the body is not JSON"),
    (b"[" * 100_000, 400, None, "the body is not JSON"),
    (b'{"model": NaN}', 400, None, "NaN is no JSON number"),
    (b'{"seed": ' + b"9" * 5000 + b"}", 400, None, "the body is not JSON"),
    (b'{"model": "\\ud800"}', 400, None, "the body is not JSON"),
    ([1, 2], 400, None, "accepted: an object"),
    (completion(model=...), 400, "model", "model is missing; accepted: 'tiny-opt'"),
    (completion(model=3), 400, "model", "accepted: 'tiny-opt'"),
    (completion(model="gpt-5"), 404, "model", "accepted: 'tiny-opt'"),
    (completion(prompt=...), 400, "prompt", "prompt is missing; accepted: a string"),
    (completion(prompt=None), 400, "prompt", "prompt is missing"),
    (completion(prompt=""), 200, None, ""),  # the tokenizer begins with </s>
    (completion(prompt=[]), 400, "prompt", "prompt is []"),
    (completion(prompt=[[]]), 400, "prompt", "accepted: a string"),
    (completion(prompt=[1, "x"]), 400, "prompt", "accepted: a string"),
    (completion(prompt=[1.5]), 400, "prompt", "accepted: a string"),
    (completion(prompt=[True]), 400, "prompt", "accepted: a string"),
    (completion(prompt={"a": 1}), 400, "prompt", "accepted: a string"),
    (completion(prompt=DEEP), 400, "prompt", "accepted: a string"),
    (completion(prompt=[-1]), 400, "prompt", "token id -1 at position 0"),
    (completion(prompt=[5, 1920]), 400, "prompt", "accepted: 0 to 1919"),
    (completion(prompt=[5] * 1024), 400, "prompt", "1024 tokens"),
    (completion(prompt="word " * 2000), 400, "prompt", "takes max_input_len = 1023"),
    (completion(prompt=["x"] * 65), 400, "prompt", "accepted: at most 64"),
    (completion(n=0), 400, "n", "n is 0; accepted: an integer from 1 to 10000"),
    (completion(n=17), 400, "n", "accepted: an integer from 1 to 16"),
    (completion(n=2.0), 400, "n", "n is 2.0"),
    (completion(n=True), 400, "n", "n is True"),
    (completion(prompt=["x"] * 20, n=16), 400, "n", "asks for 320 completions; accepted: at most 264"),
    (completion(max_tokens=0, echo=True), 200, None, ""),
    (completion(max_tokens=0), 400, "max_tokens", "accepted: an integer of at least 1"),
    (completion(max_tokens="16"), 400, "max_tokens", "max_tokens is '16'"),
    (completion(min_tokens=17), 400, "min_tokens", "at most max_tokens (16)"),
    (completion(temperature=-0.1), 400, "temperature", "accepted: a finite number of at least 0"),
    (completion(temperature=10**400), 400, "temperature", "accepted: a finite number of at least 0"),
    (completion(temperature="hot"), 400, "temperature", "temperature is 'hot'"),
    (completion(temperature=[[["hot"] * 9999]]), 400, "temperature", "accepted: a finite number"),
    (completion(top_p=0), 400, "top_p", "accepted: a number above 0 and at most 1"),
    (completion(top_k=-2), 400, "top_k", "top_k is -2"),
    (completion(min_p=2), 400, "min_p", "accepted: a number from 0 to 1"),
    (completion(presence_penalty=3), 400, "presence_penalty", "accepted: a number from -2 to 2"),
    (completion(frequency_penalty=-3), 400, "frequency_penalty", "accepted: a number from -2 to 2"),
    (completion(repetition_penalty=0), 400, "repetition_penalty", "accepted: a number from 0.001 to 1000"),
    (
        completion(repetition_penalty=1e-320),
        400,
        "repetition_penalty",
        "accepted: a number from 0.001 to 1000",
    ),
    (completion(top_p=1e-320, top_k=10**400), 200, None, ""),
    (completion(seed=-1), 400, "seed", "seed is -1"),
    (completion(seed=2**64), 400, "seed", "accepted: an integer from 0 to 18446744073709551615"),
    (completion(stop=5), 400, "stop", "accepted: a non-empty string or a list"),
    (completion(stop=[""]), 400, "stop", "accepted: a non-empty string"),
    (completion(stop=["a"] * 17), 400, "stop", "accepted: at most 16"),
    (completion(stop_token_ids=[1920]), 400, "stop_token_ids", "accepted: 0 to 1919"),
    (completion(stop_token_ids=[1] * 65), 400, "stop_token_ids", "accepted: at most 64"),
    (completion(logprobs=21), 400, "logprobs", "accepted: an integer from 0 to 20"),
    (completion(logprobs=True), 400, "logprobs", "logprobs is True"),
    (completion(echo=1), 400, "echo", "accepted: true or false"),
    (completion(stream="yes"), 400, "stream", "accepted: true or false"),
    (completion(stream_options={"include_usage": True}), 400, "stream_options", '"stream": true'),
    (completion(stream=True, stream_options={"usage": 1}), 400, "stream_options", "include_usage"),
    (completion(stream=True, stream_options=[]), 400, "stream_options", "accepted: an object"),
    (completion(n=4, best_of=3), 400, "best_of", "best_of is 3; accepted: at least n (4)"),
    (completion(best_of=17), 400, "best_of", "accepted: an integer from 1 to 16"),
    (completion(best_of=2, stream=True), 400, "best_of", "accepted: without stream"),
    (completion(beam_width=0), 400, "beam_width", "accepted: an integer of at least 1"),
    (completion(beam_width=17), 400, "beam_width", "accepted: an integer from 1 to 16"),
    (
        completion(beam_width=5),
        400,
        "beam_width",
        "accepted: 1 to 4, or build with a larger --max-beam-width",
    ),
    (completion(beam_width=2, stream=True), 400, "beam_width", "accepted: without stream"),
    (completion(beam_width=2, n=3), 400, "n", "accepted: at most beam_width (2)"),
    (completion(beam_width=2, logprobs=1), 400, "logprobs", "accepted: None with beam_width"),
    (completion(length_penalty=0.5), 400, "length_penalty", "accepted: 1 without beam_width"),
    (completion(beam_width=2, length_penalty="x"), 400, "length_penalty", "accepted: a number from -5"),
    (
        completion(beam_width=2, length_penalty=1e308),
        400,
        "length_penalty",
        "accepted: a number from -5 to 5",
    ),
    (completion(beam_width=2, early_stopping=1), 400, "early_stopping", 'accepted: True, False or "never"'),
    (completion(logit_bias=[5]), 400, "logit_bias", 'an object such as {"50256": -100}'),
    (completion(logit_bias={"x": 1}), 400, "logit_bias", 'an object such as {"50256": -100}'),
    (completion(logit_bias={"5": 101}), 400, "logit_bias", "numbers from -100 to 100"),
    (completion(logit_bias={"9" * 5000: 1}), 400, "logit_bias", "accepted: 0 to 1919"),
    (completion(logit_bias={"1920": 1}), 400, "logit_bias", "logit_bias has 1920; accepted: 0 to 1919"),
    (completion(logit_bias=dict.fromkeys(range(1025), 1)), 400, "logit_bias", "accepted: at most 1024"),
    (completion(bad_words="word"), 400, "bad_words", "accepted: a list of non-empty strings"),
    (completion(bad_words=["word"] * 1025), 400, "bad_words", "accepted: at most 1024"),
    (completion(bad_words_ids=[5]), 400, "bad_words_ids", "a list of non-empty lists of token ids"),
    (completion(bad_words_ids=[[5, 1920]]), 400, "bad_words_ids", "accepted: 0 to 1919"),
    (completion(bad_words_ids=[[]]), 400, "bad_words_ids", "a list of non-empty lists of token ids"),
    (completion(prompt_logprobs=21), 400, "prompt_logprobs", "accepted: an integer from 0 to 20"),
    (completion(prompt_logprobs=1, stream=True), 400, "prompt_logprobs", "accepted: without stream"),
    (completion(include_stop_str_in_output=1), 400, "include_stop_str_in_output", "True or False"),
    (completion(suffix="end"), 400, "suffix", "not supported"),
    (completion(temprature=1), 400, "temprature", "did you mean temperature?"),
    (completion(**{"x" * 9999: 1}), 400, "x" * 64, "unknown field"),
    (completion(priority=101), 400, "priority", "accepted: an integer from -100 to 100"),
    (completion(priority="high"), 400, "priority", "lower goes first"),
    (completion(timeout_s=0), 400, "timeout_s", "a number of seconds above 0"),
    (completion(timeout_s=10**400), 400, "timeout_s", "a number of seconds above 0"),
    (completion(timeout_s="1"), 400, "timeout_s", "a number of seconds above 0"),
    (completion(ignore_eos="no"), 400, "ignore_eos", "accepted: True or False"),
]
