"""Requests that the server refuses, and what it says. Oracle: by hand, from docs/server.md."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from .requests import MALFORMED, MESSAGES, MODEL
from .running import RunningServer, wait_until


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
