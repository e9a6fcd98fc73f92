"""Runs a server until it is told to stop."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Unpack

import uvicorn

from ...core.engine import Engine
from ...core.errors import ConfigError
from ..async_llm import AsyncLLM
from ..engine_thread import RequestStats
from ..engine_worker import SWITCH_S
from ..heap import keep_heap
from ..load_core import EngineOptions
from ..signals import handled
from ..worker import Worker
from .app import Service, create_app
from .chat_template import ChatTemplate
from .config import ServerConfig
from .history import History
from .logs import log, set_up
from .metrics import Metrics

_LAST_ANSWERS_S = 5
"""For errors to reach clients after the drain timeout; then connections are cut."""


def serve(
    engine_dir: str | Path,
    config: ServerConfig,
    *,
    worker: Worker | None = None,
    **options: Unpack[EngineOptions],
) -> None:
    """Serves an engine until SIGTERM or SIGINT; then finishes what runs and returns. Call it in the main thread.

    worker:  has begun to load the engine, and got the options; None: the engine is loaded here, and runs in a thread, as a
             rank has it
    options: those of `LLM`
    Raises ConfigError when host and port cannot be had, EngineError and TargetError as `LLM` does.
    """
    with _bound_socket(config) as listener:  # before the engine: a port in use is known at once
        set_up()
        metrics, history = Metrics(), History()

        def request_ended(stats: RequestStats) -> None:
            metrics.request_ended(stats)
            history.request_ended(stats)

        if worker is not None:
            llm = AsyncLLM.from_worker(worker, on_finished=request_ended)
        else:
            llm = AsyncLLM(engine_dir, on_finished=request_ended, **options)
        try:
            template = ChatTemplate.from_dir(engine_dir)
            service = Service(llm, template, config, metrics, history, _facts(engine_dir))
            server = _Server(service, config)
            sys.setswitchinterval(SWITCH_S)
            keep_heap()
            server.run(sockets=[listener])
        finally:
            llm.shutdown()
    log("stopped")


class _Server(uvicorn.Server):
    """uvicorn, except that a drained server has ended well: uvicorn would raise the signal again after draining."""

    def __init__(self, service: Service, config: ServerConfig) -> None:
        super().__init__(
            uvicorn.Config(
                create_app(service),
                lifespan="off",
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=config.drain_timeout_s + _LAST_ANSWERS_S,
            )
        )
        self._service = service

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        assert sockets is not None, "serve() brings its own socket"
        self._sampling = asyncio.create_task(
            self._service.history.run(self._service.llm.stats, self._service.metrics)
        )
        name = self._service.config.model_name
        log("listening", url=_url(sockets[0]), model=name)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Waits for what runs. What has not ended in time gets an error from the engine, as clients expect it."""
        timeout_s = self._service.config.drain_timeout_s
        alarm = asyncio.get_running_loop().call_later(timeout_s, self._give_up)
        try:
            await super().shutdown(sockets)
        finally:
            alarm.cancel()
            self._sampling.cancel()

    def _give_up(self) -> None:
        log("drain timeout", seconds=self._service.config.drain_timeout_s)
        asyncio.get_running_loop().run_in_executor(None, self._service.llm.shutdown)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        assert threading.current_thread() is threading.main_thread(), "signals reach the main thread only"
        with handled(self._drain, signal.SIGTERM, signal.SIGINT):
            yield

    def _drain(self, number: int, frame: FrameType | None) -> None:
        """First signal: take no more, finish what runs. A second SIGINT: leave at once."""
        if self.should_exit and number == signal.SIGINT:
            self.force_exit = True
        if not self.should_exit:
            log("draining", signal=signal.Signals(number).name)
        self._service.draining = True
        self.should_exit = True


@contextmanager
def _bound_socket(config: ServerConfig) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((config.host, config.port))
        except OSError as error:
            raise ConfigError(
                f"--host {config.host} --port {config.port}: cannot listen there: {error.strerror}"
            ) from None
        yield listener


def _facts(engine_dir: str | Path) -> dict[str, str]:
    engine = Engine.open(engine_dir, verify=False)  # its files were compared when it was loaded
    model = engine.model
    return {
        "model": f"{model.architecture}, {model.num_layers} layers, hidden {model.hidden_size}",
        "target": engine.build.target,
        "dtype": str(model.dtype),
    }


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if listener.family == socket.AF_INET6 else f"http://{host}:{port}"
