"""Times an engine: fixed batches, and a mixed load that arrives all at once. The protocol is that of vLLM's usual scripts:

a batch is run for one token (its time is the prefill) and for `output_len` tokens; the difference, over the tokens between,
is the time of a decode step. Every time is the median of `repeat` runs, all of which are kept.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .. import __version__
from ..core.engine import Engine
from .bench_case import MIXED_INPUT, MIXED_OUTPUT, Case, Load
from .llm import LLM
from .sampling_params import SamplingParams

FIRST_TOKEN_ID = 4
"""Random prompts use ids from here up: below lie special tokens, in most vocabularies."""


def run(llm: LLM, engine: Engine, load: Load) -> Iterator[dict[str, Any]]:
    """Times `load` on `llm`, which runs `engine`; yields one result a case, as JSON values.

    Raises RequestError when the engine is too small for a case.
    """
    load.check_fits(engine.build)
    bandwidth = read_bandwidth()
    yield {"kind": "setup", **setup(engine), "read_bandwidth_gb_s": round(bandwidth / 1e9, 1)}
    rng = np.random.default_rng(load.seed)
    vocab = engine.model.vocab_size

    def prompts(lengths: Sequence[int]) -> list[list[int]]:
        return [rng.integers(FIRST_TOKEN_ID, vocab, n).tolist() for n in lengths]

    fixed = load.fixed()
    timed(llm, prompts([min(64, *(case.input_len for case in fixed), load.input_len)] * 4), [8] * 4)
    for case in fixed:
        batch, lengths = case.batch, [case.input_len] * case.batch
        timed(llm, prompts(lengths), [min(8, case.output_len)] * batch)
        prefill, total = [], []
        for _ in range(load.repeat):
            prefill.append(timed(llm, prompts(lengths), [1] * batch))
            if case.output_len > 1:
                total.append(timed(llm, prompts(lengths), [case.output_len] * batch))
        yield {
            "kind": "batch",
            "batch": batch,
            "in_len": case.input_len,
            "out_len": case.output_len,
            "prefill_s": round(statistics.median(prefill), 6),
            "prefill_all": [round(x, 5) for x in prefill],
            **(_steps(engine, case, bandwidth, prefill, total) if total else {}),
        }
    if load.mixed:
        yield from mixed(llm, load, prompts)


def _steps(
    engine: Engine, case: Case, bandwidth: float, prefill: Sequence[float], total: Sequence[float]
) -> dict[str, Any]:
    """What runs of all tokens tell beside runs of one: the decode step, also as a share of the limit that reading sets."""
    whole = statistics.median(total)
    step = (whole - statistics.median(prefill)) / (case.output_len - 1)
    floor = step_bytes(engine, case.batch, case.input_len + case.output_len // 2) / bandwidth
    return {
        "total_s": round(whole, 6),
        "decode_ms_per_token": round(step * 1e3, 4),
        "decode_percent_of_read_limit": round(100 * floor / step, 1) if step > 0 else None,
        "output_tok_s": round(case.batch * case.output_len / whole, 1),
        "total_all": [round(x, 5) for x in total],
    }


def mixed(llm: LLM, load: Load, prompts: Any) -> Iterator[dict[str, Any]]:
    """The mixed load, submitted at once."""
    inputs, outputs = mixed_lengths(load.mixed, load.seed)
    timed(llm, prompts(inputs[:64]), outputs[:64].tolist())
    for number in range(2):
        seconds = timed(llm, prompts(inputs), outputs.tolist())
        yield {
            "kind": "continuous",
            "run": number,
            "requests": load.mixed,
            "in_tokens": int(inputs.sum()),
            "out_tokens": int(outputs.sum()),
            "total_s": round(seconds, 5),
            "output_tok_s": round(int(outputs.sum()) / seconds, 1),
        }


def mixed_lengths(count: int, seed: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Tokens in and out, MIXED_INPUT and MIXED_OUTPUT, of `count` requests."""
    rng = np.random.default_rng(seed)
    inputs = rng.integers(*MIXED_INPUT, count, endpoint=True)
    return inputs, rng.integers(*MIXED_OUTPUT, count, endpoint=True)


def timed(llm: LLM, prompts: list[list[int]], output_lens: Sequence[int]) -> float:
    """Seconds that greedy generation of exactly `output_lens` tokens takes."""
    params = [SamplingParams(max_tokens=n, temperature=0.0, ignore_eos=True) for n in output_lens]
    start = time.perf_counter()
    results = llm.generate(prompts, params)
    seconds = time.perf_counter() - start
    counts = [len(result.outputs[0].token_ids) for result in results]
    assert counts == list(output_lens), f"asked for {list(output_lens)} tokens, got {counts}"
    return seconds


def step_bytes(engine: Engine, batch: int, context: int) -> int:
    """Bytes that a decode step of `batch` sequences with `context` tokens must move."""
    build = engine.build
    pages = -(-build.max_seq_len // build.page_size)
    sizes = {"T": batch, "B": batch, "B+1": batch + 1, "R": batch, "P": pages, "C": context}
    stages = engine.ranks[:: build.tp_size]  # one after the other
    return sum(part.graph.cost(sizes).bytes for part in stages)


def read_bandwidth() -> float:
    """Bytes a second that this machine moves in a large copy, read and written bytes counted: measured, not looked up."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 1 << 27
    if device == "cuda":
        torch.cuda.empty_cache()
        size = min(1 << 30, torch.cuda.mem_get_info()[0] // 4)  # an engine may leave little
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(5):
        _wait(device)
        start = time.perf_counter()
        target.copy_(source)
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return 2 * source.numel() * 4 / min(seconds)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def setup(engine: Engine) -> dict[str, Any]:
    """What was timed, where, with what versions."""
    model, build = engine.model, engine.build
    found: dict[str, Any] = {
        "trtc": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "target": build.target,
        "dtype": model.dtype.value,
        "hidden": model.hidden_size,
        "layers": model.num_layers,
        "max_batch_size": build.max_batch_size,
        "max_num_tokens": build.max_num_tokens,
        "page_size": build.page_size,
        "threads": torch.get_num_threads(),
        "device": platform.processor() or platform.machine(),
    }
    if torch.cuda.is_available() and build.target != "cpu":
        found |= {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return found
