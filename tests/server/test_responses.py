"""Answers of which no engine at hand gives an example. Oracle: by hand, from OpenAI's API reference."""

from __future__ import annotations

import json
import math

from trtc.runtime.outputs import CompletionOutput, Logprob, RequestOutput
from trtc.runtime.server.errors import ApiError
from trtc.runtime.server.responses import ChatFormat, CompletionFormat, Sent

IMPOSSIBLE = {7: Logprob(-0.5, 1, "a"), 8: Logprob(-math.inf, 2, "b"), 9: Logprob(-math.inf, 3, "a")}


def output(completion: CompletionOutput) -> RequestOutput:
    return RequestOutput("x", None, [1], None, [completion], completion.finished)


def completion(text: str, ids: list[int], finished: bool = False, logprobs: bool = False) -> CompletionOutput:
    entries = [IMPOSSIBLE] * len(ids) if logprobs else None
    return CompletionOutput(0, text, ids, None, entries, "length" if finished else None, None)


def test_impossible_tokens_can_be_sent_as_json() -> None:
    done = completion("a", [7], finished=True, logprobs=True)
    form = CompletionFormat(None, [""], 1, echo=False, return_token_ids=False)
    logprobs = form.choice(0, output(done), done)["logprobs"]
    assert logprobs["top_logprobs"] == [{"a": -0.5, "b": -9999.0}], "two tokens of one text: the likelier one"
    top = ChatFormat(None, 2, False).choice(0, output(done), done)["logprobs"]["content"][0]["top_logprobs"]
    assert [(entry["token"], entry["logprob"]) for entry in top] == [("a", -0.5), ("b", -9999.0)]
    json.dumps([logprobs, top], allow_nan=False)


def test_tokens_without_text_are_held_back_unless_they_are_asked_for() -> None:
    """Half a character, or what may become a stop string."""
    held = completion("", [7])
    assert (
        CompletionFormat(None, [""], 1, False, return_token_ids=False).delta(0, output(held), held, Sent())
        is None
    )
    with_ids = CompletionFormat(None, [""], 1, False, return_token_ids=True)
    sent = Sent()
    assert with_ids.delta(0, output(held), held, sent) == {
        "index": 0, "text": "", "logprobs": None, "finish_reason": None, "token_ids": [7],
    }  # fmt: skip
    done = completion("é", [7, 8], finished=True)
    assert with_ids.delta(0, output(done), done, sent) == {
        "index": 0, "text": "é", "logprobs": None, "finish_reason": "length", "token_ids": [8],
    }  # fmt: skip


def test_a_long_message_keeps_its_ends() -> None:
    body = ApiError(400, f"stop is {'x' * 100_000}; accepted: strings").body()
    message = body["error"]["message"]
    assert message.startswith("stop is xxx") and message.endswith("xx; accepted: strings")
    assert len(message) < 700
