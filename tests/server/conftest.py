"""The servers of these tests: one as it comes, one with a chat template, a key and tight limits."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from trtc.runtime.llm import LLM
from trtc.tests.tiny_opt import TINY_OPT, build_tiny_opt

from .running import LIMIT_S, RunningServer

CHAT_TEMPLATE = """\
{{ bos_token }}{% for message in messages %}
{% if message.role not in ['system', 'user', 'assistant'] %}{{ raise_exception('no role ' + message.role) }}{% endif %}
{{ message.role }}: {{ message.content | trim }}
{% endfor %}
{% if add_generation_prompt %}assistant:{% endif %}"""

LIMITS = ("--max-batch-size", "8", "--max-beam-width", "4")


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_opt(tmp_path_factory.mktemp("server") / "tiny-opt", *LIMITS)


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny OPT's checkpoint with a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "checkpoint"
    shutil.copytree(TINY_OPT, folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


@pytest.fixture(scope="session")
def chat_engine(chat_model: Path) -> Path:
    return build_tiny_opt(chat_model.parent / "chatty", *LIMITS, model_dir=chat_model)


@pytest.fixture(scope="session")
def server(engine: Path) -> Iterator[RunningServer]:
    running = RunningServer(engine)
    yield running
    assert running.stop() == 0


@pytest.fixture(scope="session")
def strict_server(chat_engine: Path) -> Iterator[RunningServer]:
    """Eight sequences run, one may wait; the key is `secret`; greedy requests get prompt lookup."""
    options = "--api-key secret --max-queue 1 --max-body-bytes 20000 --prompt-lookup 1:4"
    running = RunningServer(chat_engine, *options.split())
    yield running
    assert running.stop() == 0


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
