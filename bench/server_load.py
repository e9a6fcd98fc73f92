"""A server under load, as a user starts it: does every request get its answer, and does nothing stay behind?

    python -m trtc.bench.server_load                            # 2,000 requests against the tiny OPT on the CPU
    python -m trtc.bench.server_load --engine-dir engine --rates 2 8 inf --requests 512   # speed: see server_rates.py

One fifth of the requests goes away midway, one twentieth is malformed. The other answers are compared with those of `LLM`
on the same engine. Then one client is killed, and the server is told to stop while it is busy. Prints a table and writes it
as JSON; the exit code is 1 when something is not as it should be.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx

from ..runtime.llm import LLM
from ..runtime.sampling_params import SamplingParams
from . import server_rates
from .serving import ROOT, STUCK_S, Server, build_tiny_opt, environment, percentile, print_table, wait_until

RESULTS = ROOT / "bench" / "results" / "cpu-server-load.json"
PROMPTS = (
    "The city council of Norwick",
    "A storm",
    "Holt Motors said on Monday that it",
    "The mayor " * 60,
)
LENGTHS = (4, 16, 48)
"""Output tokens; a request that goes away asks for more."""
ENDLESS = 900
MALFORMED: tuple[tuple[str, Any], ...] = (
    ("model", 3),
    ("prompt", None),
    ("prompt", [1, "x"]),
    ("prompt", [10**9]),
    ("n", 0),
    ("n", 1000),
    ("max_tokens", "16"),
    ("temperature", -1),
    ("top_p", 2),
    ("stop", [""]),
    ("seed", -1),
    ("logprobs", 1000),
    ("logit_bias", {"x": 1}),
    ("best_of", 0),
    ("stream", "yes"),
    ("suffix", "end"),
    ("temprature", 1),
)
MAX_GROWTH_MIB = 8
"""Of resident memory from a quarter of the requests to their end: less than an allocator's unrest."""


@dataclass(frozen=True)
class Row:
    """One line of the table. `wanted`: in words; `ok`: whether it is so."""

    case: str
    value: Any
    wanted: str
    ok: bool


@dataclass
class Tally:
    """What became of the requests."""

    ended: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    """Of those that got their whole answer."""
    memory_mib: dict[int, float] = field(default_factory=dict)
    """By number of requests that have ended."""


class Load:
    """Requests on a fixed number of connections, checked against `expected`: (prompt, length) -> text."""

    def __init__(self, server: Server, expected: dict[tuple[str, int], str], seed: int) -> None:
        self.server, self.expected = server, expected
        self.chance = random.Random(seed)
        self.tally = Tally()

    async def run(self, count: int, connections: int) -> None:
        whole = count - count // 5 - count // 20
        kinds = ["cancelled"] * (count // 5) + ["malformed"] * (count // 20)
        kinds += ["whole"] * (whole // 2) + ["streamed"] * (whole - whole // 2)
        self.chance.shuffle(kinds)
        waiting = iter(kinds)
        limits = httpx.Limits(max_connections=connections)
        async with httpx.AsyncClient(base_url=self.server.url, limits=limits, timeout=STUCK_S) as http:
            await self._largest_steps(http, connections)
            self.tally.memory_mib[0] = self.server.resident_mib()
            await asyncio.gather(*(self._connection(http, waiting, count) for _ in range(connections)))

    async def _largest_steps(self, http: httpx.AsyncClient, connections: int) -> None:
        """The longest requests on all connections at once: what the engine needs for its largest steps it has then."""
        body = self._body(prompt=PROMPTS[-1], max_tokens=max(LENGTHS), n=4)
        bodies = [body, body | {"stream": True}] * (connections // 2)
        await asyncio.gather(*(http.post("/v1/completions", json=each) for each in bodies))

    async def _connection(self, http: httpx.AsyncClient, kinds: Iterator[str], count: int) -> None:
        for kind in kinds:
            try:
                async with asyncio.timeout(STUCK_S):
                    problem = await getattr(self, f"_{kind}")(http)
            except TimeoutError:
                kind, problem = "stuck", "no answer"
            except httpx.HTTPError as error:
                kind, problem = "broken", repr(error)
            tally = self.tally
            tally.outcomes[kind] += 1
            if problem:
                tally.problems.append(f"{kind}: {problem}")
            tally.ended += 1
            if tally.ended % (count // 20) == 0:
                tally.memory_mib[tally.ended] = self.server.resident_mib()

    def _body(self, **others: Any) -> dict[str, Any]:
        prompt, length = self.chance.choice(PROMPTS), self.chance.choice(LENGTHS)
        body = {"model": self.server.model, "prompt": prompt, "max_tokens": length}
        return {**body, "temperature": 0, "ignore_eos": True, **others}

    def _check(self, body: dict[str, Any], text: str, started: float) -> str | None:
        self.tally.seconds.append(time.perf_counter() - started)
        wanted = self.expected[body["prompt"], body["max_tokens"]]
        return None if text == wanted else f"{text!r} is not {wanted!r}"

    async def _whole(self, http: httpx.AsyncClient) -> str | None:
        body, started = self._body(), time.perf_counter()
        answer = await http.post("/v1/completions", json=body)
        if answer.status_code != 200:
            return answer.text
        return self._check(body, answer.json()["choices"][0]["text"], started)

    async def _streamed(self, http: httpx.AsyncClient) -> str | None:
        body, started, text = self._body(stream=True), time.perf_counter(), ""
        async with http.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                return (await answer.aread()).decode()
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
        return self._check(body, text, started)

    async def _cancelled(self, http: httpx.AsyncClient) -> str | None:
        """Leaves after some chunks; one in four does not stream, and leaves while it waits."""
        if self.chance.random() < 0.25:
            try:
                timeout = httpx.Timeout(STUCK_S, read=0.3)
                await http.post("/v1/completions", json=self._body(max_tokens=ENDLESS), timeout=timeout)
            except httpx.TimeoutException:
                return None
            return "900 tokens within 0.3 s"
        chunks = self.chance.randint(1, 20)
        body = self._body(stream=True, max_tokens=ENDLESS)
        async with http.stream("POST", "/v1/completions", json=body) as answer:
            async for _ in answer.aiter_lines():
                chunks -= 1
                if not chunks:
                    return None
        return "the stream ended by itself"

    async def _malformed(self, http: httpx.AsyncClient) -> str | None:
        name, value = self.chance.choice(MALFORMED)
        answer = await http.post("/v1/completions", json=self._body(**{name: value}))
        named = answer.json()["error"]["param"] if 400 <= answer.status_code < 500 else None
        return None if named == name else f"{name} = {value!r}: {answer.status_code} {answer.text}"


def load_rows(server: Server, engine_dir: Path, args: argparse.Namespace) -> tuple[list[Row], Tally]:
    """The requests, and what they left behind."""
    load = Load(server, expected_texts(engine_dir), args.seed)
    started = time.perf_counter()
    asyncio.run(load.run(args.requests, args.connections))
    seconds = time.perf_counter() - started
    tally = load.tally
    sequences, pages = server.leaked()
    memory = {at: mib for at, mib in tally.memory_mib.items() if at % (args.requests // 4) == 0}
    quarter, last = sorted(memory)[1], max(memory)
    growth = tally.memory_mib[last] - tally.memory_mib[quarter]
    outcomes, problems = tally.outcomes, Counter(each.partition(":")[0] for each in tally.problems)
    whole = outcomes["whole"] + outcomes["streamed"]
    wrong = problems["whole"] + problems["streamed"] + problems["cancelled"]
    malformed = args.requests // 20
    rows = [
        Row("requests", sum(outcomes.values()), f"{args.requests}", tally.ended == args.requests),
        Row("requests per second", round(args.requests / seconds, 1), "", True),
        Row("answers equal to LLM's", whole - wrong, f"{whole}", wrong == 0),
        Row("cancelled midway", outcomes["cancelled"], f"{args.requests // 5}", not problems["cancelled"]),
        Row("malformed: 4xx naming the field", outcomes["malformed"] - problems["malformed"], f"{malformed}",
            outcomes["malformed"] == malformed and not problems["malformed"]),
        Row("stuck or broken", outcomes["stuck"] + outcomes["broken"], "0",
            not (outcomes["stuck"] or outcomes["broken"])),
        Row("sequences, pages left", f"{sequences:g}, {pages:g}", "0, 0", (sequences, pages) == (0, 0)),
        Row(f"resident MiB at {', '.join(map(str, memory))}",
            ", ".join(f"{mib:.1f}" for mib in memory.values()), "", True),
        Row(f"MiB from {quarter} to {last}", round(growth, 1), f"below {MAX_GROWTH_MIB}", growth < MAX_GROWTH_MIB),
        Row("seconds of an answer: p50, p99",
            f"{percentile(tally.seconds, 50):.2f}, {percentile(tally.seconds, 99):.2f}", "", True),
    ]  # fmt: skip
    return rows, tally


def expected_texts(engine_dir: Path) -> dict[tuple[str, int], str]:
    cases = [(prompt, length) for prompt in PROMPTS for length in LENGTHS]
    params = [SamplingParams(max_tokens=n, temperature=0, ignore_eos=True) for _, n in cases]
    with LLM(engine_dir) as llm:
        outputs = llm.generate([prompt for prompt, _ in cases], params)
    return {case: output.outputs[0].text for case, output in zip(cases, outputs, strict=True)}


CLIENT = """
import sys, httpx
url, model = sys.argv[1:]
body = {"model": model, "prompt": ["x"] * 4, "n": 8, "max_tokens": 900, "ignore_eos": True, "stream": True}
with httpx.stream("POST", url + "/v1/completions", json=body, timeout=None) as answer:
    for line in answer.iter_lines():
        pass
"""


def killed_client(server: Server) -> Row:
    """`kill -9` of a client with 32 sequences of 900 tokens."""
    client = subprocess.Popen([sys.executable, "-c", CLIENT, server.url, server.model])
    wait_until(lambda: server.held() == 32)
    client.kill()
    client.wait()
    started = time.perf_counter()
    sequences, pages = server.leaked()
    seconds = time.perf_counter() - started
    value = f"{sequences:g}, {pages:g} after {seconds:.2f} s"
    return Row("kill -9 of a client: sequences, pages left", value, "0, 0", (sequences, pages) == (0, 0))


def terminated(server: Server, connections: int) -> list[Row]:
    """SIGTERM while `connections` streams of 100 tokens are under way."""
    counts: list[int] = []

    async def one(http: httpx.AsyncClient) -> None:
        body = {"model": server.model, "prompt": "x", "max_tokens": 100, "ignore_eos": True, "stream": True}
        count = 0
        async with http.stream("POST", "/v1/completions", json=body | {"return_token_ids": True}) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    count += len(json.loads(line.removeprefix("data: "))["choices"][0]["token_ids"])
        counts.append(count)

    async def main() -> int:
        limits = httpx.Limits(max_connections=connections)
        async with httpx.AsyncClient(base_url=server.url, limits=limits, timeout=STUCK_S) as http:
            tasks = [asyncio.create_task(one(http)) for _ in range(connections)]
            await asyncio.to_thread(wait_until, lambda: server.held() == connections)
            server.terminate()
            await asyncio.gather(*tasks)
        return await asyncio.to_thread(server.wait)

    code = asyncio.run(main())
    whole = counts.count(100)
    complaints = server.complaints
    return [
        Row("SIGTERM under load: whole answers", whole, f"{connections}", whole == connections),
        Row("exit code", code, "0", code == 0),
        Row("warnings and errors in the log", len(complaints), "0", not complaints),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--engine-dir", type=Path, help="default: the tiny OPT for target cpu, built for this"
    )
    parser.add_argument("--requests", type=int, default=2000, metavar="N", help="default: %(default)s")
    parser.add_argument("--connections", type=int, default=64, metavar="N", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", help="what is measured, where git cannot tell")
    parser.add_argument("--json", type=Path, metavar="FILE", help=f"default: {RESULTS.relative_to(ROOT)}")
    server_rates.add_arguments(parser)
    args = parser.parse_args()
    if args.requests < 20:
        parser.error("--requests is too small; accepted: at least 20")
    with tempfile.TemporaryDirectory() as scratch:
        engine_dir = args.engine_dir or build_tiny_opt(Path(scratch))
        if args.rates:
            server_rates.run(engine_dir, args)
            return
        server = Server(engine_dir)
        try:
            rows, tally = load_rows(server, engine_dir, args)
            rows.append(killed_client(server))
            rows += terminated(server, args.connections)
        finally:
            server.process.kill()
        record = {
            "environment": environment(engine_dir, args.commit),
            "setup": {"requests": args.requests, "connections": args.connections, "seed": args.seed},
            "rows": [asdict(row) for row in rows],
            "memory_mib": tally.memory_mib,
            "problems": tally.problems,
        }
    print_table(
        ("case", "found", "wanted", ""),
        [(row.case, row.value, row.wanted, "ok" if row.ok else "NOT OK") for row in rows],
    )
    for problem in tally.problems[:10]:
        print(problem[:400])
    out = args.json or RESULTS
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    raise SystemExit(not all(row.ok for row in rows))


if __name__ == "__main__":
    main()
