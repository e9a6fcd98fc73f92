"""What every request goes through: request id, key, log line, and the end of a client that goes away."""

from __future__ import annotations

import asyncio
import hmac
import re
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .config import ServerConfig
from .errors import ApiError
from .logs import log, logger
from .metrics import Metrics

T = TypeVar("T")

OPEN_PATHS = ("/", "/health", "/ready")
"""Need no key: a load balancer has none, and the status page, which says nothing by itself, asks for one."""
POLLED_PATHS = (*OPEN_PATHS, "/metrics", "/status")
"""Asked for every few seconds: in the log only when they fail."""
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class ClientGoneError(Exception):
    """The client closed its connection before it had its answer."""


class Front:
    """The outermost layer: knows every request from its first byte to its last."""

    def __init__(self, app: ASGIApp, config: ServerConfig, metrics: Metrics, paths: frozenset[str]) -> None:
        """paths: those of the routes; others are counted together."""
        self._app, self._config, self._metrics, self._paths = app, config, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = _request_id(headers)
        fields: dict[str, Any] = {}
        scope.setdefault("state", {}).update(request_id=request_id, log_fields=fields)
        started = time.perf_counter()
        status = 500

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._answer(headers, scope, receive, send_with_id)
        except Exception:  # noqa: BLE001 - the client has its 500, or half an answer
            logger.exception("unhandled error", extra={"fields": {"request_id": request_id}})
        finally:
            fields["seconds"] = round(time.perf_counter() - started, 6)
            self._record(scope, status)

    def _record(self, scope: Scope, status: int) -> None:
        """Counts and logs a request that has ended."""
        path = scope["path"]
        self._metrics.responded(path if path in self._paths else "other", status)
        if path not in POLLED_PATHS or status != 200:
            state = scope["state"]
            names = {"request_id": state["request_id"], "method": scope["method"], "path": path}
            log("request", **names, status=status, **state["log_fields"])

    async def _answer(self, headers: Headers, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in OPEN_PATHS or self._authorized(headers):
            await self._app(scope, receive, send)
            return
        error = ApiError(
            401,
            "the API key is missing or wrong; accepted: the header Authorization: Bearer <key>",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await error.response()(scope, receive, send)

    def _authorized(self, headers: Headers) -> bool:
        if self._config.api_key is None:
            return True
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given, wanted = key.strip().encode(), self._config.api_key.encode()
        return scheme.lower() == "bearer" and hmac.compare_digest(given, wanted)


def _request_id(headers: Mapping[str, str]) -> str:
    """The client's, where it is one that can stand in a log."""
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


async def read_body(request: Request, config: ServerConfig) -> bytes:
    """The body of a request. Raises ApiError 413 when it is too long, 408 when it does not come."""
    too_long = ApiError(413, f"the body is too long; accepted: at most {config.max_body_bytes} bytes")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > config.max_body_bytes:
        raise too_long
    body = bytearray()
    try:
        async with asyncio.timeout(config.body_timeout_s):
            async for chunk in request.stream():
                body += chunk
                if len(body) > config.max_body_bytes:
                    raise too_long
    except TimeoutError:
        raise ApiError(
            408,
            f"the body did not come within {config.body_timeout_s} seconds",
            headers={"Connection": "close"},
        ) from None
    return bytes(body)


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Runs `work` as long as the client is there. Raises ClientGoneError, with `work` cancelled, when it goes away."""
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        for each in (task, watcher):
            each.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events that end, and whose source is closed, as soon as the client is gone."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str, None], on_end: Callable[[], None]) -> None:
        """on_end: called however it ends, also when `events` was never started."""
        self.status_code, self.background = 200, None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._events, self._on_end = events, on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_disconnect(receive, self._send_all(send))
        except ClientGoneError:
            scope["state"]["log_fields"]["client_gone"] = True
        finally:
            await self._events.aclose()
            self._on_end()

    async def _send_all(self, send: Send) -> None:
        """The events, with a turn of the event loop after each.

        A loop learns that a connection is lost one turn after the write that found it so; what is written in between
        goes nowhere, and asyncio logs a warning for it.
        """
        body = "http.response.body"
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for event in self._events:
            await send({"type": body, "body": event.encode(), "more_body": True})
            await asyncio.sleep(0)
        await send({"type": body, "body": b"", "more_body": False})
