"""`trtc serve` with the official client. Oracle: `LLM.generate` on the same engine, unless a test says otherwise."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from trtc.cli.main import main
from trtc.runtime.llm import LLM
from trtc.runtime.sampling_params import SamplingParams
from trtc.runtime.server import serve
from trtc.runtime.server.chat_template import ChatTemplate
from trtc.runtime.server.config import ServerConfig

from .running import LIMIT_S, RunningServer, wait_until

PROMPTS = ["The city council of Norwick", "A storm", "Holt Motors said on Monday that it"]
MODEL = "tiny-opt"
MESSAGES: list[Any] = [
    {"role": "system", "content": "You write news."},
    {
        "role": "user",
        "content": [{"type": "text", "text": " The city "}, {"type": "text", "text": "council"}],
    },
]


@pytest.fixture(scope="module")
def llm(engine: Path) -> Iterator[LLM]:
    with LLM(engine) as llm:
        yield llm


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=LIMIT_S) as client:
        yield client


@pytest.fixture(scope="module")
def strict_client(strict_server: RunningServer) -> Iterator[openai.OpenAI]:
    url = f"{strict_server.url}/v1"
    with openai.OpenAI(base_url=url, api_key="secret", max_retries=0, timeout=LIMIT_S) as client:
        yield client


def greedy(max_tokens: int, **others: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, **others)


def test_completions_are_those_of_the_library(client: openai.OpenAI, llm: LLM) -> None:
    expected = llm.generate(PROMPTS, greedy(24))
    answer = client.completions.create(
        model=MODEL, prompt=PROMPTS, max_tokens=24, temperature=0, extra_body={"return_token_ids": True}
    )
    for index, (choice, output) in enumerate(zip(answer.choices, expected, strict=True)):
        (completion,) = output.outputs
        assert (choice.index, choice.text, choice.finish_reason) == (
            index,
            completion.text,
            completion.finish_reason,
        )
        assert choice.model_extra == {"token_ids": completion.token_ids}
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(len(output.prompt_token_ids) for output in expected)
    assert answer.usage.completion_tokens == sum(len(output.outputs[0].token_ids) for output in expected)
    ids = [output.prompt_token_ids for output in expected]
    for prompt, count in ((ids, 3), (ids[0], 1), (PROMPTS[0], 1)):
        again = client.completions.create(model=MODEL, prompt=prompt, max_tokens=24, temperature=0)
        assert [choice.text for choice in again.choices] == [o.outputs[0].text for o in expected[:count]]


def test_sampling_fields_mean_what_they_mean_in_the_library(client: openai.OpenAI, llm: LLM) -> None:
    params = SamplingParams(n=3, max_tokens=20, temperature=1.3, top_p=0.9, top_k=40, min_p=0.01, seed=7,
                            frequency_penalty=0.5, presence_penalty=0.25, stop=[" the"], min_tokens=4)  # fmt: skip
    (expected,) = llm.generate(PROMPTS[0], params)
    answer = client.completions.create(
        model=MODEL, prompt=PROMPTS[0], n=3, max_tokens=20, temperature=1.3, top_p=0.9, seed=7,
        frequency_penalty=0.5, presence_penalty=0.25, stop=[" the"], best_of=3, user="someone",
        extra_body={"top_k": 40, "min_p": 0.01, "min_tokens": 4},
    )  # fmt: skip
    assert [(c.text, c.finish_reason) for c in answer.choices] == [
        (c.text, c.finish_reason) for c in expected.outputs
    ]
    assert len({choice.text for choice in answer.choices}) == 3


def test_what_shall_and_shall_not_come(client: openai.OpenAI, llm: LLM) -> None:
    """The fields that steer single tokens; the library's own tests say what each of them means."""
    (plain,) = llm.generate(PROMPTS[0], greedy(12))
    first, second = plain.outputs[0].token_ids[:2]
    values: dict[str, Any] = {"bad_words": [" Monday"], "bad_words_ids": [[first, second]], "min_tokens": 5,
                              "stop_token_ids": [7], "include_stop_str_in_output": True,
                              "stop": ["."]}  # fmt: skip
    bias = {first: 50.0, 1000: -100.0}
    (expected,) = llm.generate(PROMPTS[0], greedy(12, logit_bias=bias, **values))
    stop = values.pop("stop")
    answer = client.completions.create(
        model=MODEL, prompt=PROMPTS[0], max_tokens=12, temperature=0, stop=stop,
        logit_bias={str(token): value for token, value in bias.items()},  # type: ignore[misc]
        extra_body={**values, "return_token_ids": True},
    )  # fmt: skip
    assert (answer.choices[0].model_extra or {})["token_ids"] == expected.outputs[0].token_ids
    assert answer.choices[0].text == expected.outputs[0].text
    assert expected.outputs[0].token_ids[:2] not in ([first, second], plain.outputs[0].token_ids[:2])


def test_the_best_of_several(client: openai.OpenAI, llm: LLM) -> None:
    (expected,) = llm.generate(PROMPTS[0], SamplingParams(n=2, best_of=6, seed=3, max_tokens=12))
    answer = client.completions.create(model=MODEL, prompt=PROMPTS[0], n=2, best_of=6, seed=3, max_tokens=12)
    assert [choice.text for choice in answer.choices] == [c.text for c in expected.outputs]
    assert [choice.logprobs for choice in answer.choices] == [None, None]


def test_beam_search(client: openai.OpenAI, llm: LLM) -> None:
    """Oracle: the library's, which is that of transformers (test_beam_search.py)."""
    beams = {"beam_width": 4, "length_penalty": 0.5, "early_stopping": True}
    (expected,) = llm.generate(PROMPTS[0], SamplingParams(n=2, max_tokens=8, temperature=0, **beams))
    answer = client.completions.create(
        model=MODEL, prompt=PROMPTS[0], n=2, max_tokens=8, temperature=0, extra_body=beams
    )
    assert [choice.text for choice in answer.choices] == [output.text for output in expected.outputs]
    alone = client.completions.create(model=MODEL, prompt=PROMPTS[0], max_tokens=8, temperature=0)
    assert answer.choices[0].text != alone.choices[0].text, "the search changes nothing here"


@pytest.mark.parametrize("tokens", [0, 3])
def test_prompt_logprobs_in_a_field_of_their_own(client: openai.OpenAI, llm: LLM, tokens: int) -> None:
    """Beside an echo with fewer of them, and without any token of output."""
    (expected,) = llm.generate(PROMPTS[2], greedy(tokens or 1, logprobs=1, prompt_logprobs=3))
    answer = client.completions.create(
        model=MODEL, prompt=PROMPTS[2], max_tokens=tokens, temperature=0, logprobs=1, echo=True,
        extra_body={"prompt_logprobs": 3},
    )  # fmt: skip
    (choice,) = answer.choices
    assert choice.text == PROMPTS[2] + (expected.outputs[0].text if tokens else "")
    assert answer.usage is not None and answer.usage.completion_tokens == tokens
    first, *found = (choice.model_extra or {})["prompt_logprobs"]
    assert first is None and expected.prompt_logprobs is not None
    for entry, wanted in zip(found, expected.prompt_logprobs[1:], strict=True):
        assert wanted is not None and entry.keys() == {str(token) for token in wanted}
        for token, value in wanted.items():
            assert entry[str(token)]["logprob"] == pytest.approx(value.logprob, abs=1e-4)
            assert (entry[str(token)]["rank"], entry[str(token)]["decoded_token"]) == (
                value.rank,
                value.decoded_token,
            )
    echoed = choice.logprobs
    assert echoed is not None and echoed.top_logprobs is not None and echoed.token_logprobs is not None
    assert len(echoed.token_logprobs) == len(expected.prompt_token_ids) + tokens
    for top, entry in zip(echoed.top_logprobs[1:], found, strict=False):
        likely = [each for each in entry.values() if each["rank"] == 1]
        assert likely[0]["decoded_token"] in top and len(top) <= 2


def test_a_stream_adds_up_to_the_whole_answer(client: openai.OpenAI, llm: LLM) -> None:
    params = SamplingParams(n=2, max_tokens=24, seed=3, logprobs=2, stop=[" said"])
    expected = llm.generate(PROMPTS, params)
    chunks = client.completions.create(
        model=MODEL, prompt=PROMPTS, n=2, max_tokens=24, seed=3, logprobs=2, stop=[" said"], stream=True,
        stream_options={"include_usage": True}, extra_body={"return_token_ids": True},
    )  # fmt: skip
    texts, reasons = [""] * 6, [None] * 6
    ids: list[list[int]] = [[] for _ in range(6)]
    logprobs: list[list[float]] = [[] for _ in range(6)]
    usage = None
    for chunk in chunks:
        usage = chunk.usage
        for choice in chunk.choices:
            assert reasons[choice.index] is None, "a chunk after the last one"
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason
            ids[choice.index] += (choice.model_extra or {})["token_ids"]
            logprobs[choice.index] += choice.logprobs.token_logprobs
    completions = [completion for output in expected for completion in output.outputs]
    assert texts == [completion.text for completion in completions]
    assert reasons == [completion.finish_reason for completion in completions]
    assert ids == [completion.token_ids for completion in completions]
    for found, completion in zip(logprobs, completions, strict=True):
        chosen = zip(completion.token_ids, completion.logprobs or (), strict=True)
        # other batches, other order of sums
        assert found == pytest.approx([entry[token].logprob for token, entry in chosen], abs=1e-4)
    assert usage is not None
    assert usage.completion_tokens == sum(len(completion.token_ids) for completion in completions)


def test_async_client(server: RunningServer, llm: LLM) -> None:
    async def main() -> list[str]:
        url = f"{server.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", timeout=LIMIT_S) as client:

            async def one(prompt: str) -> str:
                stream = await client.completions.create(
                    model=MODEL, prompt=prompt, max_tokens=16, temperature=0, stream=True
                )
                return "".join([chunk.choices[0].text async for chunk in stream])

            return list(await asyncio.gather(*map(one, PROMPTS)))

    assert asyncio.run(main()) == [output.outputs[0].text for output in llm.generate(PROMPTS, greedy(16))]


@pytest.mark.parametrize("stream", [False, True])
def test_echo_and_logprobs(client: openai.OpenAI, llm: LLM, stream: bool) -> None:
    """Oracle for the offsets: where the token's text stands in the answer's text."""
    prompt = PROMPTS[2]
    (expected,) = llm.generate(prompt, greedy(8, logprobs=3, prompt_logprobs=3))
    options: dict[str, Any] = {
        "prompt": prompt,
        "max_tokens": 8,
        "temperature": 0,
        "logprobs": 3,
        "echo": True,
    }
    if stream:
        choices = [c.choices[0] for c in client.completions.create(model=MODEL, stream=True, **options)]
    else:
        choices = client.completions.create(model=MODEL, **options).choices
    text = "".join(choice.text for choice in choices)
    assert text == prompt + expected.outputs[0].text
    parts = [choice.logprobs for choice in choices]
    tokens = [token for part in parts for token in part.tokens]
    offsets = [offset for part in parts for offset in part.text_offset]
    values = [value for part in parts for value in part.token_logprobs]
    tops = [top for part in parts for top in part.top_logprobs]
    assert tokens[0] == "</s>" and values[0] is None and tops[0] is None and offsets[0] == 0
    for token, offset in zip(tokens[1:], offsets[1:], strict=True):
        assert text[offset : offset + len(token)] == token
    assert "".join(tokens[1:]) == text
    entries = [*(expected.prompt_logprobs or ())[1:], *(expected.outputs[0].logprobs or ())]
    ids = [*expected.prompt_token_ids[1:], *expected.outputs[0].token_ids]
    assert values[1:] == pytest.approx(
        [entry[token].logprob for entry, token in zip(entries, ids, strict=True)], abs=1e-4
    )
    assert [len(top) for top in tops[1:]] == [len(entry) for entry in entries]


def test_chat_template_is_rendered_as_transformers_renders_it(chat_model: Path) -> None:
    """Oracle: transformers' apply_chat_template."""
    from transformers import AutoTokenizer

    template = ChatTemplate.from_dir(chat_model)
    assert template is not None
    reference = AutoTokenizer.from_pretrained(chat_model)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " what  is new? "}]
    text = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert template.render(messages) == text
    assert template.token_ids(messages) == reference(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("stream", [False, True])
def test_chat(strict_client: openai.OpenAI, chat_engine: Path, llm: LLM, stream: bool) -> None:
    template = ChatTemplate.from_dir(chat_engine)
    assert template is not None
    ids = template.token_ids([MESSAGES[0], {"role": "user", "content": " The city council"}])
    (expected,) = llm.generate([ids], greedy(12, logprobs=2))
    (completion,) = expected.outputs
    options: dict[str, Any] = {"messages": MESSAGES, "max_completion_tokens": 12, "temperature": 0,
                               "logprobs": True, "top_logprobs": 2}  # fmt: skip
    if stream:
        chunks = list(strict_client.chat.completions.create(model="chatty", stream=True, **options))
        assert chunks[0].choices[0].delta.role == "assistant"
        assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:])
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        reason = chunks[-1].choices[0].finish_reason
        parts = [chunk.choices[0].logprobs for chunk in chunks]
        content = [entry for part in parts if part is not None for entry in part.content or ()]
    else:
        answer = strict_client.chat.completions.create(model="chatty", **options)
        text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
        content = answer.choices[0].logprobs.content
        assert answer.usage is not None and answer.usage.prompt_tokens == len(ids)
    assert (text, reason) == (completion.text, completion.finish_reason)
    assert [entry.token for entry in content] == [
        entry[token].decoded_token
        for token, entry in zip(completion.token_ids, completion.logprobs or (), strict=True)
    ]
    assert all(
        len(entry.top_logprobs) == 2 and entry.bytes == list(entry.token.encode()) for entry in content
    )


def test_models_health_and_tokenize(client: openai.OpenAI, server: RunningServer, llm: LLM) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).model_extra == {"max_model_len": 1024}
    for path in ("/health", "/ready"):
        assert server.request("GET", path).json() == {"status": "ok"}
    tokens = server.request("POST", "/tokenize", json={"prompt": PROMPTS[0]}).json()
    assert llm.tokenizer is not None
    ids = llm.tokenizer.encode(PROMPTS[0])
    assert tokens == {"tokens": ids, "count": len(ids), "max_model_len": 1024}


def test_request_ids_are_in_answer_and_log(client: openai.OpenAI, server: RunningServer) -> None:
    answer = client.completions.create(
        model=MODEL, prompt=[5, 6, 7], max_tokens=4, extra_headers={"x-request-id": "my-request.1"}
    )
    assert answer._request_id == "my-request.1"
    entry = server.wait_for_log("request", request_id="my-request.1")
    assert (entry["status"], entry["path"], entry["id"]) == (200, "/v1/completions", answer.id)
    assert (entry["prompt_tokens"], entry["completion_tokens"]) == (3, 4)
    answer_to_other = server.request("GET", "/v1/models", headers={"x-request-id": "no good {}"})
    other = answer_to_other.headers["x-request-id"]
    assert other != "no good {}" and server.wait_for_log("request", request_id=other)


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
    (completion(n=0), 400, "n", "n is 0; accepted: an integer of at least 1"),
    (completion(n=17), 400, "n", "accepted: an integer from 1 to 16"),
    (completion(n=2.0), 400, "n", "n is 2.0"),
    (completion(n=True), 400, "n", "n is True"),
    (completion(prompt=["x"] * 20, n=16), 400, "n", "asks for 320 completions; accepted: at most 264"),
    (completion(max_tokens=0, echo=True), 200, None, ""),
    (completion(max_tokens=0), 400, "max_tokens", "accepted: an integer of at least 1"),
    (completion(max_tokens="16"), 400, "max_tokens", "max_tokens is '16'"),
    (completion(min_tokens=17), 400, "min_tokens", "at most max_tokens (16)"),
    (completion(temperature=-0.1), 400, "temperature", "accepted: a finite number of at least 0"),
    (completion(temperature="hot"), 400, "temperature", "temperature is 'hot'"),
    (completion(temperature=[[["hot"] * 9999]]), 400, "temperature", "accepted: a finite number"),
    (completion(top_p=0), 400, "top_p", "accepted: a number above 0 and at most 1"),
    (completion(top_k=-2), 400, "top_k", "top_k is -2"),
    (completion(min_p=2), 400, "min_p", "accepted: a number from 0 to 1"),
    (completion(presence_penalty=3), 400, "presence_penalty", "accepted: a number from -2 to 2"),
    (completion(frequency_penalty=-3), 400, "frequency_penalty", "accepted: a number from -2 to 2"),
    (completion(repetition_penalty=0), 400, "repetition_penalty", "above 0"),
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
    (completion(beam_width=2, length_penalty="x"), 400, "length_penalty", "accepted: a finite number"),
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
    (completion(timeout_s="1"), 400, "timeout_s", "a number of seconds above 0"),
    (completion(ignore_eos="no"), 400, "ignore_eos", "accepted: True or False"),
]


@pytest.mark.parametrize(("body", "status", "param", "message"), MALFORMED)
def test_a_malformed_request_is_told_what_is_wrong(
    server: RunningServer, body: Any, status: int, param: str | None, message: str
) -> None:
    """Oracle: by hand, from docs/server.md."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = server.request("POST", "/v1/completions", content=content)
    assert answer.status_code == status, answer.text
    if status == 200:
        return
    error = answer.json()["error"]
    assert error["param"] == param and message in error["message"]
    assert error["type"] == "invalid_request_error" and len(answer.content) < 2000


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "chatty", "messages": MESSAGES, "max_tokens": 2, **fields}


MALFORMED_CHATS: list[tuple[dict[str, Any], str, str]] = [
    ({"model": "chatty"}, "messages", "messages is missing"),
    (chat(messages=[]), "messages", "accepted: a non-empty list"),
    (chat(messages="hello"), "messages", "accepted: a non-empty list"),
    (chat(messages=["hello"]), "messages[0]", "accepted: an object"),
    (chat(messages=[{"role": "king", "content": "x"}]), "messages[0].role", "accepted: system, developer"),
    (chat(messages=[{"role": [], "content": "x"}]), "messages[0].role", "accepted: system, developer"),
    (chat(messages=[MESSAGES[0], {"role": "user"}]), "messages[1].content", "accepted: a string"),
    (chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), "messages[0].content[0]", "text"),
    (chat(messages=[{"role": "user", "content": "x", "tool_calls": [1]}]), "messages[0].tool_calls", "accepted"),
    (chat(messages=[{"role": "user", "content": "x", "name": 1}]), "messages[0].name", "a string"),
    (chat(messages=[{"role": "tool", "content": "x"}]), "messages", "refuses the messages: no role tool"),
    (chat(messages=[{"role": "user", "content": "word " * 2000}]), "messages", "takes max_input_len = 1023"),
    (chat(max_completion_tokens=3), "max_tokens", "give one"),
    ({"model": "chatty", "messages": MESSAGES, "max_completion_tokens": 0}, "max_completion_tokens",
     "max_completion_tokens is 0"),
    (chat(top_logprobs=2), "top_logprobs", "with logprobs true"),
    (chat(logprobs=2), "logprobs", "accepted: true or false"),
    (chat(tools=[{"type": "function"}]), "tools", "accepted: null or []"),
    (chat(response_format={"type": "json_object"}), "response_format", '{"type": "text"}'),
    (chat(prompt="x"), "prompt", "accepted: "),
]  # fmt: skip


@pytest.mark.parametrize(("body", "param", "message"), MALFORMED_CHATS)
def test_a_malformed_chat_is_told_what_is_wrong(
    strict_server: RunningServer, body: dict[str, Any], param: str, message: str
) -> None:
    """Oracle: by hand, from docs/server.md."""
    headers = {"Authorization": "Bearer secret"}
    answer = strict_server.request("POST", "/v1/chat/completions", json=body, headers=headers)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param and message in error["message"]


def test_no_chat_without_a_template(client: openai.OpenAI) -> None:
    with pytest.raises(
        openai.BadRequestError, match="has no chat template; accepted: /v1/completions"
    ) as error:
        client.chat.completions.create(model=MODEL, messages=MESSAGES)
    assert (error.value.param, error.value.code) == ("messages", "no_chat_template")


def test_routes_that_are_not_there(server: RunningServer) -> None:
    for method, path, status in (
        ("GET", "/v2", 404),
        ("GET", "/v1/completions", 405),
        ("POST", "/health", 405),
    ):
        answer = server.request(method, path)
        assert answer.status_code == status
        assert f"{method} {path}" in answer.json()["error"]["message"]
    assert server.request("GET", "/v1/models/other").json()["error"]["code"] == "model_not_found"


def test_a_key_is_asked_for(strict_server: RunningServer) -> None:
    for header in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Basic secret"},
        {"Authorization": "é".encode()},
    ):
        for path in ("/v1/models", "/metrics", "/nowhere"):
            answer = strict_server.request("GET", path, headers=header)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    right = {"Authorization": "Bearer secret"}
    assert strict_server.request("GET", "/v1/models", headers=right).status_code == 200
    for path in ("/health", "/ready"):
        assert strict_server.request("GET", path).status_code == 200


def test_a_long_body_is_refused(strict_server: RunningServer) -> None:
    headers = {"Authorization": "Bearer secret"}
    for content in (b"x" * 20_001, iter([b"x" * 10_000] * 3)):  # the second one without a content-length
        answer = strict_server.request("POST", "/v1/completions", content=content, headers=headers)
        assert answer.status_code == 413 and "at most 20000 bytes" in answer.json()["error"]["message"]


def test_a_full_queue_says_so_and_recovers(
    strict_server: RunningServer, strict_client: openai.OpenAI
) -> None:
    """Nine places: eight run, one waits. It is tried until a refusal comes before the places are free again."""
    long: dict[str, Any] = {"model": "chatty", "prompt": "The", "max_tokens": 1000, "stream": True,
                            "extra_body": {"ignore_eos": True}}  # fmt: skip

    def refusal() -> openai.RateLimitError | None:
        streams = [strict_client.completions.create(n=3, **long) for _ in range(3)]
        try:
            strict_client.completions.create(model="chatty", prompt="The", max_tokens=1)
        except openai.RateLimitError as error:
            return error
        finally:
            for stream in streams:
                stream.close()
            wait_until(lambda: strict_server.held(Authorization="Bearer secret") == 0)
        return None

    refused = wait_until(refusal)
    assert refused.response.headers["retry-after"] == "1"
    assert "9 of 9 places are taken" in str(refused)
    again = wait_until(lambda: _try(strict_client))
    assert again.usage.completion_tokens == 1


def _try(client: openai.OpenAI) -> Any:
    try:
        return client.completions.create(model="chatty", prompt="The", max_tokens=1)
    except openai.RateLimitError:
        return None


LONG_PROMPTS = ["x"] * 16
"""With n = 8 and 1000 tokens: sixteen full batches, a minute in which a test can do what it likes."""


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_pages(server: RunningServer, stream: bool) -> None:
    """Oracle: the server's page count and log."""
    name = f"gone-{stream}"
    body = completion(prompt=LONG_PROMPTS, max_tokens=1000, n=8, ignore_eos=True, stream=stream)
    aborted = 'trtc_requests_total{outcome="abort"}'
    before = server.metrics().get(aborted, 0)

    async def ask() -> None:
        url, headers = f"{server.url}/v1/completions", {"x-request-id": name}
        async with (
            httpx.AsyncClient(timeout=LIMIT_S) as http,
            http.stream("POST", url, json=body, headers=headers) as answer,
        ):
            async for _ in answer.aiter_lines():
                pass

    async def go_away() -> None:
        task = asyncio.create_task(ask())
        await asyncio.to_thread(wait_until, lambda: server.held() == 8 * len(LONG_PROMPTS))
        assert server.metrics()["trtc_kv_cache_pages_used"] >= 8
        task.cancel()
        await asyncio.wait([task])

    asyncio.run(go_away())
    server.wait_until_idle()
    assert server.metrics()[aborted] == before + len(LONG_PROMPTS)
    entry = server.wait_for_log("request", request_id=name)
    assert entry.get("client_gone") if stream else entry["status"] == 499


def test_a_request_ends_in_its_time_with_what_it_has(server: RunningServer) -> None:
    """A time in which no engine chooses so many tokens."""
    body = completion(prompt=LONG_PROMPTS, n=8, max_tokens=1000, ignore_eos=True, timeout_s=0.5)
    answer = server.request("POST", "/v1/completions", json=body).raise_for_status().json()
    reasons = [choice["finish_reason"] for choice in answer["choices"]]
    assert len(reasons) == 8 * len(LONG_PROMPTS) and "timeout" in reasons
    assert answer["usage"]["completion_tokens"] < 1000 * len(reasons)
    server.wait_until_idle()


def test_a_better_priority_overtakes(server: RunningServer) -> None:
    """Among those that wait: 128 sequences of which eight run at once."""
    url = f"{server.url}/v1/completions"
    slow = completion(prompt=LONG_PROMPTS, n=8, max_tokens=200, ignore_eos=True, stream=True, priority=5)
    with httpx.stream("POST", url, json=slow, timeout=LIMIT_S):
        wait_until(lambda: server.held() == 8 * len(LONG_PROMPTS))
        server.request(
            "POST", "/v1/completions", json=completion(max_tokens=1, priority=-5)
        ).raise_for_status()
        assert server.held() > 64, "the others had their turn first"
    server.wait_until_idle()


def test_half_a_request(server: RunningServer) -> None:
    """Oracle: the server's log, which would have an error otherwise."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-Request-Id: half\r\nContent-Length: 99\r\n\r\n{"
        )
    assert server.wait_for_log("request", request_id="half")["status"] == 499


def test_load(server: RunningServer, llm: LLM) -> None:
    """200 requests on 16 connections, 20% of them cancelled midway, 5% malformed: nobody is stuck, no page is lost."""
    chance = random.Random(0)
    expected = {
        output.prompt: output.outputs[0] for output in llm.generate(PROMPTS, greedy(24, ignore_eos=True))
    }
    malformed = [(body, param) for body, status, param, _ in MALFORMED if status == 400 and param]
    kinds = chance.sample(["cancelled"] * 40 + ["malformed"] * 10 + ["whole"] * 75 + ["stream"] * 75, 200)
    before = server.metrics()

    async def one(http: httpx.AsyncClient, kind: str) -> str:
        url = f"{server.url}/v1/completions"
        prompt = chance.choice(PROMPTS)
        body = completion(prompt=prompt, max_tokens=24, temperature=0, ignore_eos=True)
        if kind == "malformed":
            bad, param = chance.choice(malformed)
            answer = await http.post(url, json=bad)
            assert answer.status_code == 400 and answer.json()["error"]["param"] == param
        elif kind == "whole":
            choice = (await http.post(url, json=body)).raise_for_status().json()["choices"][0]
            assert choice["text"] == expected[prompt].text
        else:
            body |= {"stream": True, "max_tokens": 1000 if kind == "cancelled" else 24}
            text = ""
            async with http.stream("POST", url, json=body) as answer:
                async for line in answer.aiter_lines():
                    if kind == "cancelled":
                        return kind
                    if line and line != "data: [DONE]":
                        text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
            assert text == expected[prompt].text
        return kind

    async def main() -> list[str]:
        free = asyncio.Semaphore(16)
        limits = httpx.Limits(max_connections=16)
        async with httpx.AsyncClient(limits=limits, timeout=LIMIT_S) as http:

            async def bounded(kind: str) -> str:
                async with free:
                    return await one(http, kind)

            return list(await asyncio.gather(*map(bounded, kinds)))

    assert asyncio.run(main()) == kinds
    server.wait_until_idle()
    after = server.metrics()
    changes = {name: after[name] - before.get(name, 0) for name in after if "_total{" in name}
    assert changes['trtc_requests_total{outcome="length"}'] == 150
    assert changes['trtc_requests_total{outcome="abort"}'] == 40
    assert changes['trtc_http_responses_total{path="/v1/completions",status="400"}'] == 10
    assert changes['trtc_http_responses_total{path="/v1/completions",status="200"}'] == 190
    assert after["trtc_generation_tokens_total"] - before["trtc_generation_tokens_total"] >= 150 * 24
    assert (
        after["trtc_time_to_first_token_seconds_count"] - before["trtc_time_to_first_token_seconds_count"]
        >= 150
    )


def test_metrics_count_what_the_prefix_cache_had(server: RunningServer) -> None:
    before = server.metrics()
    for _ in range(2):
        body = completion(prompt=[7, 8, 9] * 25, max_tokens=1)
        httpx.post(f"{server.url}/v1/completions", json=body).raise_for_status()
    after = server.metrics()
    looked_up, found = (
        after[name] - before[name]
        for name in ("trtc_prefix_cache_queries_total", "trtc_prefix_cache_hits_total")
    )
    assert found >= 1 and looked_up == 2 * found, "all full pages of the second prompt, none of the first"
    assert after["trtc_kv_cache_pages_cached"] >= found


def test_sigterm_finishes_what_runs(engine: Path) -> None:
    server = RunningServer(engine)
    counts = []

    async def one(http: httpx.AsyncClient) -> None:
        body = completion(max_tokens=200, ignore_eos=True, stream=True, return_token_ids=True)
        count = 0
        async with http.stream("POST", f"{server.url}/v1/completions", json=body) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    count += len(json.loads(line.removeprefix("data: "))["choices"][0]["token_ids"])
        counts.append(count)

    async def main() -> None:
        async with httpx.AsyncClient(timeout=LIMIT_S) as http:
            tasks = [asyncio.create_task(one(http)) for _ in range(10)]  # eight run, two wait
            await asyncio.to_thread(wait_until, lambda: server.held() == 10)
            server.process.send_signal(signal.SIGTERM)
            await asyncio.to_thread(server.wait_for_log, "draining")
            await asyncio.to_thread(wait_until, lambda: not _reachable(server))
            await asyncio.gather(*tasks)

    try:
        asyncio.run(main())
    finally:
        code = server.wait()
    assert (code, counts) == (0, [200] * 10)
    events = [entry["event"] for entry in server.log if entry.get("path") != "/ready"]
    assert "request" in events[events.index("draining") :], "all had ended before the signal could matter"
    assert events[-1] == "stopped"


def _reachable(server: RunningServer) -> bool:
    """Whether anybody listens. While it drains, it says so."""
    try:
        assert server.request("GET", "/ready").status_code == 503
    except httpx.TransportError:
        return False
    return True


def test_what_does_not_finish_in_time_is_told(engine: Path) -> None:
    """Thirty-two sequences of 1000 tokens, eight at a time, take longer than a second."""
    server = RunningServer(engine, "--drain-timeout-s", "1")
    url, body = f"{server.url}/v1/completions", completion(max_tokens=1000, n=16, ignore_eos=True)
    streamed = httpx.stream("POST", url, json=body | {"stream": True}, timeout=LIMIT_S)
    with ThreadPoolExecutor() as pool, streamed as answer:
        whole = pool.submit(httpx.post, url, json=body, timeout=LIMIT_S)
        lines = answer.iter_lines()
        next(lines)
        wait_until(lambda: server.held() == 32)
        server.process.send_signal(signal.SIGTERM)
        events = [json.loads(line.removeprefix("data: ")) for line in lines if line]
    assert server.wait() == 0
    for error in (events[-1]["error"], whole.result().json()["error"]):
        assert (error["message"], error["code"]) == ("the engine was shut down", "engine_failed")
    assert whole.result().status_code == 503


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--host 0.0.0.0", "give --api-key"),
        ("--host example.com", "give --api-key"),
        ("--port 99999", "--port is 99999"),
        ("--port {port}", "--port {port}: cannot listen there"),
        ("--max-n 0", "--max-n is 0; accepted: an integer of at least 1"),
        ("--max-queue -1", "--max-queue is -1"),
        ("--api-key=", "--api-key is empty"),
        ("--port 0", "engine.json"),
    ],
)
def test_a_server_that_cannot_start_says_why(
    server: RunningServer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: str,
    message: str,
) -> None:
    """In this process, whose logging stays as it is."""
    monkeypatch.setattr(serve, "set_up", lambda: None)
    monkeypatch.delenv("TRTC_API_KEY", raising=False)
    port = server.url.rpartition(":")[2]
    assert main(["serve", "--engine-dir", str(tmp_path), *options.format(port=port).split()]) == 1
    errors = capsys.readouterr().err
    assert message.format(port=port) in errors and errors.count("\n") == 1


def test_the_key_of_the_environment_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: by hand. The server itself is not started."""
    given: list[ServerConfig] = []
    monkeypatch.setattr(serve, "serve", lambda engine_dir, config, **options: given.append(config))
    monkeypatch.setenv("TRTC_API_KEY", "secret")
    assert main(["serve", "--engine-dir", str(tmp_path / "engine"), "--host", "0.0.0.0"]) == 0
    (config,) = given
    assert (config.api_key, config.host, config.model_name) == ("secret", "0.0.0.0", "engine")
    assert "secret" not in repr(config)
