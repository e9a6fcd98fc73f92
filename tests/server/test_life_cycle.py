"""Clients that go away, load, and a server that starts and stops. Oracle: `LLM.generate` on the same engine, unless a test
says otherwise."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from trtc.cli.main import main
from trtc.core.errors import ConfigError
from trtc.runtime.llm import LLM
from trtc.runtime.server import serve
from trtc.runtime.server.config import ServerConfig

from .requests import MALFORMED, PROMPTS, completion, greedy
from .running import LIMIT_S, RunningServer, wait_until

NEWS = Path(__file__).parents[2] / "examples" / "news.jsonl"
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


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 1000])
def test_a_prompt_that_a_timeout_leaves_unscored_comes_back(
    server: RunningServer, stream: bool, max_tokens: int
) -> None:
    """A time in which no engine computes a prompt. Oracle: text and tokens of the answer, which has all of the prompt."""
    prompt = "A text of words"
    body = completion(prompt=prompt, max_tokens=max_tokens, echo=True, logprobs=1, timeout_s=1e-6)
    answer = server.request("POST", "/v1/completions", json=body | {"stream": stream}).raise_for_status()
    data = json.loads(answer.text.split("\n")[0].removeprefix("data: ")) if stream else answer.json()
    (choice,) = data["choices"]
    assert choice["finish_reason"] == "timeout" and choice["text"] == prompt
    logprobs = choice["logprobs"]
    assert set(logprobs["token_logprobs"]) == {None} and "".join(logprobs["tokens"][1:]) == prompt
    for token, offset in zip(logprobs["tokens"][1:], logprobs["text_offset"][1:], strict=True):
        assert choice["text"][offset : offset + len(token)] == token


def test_prompt_logprobs_that_a_timeout_leaves_out_are_null(server: RunningServer) -> None:
    body = completion(prompt="A text", prompt_logprobs=1, timeout_s=1e-6)
    answer = server.request("POST", "/v1/completions", json=body).raise_for_status().json()
    assert answer["choices"][0]["prompt_logprobs"] == [None] * answer["usage"]["prompt_tokens"]


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
    # A machine under load may notice that a client has gone only when all of its tokens are there.
    too_late = changes['trtc_requests_total{outcome="length"}'] - 150
    assert 0 <= too_late <= 4
    assert changes['trtc_requests_total{outcome="abort"}'] == 40 - too_late
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


def test_prompt_lookup_changes_no_text(server: RunningServer, strict_server: RunningServer) -> None:
    """`strict_server` looks up for greedy requests. Oracle: the other server, which has the same weights."""
    pairs = [json.loads(line) for line in NEWS.read_text(encoding="utf-8").splitlines()[:6]]
    prompts = [f"{pair['article']} TL;DR: " for pair in pairs]
    headers = {"Authorization": "Bearer secret"}
    texts = []
    for one, more in ((server, {}), (strict_server, {"headers": headers})):
        model = one.request("GET", "/v1/models", **more).json()["data"][0]["id"]
        body = completion(model=model, prompt=prompts, max_tokens=40, temperature=0)
        answer = one.request("POST", "/v1/completions", json=body, **more).raise_for_status()
        texts.append([choice["text"] for choice in answer.json()["choices"]])
    assert texts[0] == texts[1] and all(texts[0])
    metrics = strict_server.metrics(**headers)
    assert 0 <= metrics["trtc_accepted_tokens_total"] <= metrics["trtc_guessed_tokens_total"]


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


def test_a_missing_package_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trtc.cli.serve.find_spec", lambda name: None if name == "uvicorn" else name)
    assert main(["serve", "--engine-dir", str(tmp_path)]) == 1
    assert "serving needs the package uvicorn: pip install 'trtc[serve]'" in capsys.readouterr().err


def test_a_server_whose_engine_is_killed_says_so(engine: Path) -> None:
    """Oracle: the operating system, which kills it."""
    server = RunningServer(engine)
    body = completion(max_tokens=1000, n=8, ignore_eos=True, prompt=LONG_PROMPTS)
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(server.request, "POST", "/v1/completions", json=body)
        wait_until(lambda: answer.done() or server.metrics()["trtc_sequences_running"])
        (child,) = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
        os.kill(int(child), signal.SIGKILL)
        found = answer.result()
    reason = "the engine's process has ended: exit code -9"
    assert (found.status_code, found.json()["error"]["message"]) == (503, reason)
    health = server.request("GET", "/health")
    assert (health.status_code, health.json()["reason"]) == (503, reason)
    assert server.request("POST", "/v1/completions", json=completion()).status_code == 503
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(LIMIT_S) == 0
    assert [entry["event"] for entry in server.log if entry["level"] == "error"] == [reason]


@pytest.mark.parametrize("disposition", [signal.SIG_IGN, signal.SIG_DFL])
def test_a_signal_that_is_ignored_stays_so(disposition: signal.Handlers) -> None:
    """As a script that starts a background job has SIGINT. In this process; no server is started."""
    server = serve._Server.__new__(serve._Server)
    before = signal.signal(signal.SIGINT, disposition)
    try:
        with server.capture_signals():
            found = signal.getsignal(signal.SIGINT)
            assert found == (disposition if disposition is signal.SIG_IGN else server._drain)
        assert signal.getsignal(signal.SIGINT) is disposition
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_key_of_the_environment_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: by hand. The server itself is not started."""
    given: list[ServerConfig] = []
    monkeypatch.setattr(serve, "serve", lambda engine_dir, config, **options: given.append(config))
    monkeypatch.setenv("TRTC_API_KEY", "secret")
    assert main(["serve", "--engine-dir", str(tmp_path / "engine"), "--host", "0.0.0.0"]) == 0
    (config,) = given
    assert (config.api_key, config.host, config.model_name) == ("secret", "0.0.0.0", "engine")
    assert "secret" not in repr(config)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("api_key", "one\nkey", "--api-key is empty, not ASCII, or has white space around it"),
        ("api_key", "key\n", "--api-key"),
        ("model_name", "\udcff", r"--served-model-name is '.udcff'; accepted: a text that UTF-8 can encode"),
    ],
)
def test_what_no_client_could_send_or_be_sent(name: str, value: str, says: str) -> None:
    """A key of a file that ends with a line break; a name from a folder of bytes, which every answer would hold."""
    with pytest.raises(ConfigError, match=says):
        ServerConfig(**{"model_name": "m", name: value})
