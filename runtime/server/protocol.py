"""Request bodies: JSON -> what the engine is asked for. Every refusal names the field and what is accepted."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from ...core.errors import RequestError
from ..request import check_line
from ..sampling_params import SamplingParams
from .config import ServerConfig
from .errors import ApiError, bad_field, not_accepted

Json = Mapping[str, Any]

_MAX_ITEMS = {"stop": 16, "stop_token_ids": 64, "bad_words": 1024, "bad_words_ids": 1024, "logit_bias": 1024}
"""Stop strings are compared with every token, the others looked up or tokenized."""

_SAMPLING_FIELDS = (
    "n",
    "best_of",
    "max_tokens",
    "temperature",
    "top_p",
    "presence_penalty",
    "frequency_penalty",
    "stop",
    "seed",
    "logit_bias",
    # beyond OpenAI's
    "min_tokens",
    "top_k",
    "min_p",
    "repetition_penalty",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "skip_special_tokens",
    "bad_words",
    "bad_words_ids",
    "prompt_logprobs",
    "beam_width",
    "length_penalty",
    "early_stopping",
)
_OF_BEAMS = ("length_penalty", "early_stopping")
"""Fields that mean something together with `beam_width` only."""
_COMMON_FIELDS = (
    "model",
    "stream",
    "stream_options",
    "return_token_ids",
    "priority",
    "timeout_s",
    *_SAMPLING_FIELDS,
)
_COMPLETION_FIELDS = (*_COMMON_FIELDS, "prompt", "echo", "logprobs")
_CHAT_FIELDS = (*_COMMON_FIELDS, "messages", "max_completion_tokens", "logprobs", "top_logprobs")

_IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
"""OpenAI's fields that ask for nothing about the text."""

_COMPLETION_NEUTRAL: Mapping[str, tuple[Any, ...]] = {"suffix": ("",)}
_CHAT_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
}
"""OpenAI's fields this server does not have, with the values that ask for nothing, besides null."""

_MAX_PRIORITY = 100
_ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Line:
    """A request's place in line: lower priorities go first; after `timeout_s` it ends with what it has."""

    priority: int = 0
    timeout_s: float | None = None


@dataclass(frozen=True)
class GenerationRequest:
    """What one request asks for.

    prompts: texts or token ids; for a chat, the ids that its template gives
    echo:    the prompt stands before the completion, with its logprobs if these are asked for
    prompt_logprobs: candidates per prompt token, in a field of their own; None: no such field
    prompt_only:     `max_tokens` is 0: the one token that the engine makes is not shown
    """

    prompts: tuple[str | list[int], ...]
    params: SamplingParams
    stream: bool
    include_usage: bool
    return_token_ids: bool
    line: Line
    echo: bool = False
    prompt_logprobs: int | None = None
    prompt_only: bool = False

    @property
    def num_sequences(self) -> int:
        return len(self.prompts) * self.params.num_sequences


@dataclass(frozen=True)
class ChatRequest:
    """A conversation and how to go on. `messages`: role and text each."""

    messages: tuple[dict[str, str], ...]
    params: SamplingParams
    stream: bool
    include_usage: bool
    return_token_ids: bool
    line: Line


def parse_json(raw: bytes) -> Json:
    """The body as a JSON object. Raises ApiError."""
    try:
        body = json.loads(raw, parse_constant=_refuse_constant)
        json.dumps(body, ensure_ascii=False).encode()  # half a surrogate pair cannot be sent back
    except (ValueError, RecursionError) as error:
        raise ApiError(
            400, f"the body is not JSON: {error}; accepted: a JSON object in UTF-8", code="invalid_json"
        ) from None
    if not isinstance(body, dict):
        raise ApiError(
            400, f"the body is a JSON {type(body).__name__}; accepted: an object", code="invalid_json"
        )
    return body


def parse_completion(body: Json, config: ServerConfig, vocab_size: int) -> GenerationRequest:
    """The body of /v1/completions. Raises ApiError."""
    body = dict(_known(body, _COMPLETION_FIELDS, _COMPLETION_NEUTRAL))
    _check_model(body, config)
    prompts = _prompts(body, config)
    echo = _flag(body, "echo")
    prompt_only = echo and type(body.get("max_tokens")) is int and body["max_tokens"] == 0
    if prompt_only:
        body["max_tokens"] = 1
    logprobs = _count(body, "logprobs", min(config.max_logprobs, vocab_size))
    params = _sampling_params(body, config, vocab_size, default_max_tokens=16)
    prompt_logprobs = params.prompt_logprobs
    if echo and logprobs is not None:  # whoever wants more of the prompt has them in the other field
        params = _with(params, prompt_logprobs=max(logprobs, prompt_logprobs or 0))
    stream, include_usage = _streaming(body, params)
    return GenerationRequest(
        prompts,
        _with(params, logprobs=logprobs),
        stream,
        include_usage,
        _flag(body, "return_token_ids"),
        _line(body),
        echo=echo,
        prompt_logprobs=prompt_logprobs,
        prompt_only=prompt_only,
    )


def parse_chat(body: Json, config: ServerConfig, vocab_size: int) -> ChatRequest:
    """The body of /v1/chat/completions. Raises ApiError."""
    body = dict(_known(body, _CHAT_FIELDS, _CHAT_NEUTRAL))
    _check_model(body, config)
    messages = _messages(body)
    if "max_completion_tokens" in body:
        if "max_tokens" in body:
            raise bad_field("max_tokens", "max_tokens and max_completion_tokens are both set; give one")
        _sampling_value(body, "max_completion_tokens", "max_tokens")
        body["max_tokens"] = body["max_completion_tokens"]
    wanted = _flag(body, "logprobs")
    top = _count(body, "top_logprobs", min(config.max_logprobs, vocab_size))
    if top is not None and not wanted:
        raise bad_field("top_logprobs", "top_logprobs is set without logprobs; accepted: with logprobs true")
    params = _sampling_params(body, config, vocab_size, default_max_tokens=None)
    stream, include_usage = _streaming(body, params)
    params = _with(params, logprobs=(top or 0) if wanted else None)
    return ChatRequest(messages, params, stream, include_usage, _flag(body, "return_token_ids"), _line(body))


def parse_tokenize(body: Json, config: ServerConfig) -> str:
    """The text in the body of /tokenize. Raises ApiError."""
    body = _known(body, ("model", "prompt"), {})
    if "model" in body:
        _check_model(body, config)
    prompt = body.get("prompt")
    if not isinstance(prompt, str):
        raise _missing("prompt", "a string") if prompt is None else not_accepted("prompt", prompt, "a string")
    return prompt


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _known(body: Json, fields: Iterable[str], neutral: Mapping[str, tuple[Any, ...]]) -> Json:
    """The fields that say something: null is left out, as if it had not been sent."""
    known = {*fields, *neutral, *_IGNORED}
    for name, value in body.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            message = f"unknown field {name!r}{hint}; accepted: {', '.join(sorted(fields))}"
            raise bad_field(name[:64], message, code="unknown_parameter")
        if name in neutral and value is not None and not _among(value, neutral[name]):
            accepted = " or ".join(["null", *(json.dumps(entry) for entry in neutral[name])])
            message = f"{name} is not supported by this server; accepted: {accepted}"
            raise bad_field(name, message, code="unsupported_parameter")
    return {name: value for name, value in body.items() if value is not None}


def _among(value: object, accepted: tuple[Any, ...]) -> bool:
    return any(type(value) is type(entry) and value == entry for entry in accepted)


def _missing(name: str, accepted: str) -> ApiError:
    return bad_field(name, f"{name} is missing; accepted: {accepted}", code="missing_required_parameter")


def _check_model(body: Json, config: ServerConfig) -> None:
    model = body.get("model")
    if model is None:
        raise _missing("model", repr(config.model_name))
    if not isinstance(model, str):
        raise not_accepted("model", model, repr(config.model_name))
    if model != config.model_name:
        message = f"the model {model!r} does not exist; accepted: {config.model_name!r}"
        raise ApiError(404, message, param="model", code="model_not_found")


def _prompts(body: Json, config: ServerConfig) -> tuple[str | list[int], ...]:
    accepted = "a string, a list of strings, a list of token ids, or a list of lists of token ids"
    value = body.get("prompt")
    if value is None:
        raise _missing("prompt", accepted)
    if isinstance(value, str) or _is_ids(value):
        return (value,)
    if not isinstance(value, list) or not value:
        raise not_accepted("prompt", value, accepted)
    if not (all(isinstance(item, str) for item in value) or all(map(_is_ids, value))):
        raise not_accepted("prompt", value, accepted)
    if len(value) > config.max_prompts:
        raise bad_field(
            "prompt", f"prompt is a list of {len(value)} prompts; accepted: at most {config.max_prompts}"
        )
    return tuple(value)


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and set(map(type, value)) == {int}


def _messages(body: Json) -> tuple[dict[str, str], ...]:
    value = body.get("messages")
    if value is None:
        raise _missing("messages", "a list of messages with role and content")
    if not isinstance(value, list) or not value:
        raise not_accepted("messages", value, "a non-empty list of messages with role and content")
    return tuple(_message(f"messages[{index}]", item) for index, item in enumerate(value))


def _message(where: str, value: object) -> dict[str, str]:
    if not isinstance(value, dict):
        raise not_accepted(where, value, "an object with role and content")
    for name in value.keys() - {"role", "content", "name"}:
        if value[name] not in (None, []):
            raise not_accepted(f"{where}.{name[:64]}", value[name], "the fields role, content and name")
    role = value.get("role")
    if role not in _ROLES:
        raise not_accepted(f"{where}.role", role, ", ".join(_ROLES))
    message = {"role": role, "content": _content(f"{where}.content", value.get("content"))}
    name = value.get("name")
    if name is not None:
        if not isinstance(name, str):
            raise not_accepted(f"{where}.name", name, "a string")
        message["name"] = name
    return message


def _content(where: str, value: object) -> str:
    """A string, or the texts of its parts joined."""
    if isinstance(value, str):
        return value
    accepted = 'a string, or a list of {"type": "text", "text": ...}'
    if not isinstance(value, list) or not value:
        raise not_accepted(where, value, accepted)
    for index, part in enumerate(value):
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            raise not_accepted(f"{where}[{index}]", part, accepted)
    return "".join(part["text"] for part in value)


def _sampling_params(
    body: Json, config: ServerConfig, vocab_size: int, *, default_max_tokens: int | None
) -> SamplingParams:
    given = {name: body[name] for name in _SAMPLING_FIELDS if name in body}
    for name, limit in _MAX_ITEMS.items():
        if isinstance(given.get(name), list | dict) and len(given[name]) > limit:
            raise bad_field(name, f"{name} has {len(given[name])} items; accepted: at most {limit}")
    if "logit_bias" in given:
        given["logit_bias"] = _by_token_id("logit_bias", given["logit_bias"])
    for name in given:
        _sampling_value(given, name, name)
    for name in ("n", "best_of", "beam_width"):
        if given.get(name, 1) > config.max_n:
            raise not_accepted(name, given[name], f"an integer from 1 to {config.max_n}")
    _count(body, "prompt_logprobs", min(config.max_logprobs, vocab_size))
    return _with(SamplingParams(max_tokens=default_max_tokens), **given)


def _with(params: SamplingParams, **fields: Any) -> SamplingParams:
    """`params` with more fields. Each value is fine; raises ApiError where one does not fit another."""
    try:
        return replace(params, **fields)
    except RequestError as error:
        raise bad_field(error.field or "max_tokens", str(error)) from None


def _by_token_id(name: str, value: object) -> dict[int, Any]:
    """JSON has strings for keys."""
    if not isinstance(value, dict) or not all(key.isascii() and key.isdecimal() for key in value):
        raise not_accepted(name, value, 'an object such as {"50256": -100}: token ids with numbers')
    return {int(key[:20]): number for key, number in value.items()}


def _sampling_value(body: Json, name: str, parameter: str) -> None:
    """Checks one value alone, so that the error can name its field."""
    try:
        replace(
            SamplingParams(max_tokens=None, beam_width=2 if name in _OF_BEAMS else 1),
            **{parameter: body[name]},
        )
    except RequestError as error:
        raise bad_field(name, str(error).replace(parameter, name, 1)) from None


def _streaming(body: Json, params: SamplingParams) -> tuple[bool, bool]:
    """Whether to stream, and whether to end with a chunk about usage."""
    stream = _flag(body, "stream")
    if stream and params.beam_width > 1:
        raise bad_field(
            "beam_width",
            "beam_width above 1 in a stream; accepted: without stream, as beams change to the end",
        )
    if stream and params.num_sequences > params.n:
        raise bad_field(
            "best_of", "best_of is above n in a stream; accepted: without stream, as the best come last"
        )
    if stream and "prompt_logprobs" in body:
        raise bad_field(
            "prompt_logprobs", "prompt_logprobs in a stream; accepted: without stream, or echo with logprobs"
        )
    options = body.get("stream_options", {})
    accepted = 'an object with include_usage true or false, together with "stream": true'
    if not isinstance(options, dict) or not options.keys() <= {"include_usage", "include_obfuscation"}:
        raise not_accepted("stream_options", options, accepted)
    if not all(isinstance(value, bool) for value in options.values()) or (options and not stream):
        raise not_accepted("stream_options", options, accepted)
    return stream, options.get("include_usage", False)


def _line(body: Json) -> Line:
    priority, timeout_s = body.get("priority", 0), body.get("timeout_s")
    if type(priority) is not int or abs(priority) > _MAX_PRIORITY:
        accepted = f"an integer from {-_MAX_PRIORITY} to {_MAX_PRIORITY}, lower goes first"
        raise not_accepted("priority", priority, accepted)
    try:
        check_line(priority, timeout_s)
    except RequestError as error:
        raise bad_field("timeout_s", str(error)) from None
    return Line(priority, timeout_s)


def _flag(body: Json, name: str) -> bool:
    value = body.get(name, False)
    if not isinstance(value, bool):
        raise not_accepted(name, value, "true or false")
    return value


def _count(body: Json, name: str, highest: int) -> int | None:
    value = body.get(name)
    if value is not None and (type(value) is not int or not 0 <= value <= highest):
        raise not_accepted(name, value, f"an integer from 0 to {highest}")
    return value
