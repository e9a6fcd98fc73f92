"""What the fields of a request do, with the official client. Oracle: `LLM.generate` on the same engine, unless a test says
otherwise."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import openai
import pytest
from trtc.runtime.llm import LLM
from trtc.runtime.sampling_params import SamplingParams
from trtc.runtime.server.chat_template import ChatTemplate

from .requests import MESSAGES, MODEL, PROMPTS, greedy
from .running import LIMIT_S, RunningServer


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
