"""The routes, and what they share."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.types import ASGIApp

from ... import __version__
from ...core.errors import RequestError
from ..async_llm import AsyncLLM
from .admission import Admission
from .chat_template import ChatTemplate
from .config import ServerConfig
from .errors import CLIENT_GONE, ApiError, bad_field, not_accepted
from .generation import Generation
from .history import History
from .http import ClientGoneError, EventStream, Front, read_body, until_disconnect
from .metrics import Metrics
from .protocol import (
    GenerationRequest,
    Json,
    parse_chat,
    parse_completion,
    parse_json,
    parse_tokenize,
)
from .responses import ChatFormat, CompletionFormat, Format

_PAGE_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; frame-ancestors 'none'",
}
"""The page loads nothing, and asks nobody but this server."""


@dataclass(eq=False)
class Service:
    """One engine behind the routes.

    facts:    name -> text, what the status page says about the engine
    draining: nothing new is expected, what runs is finished
    """

    llm: AsyncLLM
    chat_template: ChatTemplate | None
    config: ServerConfig
    metrics: Metrics
    history: History = field(default_factory=History)
    facts: Mapping[str, str] = field(default_factory=dict)
    draining: bool = False

    def __post_init__(self) -> None:
        self.created = int(time.time())
        self._admission = Admission(self.llm.executor.max_batch_size, self.config.max_queue)
        self.metrics.watch(self.llm.stats)

    @property
    def unavailable(self) -> str | None:
        """Why no request can be served now; None when one can."""
        return self.llm.failure or ("the server is shutting down" if self.draining else None)

    async def completions(self, request: Request) -> Response:
        wanted = parse_completion(await self._json(request), self.config, self.llm.executor.vocab_size)
        has_text = any(isinstance(prompt, str) for prompt in wanted.prompts)  # which may take a while
        prompt_ids = await asyncio.to_thread(self._encode, wanted) if has_text else self._encode(wanted)
        form = CompletionFormat(
            self.llm.tokenizer,
            [self._prompt_text(prompt) for prompt in wanted.prompts],
            wanted.params.n,
            wanted.echo,
            wanted.return_token_ids,
            wanted.params.logprobs,
            wanted.prompt_logprobs,
        )
        return await self._respond(request, wanted, prompt_ids, form)

    async def chat_completions(self, request: Request) -> Response:
        body = await self._json(request)
        if self.chat_template is None:
            message = "this engine's tokenizer has no chat template; accepted: /v1/completions with a prompt"
            raise bad_field("messages", message, code="no_chat_template")
        chat = parse_chat(body, self.config, self.llm.executor.vocab_size)
        try:
            ids = await asyncio.to_thread(self.chat_template.token_ids, chat.messages)
        except RequestError as error:
            raise bad_field("messages", str(error)) from None
        wanted = GenerationRequest(
            (ids,), chat.params, chat.stream, chat.include_usage, chat.return_token_ids, chat.line
        )
        self._check(ids, wanted, "messages")
        form = ChatFormat(
            self.llm.tokenizer,
            chat.params.logprobs or 0,
            chat.return_token_ids,
            chat.params.prompt_logprobs,
        )
        return await self._respond(request, wanted, [ids], form)

    async def tokenize(self, request: Request) -> Response:
        text = parse_tokenize(await self._json(request), self.config)
        try:
            _, ids = await asyncio.to_thread(self.llm.tokenize, text)
        except RequestError as error:
            raise bad_field("prompt", str(error)) from None
        limit = self.llm.executor.max_seq_len
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": limit})

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self.config.model_name:
            message = f"the model {name!r} does not exist; accepted: {self.config.model_name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return JSONResponse(self._model())

    async def health(self, request: Request) -> Response:
        """Whether the process is of any use: false once the engine has failed."""
        return _status(self.llm.failure)

    async def ready(self, request: Request) -> Response:
        """Whether requests should be sent here."""
        return _status(self.unavailable)

    async def show_metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def page(self, request: Request) -> Response:
        """The status page, which fetches its numbers from /status."""
        return HTMLResponse(_page(), headers=_PAGE_HEADERS)

    async def status(self, request: Request) -> Response:
        """What the status page shows: the present, the totals, and the samples after `since`."""
        since = request.query_params.get("since", "0")
        try:
            after = float(since)
        except ValueError:
            after = math.nan
        if not math.isfinite(after):
            raise not_accepted("since", since, "seconds since the epoch")
        executor, stats = self.llm.executor, self.llm.stats()
        body = {
            "time": time.time(),
            "started": self.created,
            "state": "failed" if self.llm.failure else "draining" if self.draining else "ready",
            "reason": self.unavailable,
            "model": self.config.model_name,
            "version": __version__,
            "facts": dict(self.facts),
            "limits": {
                "running": executor.max_batch_size,
                "waiting": self.config.max_queue,
                "pages": executor.num_pages,
                "page_size": executor.page_size,
                "tokens": executor.max_seq_len,
            },
            "now": {
                "running": stats.num_running,
                "waiting": stats.num_waiting,
                "pages": stats.num_used_pages,
                "cached_pages": stats.num_cached_pages,
            },
            "totals": {
                "prompt_tokens": stats.num_prompt_tokens,
                "output_tokens": stats.num_output_tokens,
                "looked_up_pages": stats.num_looked_up_pages,
                "found_pages": stats.num_found_pages,
                "requests": dict(self.history.outcomes),
                "responses": self.metrics.responses_by_status(),
            },
            "interval": self.history.interval_s,
            "history": self.history.columns(after),
            "recent": self.history.recent(),
        }
        return JSONResponse(body, headers={"Cache-Control": "no-store"})

    async def _json(self, request: Request) -> Json:
        return parse_json(await read_body(request, self.config))

    def _encode(self, wanted: GenerationRequest) -> list[list[int]]:
        """Token ids of every prompt. Raises ApiError for what the engine cannot serve."""
        result = []
        for prompt in wanted.prompts:
            try:
                _, ids = self.llm.tokenize(prompt)
            except RequestError as error:
                raise bad_field("prompt", f"prompt: {error}") from None
            self._check(ids, wanted, "prompt")
            result.append(ids)
        return result

    def _check(self, ids: Sequence[int], wanted: GenerationRequest, field: str) -> None:
        try:
            self.llm.check_request(ids, wanted.params)
        except RequestError as error:
            if error.field is not None:
                raise bad_field(error.field, str(error)) from None
            too_long = len(ids) >= min(self.llm.executor.max_input_len + 1, self.llm.executor.max_seq_len)
            code = "context_length_exceeded" if too_long else "invalid_value"
            raise bad_field(field, f"{field}: {error}", code=code) from None

    def _prompt_text(self, prompt: str | list[int]) -> str:
        if isinstance(prompt, str):
            return prompt
        return "" if self.llm.tokenizer is None else self.llm.tokenizer.decode(prompt)

    async def _respond(
        self, request: Request, wanted: GenerationRequest, prompt_ids: Sequence[list[int]], form: Format
    ) -> Response:
        if self.unavailable is not None:
            raise ApiError(503, self.unavailable, code="unavailable")
        places = self._admission.take(wanted.num_sequences)
        generation = Generation(
            self.llm,
            wanted,
            prompt_ids,
            form,
            self.config.model_name,
            request.state.log_fields,
        )
        if wanted.stream:
            return EventStream(generation.events(), places.release)
        try:
            return JSONResponse(await until_disconnect(request.receive, generation.answer()))
        finally:
            places.release()

    def _model(self) -> dict[str, Any]:
        return {
            "id": self.config.model_name,
            "object": "model",
            "created": self.created,
            "owned_by": "trtc",
            "max_model_len": self.llm.executor.max_seq_len,
        }


def create_app(service: Service) -> ASGIApp:
    """The application, for any ASGI server."""
    app = FastAPI(title="trtc", docs_url=None, redoc_url=None, openapi_url=None)
    routes = {
        ("POST", "/v1/completions"): service.completions,
        ("POST", "/v1/chat/completions"): service.chat_completions,
        ("GET", "/v1/models"): service.models,
        ("GET", "/v1/models/{name:path}"): service.model,
        ("POST", "/tokenize"): service.tokenize,
        ("GET", "/health"): service.health,
        ("GET", "/ready"): service.ready,
        ("GET", "/metrics"): service.show_metrics,
        ("GET", "/status"): service.status,
        ("GET", "/"): service.page,
    }
    for (method, path), handler in routes.items():
        app.add_route(path, handler, methods=[method])
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(ClientGoneError, _client_gone)
    app.add_exception_handler(ClientDisconnect, _client_gone)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _internal_error)
    paths = frozenset(path for _, path in routes)
    return Front(app, service.config, service.metrics, paths)


@cache
def _page() -> str:
    return (resources.files(__package__) / "status.html").read_text(encoding="utf-8")


def _status(problem: str | None) -> Response:
    if problem is None:
        return JSONResponse({"status": "ok"})
    return JSONResponse({"status": "unavailable", "reason": problem}, 503)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_GONE)  # for the log; nobody reads it


async def _http_error(request: Request, error: Exception) -> Response:
    """What the router refuses: an unknown path, a method that a path does not have."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}; docs/server.md lists the routes"
    return ApiError(error.status_code, message, headers=error.headers).response()


async def _internal_error(request: Request, error: Exception) -> Response:
    name = request.state.request_id
    return ApiError(500, f"internal error; the server's log has it as request {name}").response()
