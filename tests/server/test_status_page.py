"""The status page and its numbers. Oracle: the metrics of the same server; a browser, where there is one."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from .running import LIMIT_S, RunningServer, wait_until

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
MESSAGE = 'id="message">The numbers of this server need its API key.<'
KEY = {"Authorization": "Bearer secret"}


def complete(server: RunningServer, count: int) -> None:
    for _ in range(count):
        body = {"model": "tiny-opt", "prompt": [5, 6, 7], "max_tokens": 4, "ignore_eos": True}
        server.request("POST", "/v1/completions", json=body).raise_for_status()


def test_status_has_the_numbers_of_the_metrics(server: RunningServer) -> None:
    server.wait_until_idle()
    before = server.request("GET", "/status").json()
    complete(server, 3)
    status = server.request("GET", "/status").json()
    metrics = server.metrics()
    assert (status["model"], status["state"], status["reason"]) == ("tiny-opt", "ready", None)
    assert status["facts"]["target"] == "cpu" and status["facts"]["dtype"] == "float32"
    limits = {"running": 8, "waiting": 256, "pages": metrics["trtc_kv_cache_pages"]}
    assert limits.items() <= status["limits"].items()
    assert status["now"] == {
        "running": 0,
        "waiting": 0,
        "pages": 0,
        "cached_pages": metrics["trtc_kv_cache_pages_cached"],
    }
    totals, earlier = status["totals"], before["totals"]
    assert totals["prompt_tokens"] - earlier["prompt_tokens"] == 3 * 3
    assert totals["output_tokens"] - earlier["output_tokens"] == 3 * 4
    assert totals["output_tokens"] == metrics["trtc_generation_tokens_total"]
    assert totals["requests"]["length"] == metrics['trtc_requests_total{outcome="length"}']
    assert totals["responses"]["200"] >= 3
    newest = status["recent"][0]
    assert newest["request_id"].startswith("cmpl-") and newest["num_output_tokens"] == 4


def test_samples_come_in_and_are_given_once(server: RunningServer) -> None:
    server.wait_until_idle()
    complete(server, 1)
    first = server.request("GET", "/status").json()["history"]

    def later() -> dict[str, list[float]]:
        since = max(first["time"], default=0)
        found: dict[str, list[float]] = server.request("GET", f"/status?since={since}").json()["history"]
        return found if sum(found["output_tokens"]) > 0 or sum(first["output_tokens"]) > 0 else {}

    found = wait_until(later)
    assert len({len(column) for column in found.values()}) == 1
    assert not set(found["time"]) & set(first["time"])


@pytest.mark.parametrize("since", ["x", "nan", "inf"])
def test_a_bad_since_is_refused(server: RunningServer, since: str) -> None:
    answer = server.request("GET", f"/status?since={since}")
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "since"


def test_the_page_needs_no_key_and_its_numbers_do(strict_server: RunningServer) -> None:
    page = strict_server.request("GET", "/")
    assert page.status_code == 200 and "chatty" not in page.text
    assert strict_server.request("GET", "/status").status_code == 401
    assert strict_server.request("GET", "/status", headers=KEY).json()["model"] == "chatty"


def test_the_page_loads_nothing_from_elsewhere(server: RunningServer) -> None:
    page = server.request("GET", "/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'") and "connect-src 'self'" in policy
    urls = set(re.findall(r"""(?:https?:)?//[a-z][^"'\s)]*""", page.text))
    assert urls == {"http://www.w3.org/2000/svg"}, "a namespace, which is not fetched"


@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
@pytest.mark.parametrize("which", ["server", "strict_server"])
def test_a_browser_shows_the_numbers(request: pytest.FixtureRequest, which: str, tmp_path: Path) -> None:
    """Also that a server with a key keeps them to itself."""
    server: RunningServer = request.getfixturevalue(which)
    if which == "server":
        complete(server, 1)
    shown = dom(server.url, tmp_path)
    if which == "server":
        status = server.request("GET", "/status").json()
        assert re.search(r'id="state" class="ready">ready<', shown)
        assert re.search(r'id="model">tiny-opt<', shown) and "8 sequences" in shown
        assert status["recent"][0]["request_id"] in shown
        assert shown.count("<svg") == 8 and shown.count('class="line"') >= 4
    else:
        assert re.search(r'id="state" class="lost">locked<', shown) and MESSAGE in shown
        assert "chatty" not in shown


def dom(url: str, profile: Path) -> str:
    """The document once its scripts have run for a while."""
    flags = (
        "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --disable-dev-shm-usage --virtual-time-budget=3000"
    )
    command = [str(BROWSER), *flags.split(), f"--user-data-dir={profile}", "--dump-dom", f"{url}/"]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=True).stdout
