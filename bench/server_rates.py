"""How fast the server is: mixed requests that arrive at given rates, beside `LLM` on the same engine.

`LLM` gets the same requests at once, in a process of its own, before the server is started (`trtc bench --mixed`). The clients
speak HTTP over plain sockets, so that the machine's cores are left to the server.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..core.engine import Engine
from ..runtime.benchmark import FIRST_TOKEN_ID, mixed_lengths
from .serving import STUCK_S, Server, environment, percentile, print_table

_MARK = b"data: {"


@dataclass(frozen=True)
class Timing:
    """Of one request, in seconds since it was sent. num_tokens: of output."""

    sent: float
    first: float
    last: float
    num_tokens: int

    @property
    def tpot(self) -> float:
        return (self.last - self.first) / max(1, self.num_tokens - 1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("speed")
    group.add_argument(
        "--rates", type=float, nargs="+", default=[], metavar="R",
        help="requests per second, one run each; inf: all at once. Takes the place of the checks under load",
    )  # fmt: skip
    group.add_argument(
        "--seconds", type=float, default=math.inf, metavar="S",
        help="at a rate, only as many of the requests as come in about so many seconds (default: all)",
    )  # fmt: skip
    group.add_argument(
        "--paced", action="store_true", help="on executors that only take the time of a GPU: see paced.py"
    )
    group.add_argument("--whole", action="store_true", help="ask for whole answers instead of streams")


def run(engine_dir: Path, args: argparse.Namespace) -> None:
    """Prints a line for each rate and writes them, with every sample, to `args.json`."""
    module = "trtc.bench.paced" if args.paced else "trtc.cli"
    offline = offline_throughput(engine_dir, args.requests, module)
    server = Server(engine_dir, "--max-queue", str(args.requests), module=module)
    try:
        # Every run has prompts of its own: the prefix cache knows none of them.
        warm_up, *runs = (requests(server, engine_dir, args, number) for number in range(1 + len(args.rates)))
        # As the offline side does, which takes the better of two runs: a GPU's graphs are captured when first needed.
        asyncio.run(drive(server, warm_up, math.inf, args.seed))
        results = [measure(server, bodies, rate, args) for bodies, rate in zip(runs, args.rates, strict=True)]
        server.terminate()
        code = server.wait()
    finally:
        server.process.kill()
    header = (
        "requests/s",
        "TTFT p50 ms",
        "TTFT p99 ms",
        "TPOT p50 ms",
        "TPOT p99 ms",
        "output tok/s",
        "of LLM",
    )
    table = []
    for result in results:
        result["of_offline"] = round(result["output_tok_s"] / offline, 3)
        names = ("ttft_p50_ms", "ttft_p99_ms", "tpot_p50_ms", "tpot_p99_ms", "output_tok_s", "of_offline")
        table.append((result["rate"], *(result[name] for name in names)))
    print_table(header, table)
    print(f"LLM, all at once: {offline} output tok/s; the server ends with code {code}")
    if args.json is not None:
        setup = {"requests": args.requests, "stream": not args.whole, "seed": args.seed}
        if args.paced:
            setup["device"] = "a clock (paced.py)"
        record = {
            "environment": environment(engine_dir, args.commit),
            "setup": setup,
            "offline_output_tok_s": offline,
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(record | {"rates": results}, indent=1) + "\n")


def offline_throughput(engine_dir: Path, count: int, module: str) -> float:
    """Output tokens per second of `LLM` with the same requests: the better of two runs."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "offline.json"
        command = [sys.executable, "-m", module, "bench", "--engine-dir", str(engine_dir), "--batch"]
        subprocess.run([*command, "--mixed", str(count), "--json", str(out)], check=True, stdout=sys.stderr)
        return max(
            each["output_tok_s"] for each in json.loads(out.read_text()) if each["kind"] == "continuous"
        )


def requests(server: Server, engine_dir: Path, args: argparse.Namespace, run: int) -> list[dict[str, Any]]:
    """Bodies of the mixed load: random token ids, greedy, of exactly the lengths that `trtc bench --mixed` has.

    run: number of a run, for which the ids are drawn
    """
    vocab_size = Engine.open(engine_dir, verify=False).model.vocab_size
    # Without a tokenizer there is no text, and a stream has nothing to send before its end.
    ids = {"return_token_ids": True} if not (engine_dir / "tokenizer.json").exists() else {}
    rng = np.random.default_rng([1, run])
    common = {"model": server.model, "temperature": 0, "ignore_eos": True, "stream": not args.whole, **ids}
    return [
        {
            **common,
            "prompt": rng.integers(FIRST_TOKEN_ID, vocab_size, num_in).tolist(),
            "max_tokens": int(num_out),
        }
        for num_in, num_out in zip(*mixed_lengths(args.requests, 0), strict=True)
    ]


def measure(
    server: Server, bodies: Sequence[dict[str, Any]], rate: float, args: argparse.Namespace
) -> dict[str, Any]:
    bodies = (
        bodies if math.isinf(rate) else bodies[: max(1, math.ceil(min(rate * args.seconds, len(bodies))))]
    )
    timings = asyncio.run(drive(server, bodies, rate, args.seed))
    first = [1e3 * each.first for each in timings]
    between = [1e3 * each.tpot for each in timings]
    seconds = max(each.sent + each.last for each in timings) - min(each.sent for each in timings)
    tokens = sum(each.num_tokens for each in timings)
    result: dict[str, Any] = {"rate": "all at once" if math.isinf(rate) else rate, "requests": len(bodies)}
    for name, samples in (("ttft", first), ("tpot", between)):
        for percent in (50, 99):
            result[f"{name}_p{percent}_ms"] = round(percentile(samples, percent), 2)
    result |= {"output_tok_s": round(tokens / seconds, 1), "seconds": round(seconds, 3)}
    result["ttft_ms"], result["tpot_ms"] = [round(x, 2) for x in first], [round(x, 3) for x in between]
    return result


async def drive(server: Server, bodies: Sequence[dict[str, Any]], rate: float, seed: int) -> list[Timing]:
    """Sends the requests as a Poisson process of `rate` requests per second."""
    rng = np.random.default_rng(seed)
    contents = [json.dumps(body).encode() for body in bodies]  # before the clock
    gaps = np.zeros(len(bodies)) if math.isinf(rate) else rng.exponential(1 / rate, len(bodies))
    start = time.perf_counter()

    async def one(body: dict[str, Any], content: bytes, at: float) -> Timing:
        await asyncio.sleep(max(0.0, start + at - time.perf_counter()))
        async with asyncio.timeout(STUCK_S + 600):
            return await ask(server, body, content)

    return list(await asyncio.gather(*map(one, bodies, contents, np.cumsum(gaps).tolist())))


async def ask(server: Server, body: dict[str, Any], content: bytes) -> Timing:
    """One request on a connection of its own; content: its body. Raises RuntimeError for anything but a whole answer."""
    host, _, port = server.url.removeprefix("http://").rpartition(":")
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Length: {len(content)}\r\n\r\n"
    reader, writer = await asyncio.open_connection(host, int(port))
    sent = time.perf_counter()
    writer.write(head.encode() + content)
    answer, first, last = bytearray(), math.nan, math.nan
    while data := await reader.read(1 << 16):
        last = time.perf_counter() - sent
        answer += data
        if math.isnan(first) and _MARK in answer:
            first = last
    writer.close()
    whole = b'"finish_reason": "length"' if body["stream"] else b'"finish_reason":"length"'
    if not answer.startswith(b"HTTP/1.1 200") or whole not in answer:
        raise RuntimeError(f"no whole answer: {bytes(answer[:500])!r}")
    return Timing(sent, last if math.isnan(first) else first, last, body["max_tokens"])
