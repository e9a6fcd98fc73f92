"""The server's handling of connections, without a server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

pytest.importorskip("starlette")

from trtc.runtime.server.http import EventStream

CHUNK = "http.response.body"


def test_a_lost_connection_is_written_to_once() -> None:
    """Oracle: asyncio's transports, which report a failed write one turn of the loop later."""
    written: list[bytes] = []
    ended: list[str] = []

    async def events() -> AsyncGenerator[str, None]:
        for index in range(8):  # as of one step of a request with n = 8
            yield f"data: {index}\n\n"

    async def main() -> None:
        lost = asyncio.Event()

        async def receive() -> dict[str, str]:
            await lost.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, object]) -> None:
            if message["type"] == CHUNK and message["body"] and not lost.is_set():
                assert isinstance(message["body"], bytes)
                written.append(message["body"])
                asyncio.get_running_loop().call_soon(lost.set)

        stream = EventStream(events(), on_end=lambda: ended.append("released"))
        await stream({"type": "http", "state": {"log_fields": {}}}, receive, send)  # type: ignore[arg-type]

    asyncio.run(main())
    assert written == [b"data: 0\n\n"]
    assert ended == ["released"]
