"""Steps with prompts in buckets, without a GPU: graphs compute anew when they are replayed, on what lies in their inputs.

Oracle: the attention op's reference over the step as it is. Slots of the cache that nobody wrote, and rows that nobody
computes, hold NaN.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trtc.bench.provenance import ROOT
from trtc.core.dtypes import DType
from trtc.core.ops import ReferenceContext, get_op
from trtc.core.plugin_registry import plugins
from trtc.core.targets.base import CacheShape
from trtc.core.targets.cuda.program import ContextRows, CudaProgram, DecodeRows
from trtc.kernels.append_kv.reference import append_kv
from trtc.kernels.context_attention.reference import context_attention
from trtc.kernels.paged_decode_attention.reference import paged_decode_attention
from trtc.runtime.cuda_executor import CudaExecutor
from trtc.runtime.graph_pool import GraphPool
from trtc.runtime.prompt_graphs import (
    BYTES_PER_S,
    DECODES,
    FLOPS_PER_S,
    GPU_SHARE,
    INSTRUCTION_S,
    ROWS,
    PromptGraphs,
    StepTimes,
    prompt_buckets,
)
from trtc.runtime.prompt_rows import Bucket, PromptRows, launch_prompts, send
from trtc.runtime.step_input import StepInput
from trtc.tests.engine_steps import step_input
from trtc.tests.opt_models import hf_config_fields
from trtc.tests.packed_steps import PagedSequences
from trtc.tests.tolerances import FLOAT64_ABS, max_error

VOCAB, POSITIONS, PAGE_SIZE, NUM_PAGES, HEADS, HEAD_DIM = 13, 64, 4, 256, 2, 4
PAGES = POSITIONS // PAGE_SIZE
SCALE = 0.5
CPU = torch.device("cpu")
SMALL = prompt_buckets(128, 9)
SLOW_HOST = StepTimes(host=1.0, row=0.0, cached_token=0.0)


class Model:
    """`CudaProgram`: embeddings, a layer of attention by the kernels' references, and a head."""

    def __init__(self) -> None:
        random = torch.Generator().manual_seed(3)

        def weight(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=random, dtype=torch.float64)

        width = HEADS * HEAD_DIM
        self._tokens, self._positions = weight(VOCAB, width), weight(POSITIONS, width)
        self._qkv, self._head = weight(width, 3 * width), weight(width, VOCAB)
        shape = (NUM_PAGES, HEADS, PAGE_SIZE, HEAD_DIM)
        self.cache = [torch.full(shape, float("nan"), dtype=torch.float64) for _ in range(2)]
        self.other_cache = [part.transpose(1, 2).clone() for part in self.cache]

    def prefill(
        self, inputs: dict[str, torch.Tensor], decode: DecodeRows | None, context: ContextRows | None
    ) -> torch.Tensor:
        q, k, v = self._projected(inputs["token_ids"], inputs["positions"])
        out = torch.full_like(q, float("nan"))
        count = 0
        if decode is not None:
            count = decode.count
            new, place = (k[:count], v[:count]), (decode.page_table, decode.kv_length)
            out[:count] = paged_decode_attention(q[:count], *new, *self.cache, *place, scale=SCALE)
            used = int((decode.kv_length > 0).sum())
            self._append(*new, torch.arange(count + 1).clamp(max=used), decode.kv_length, decode.page_table)
        if context is not None:
            rows, place = (
                (q[count:], k[count:], v[count:]),
                (context.query_start, context.kv_length, context.page_table),
            )
            used = int(context.query_start[-1])
            out[count : count + used] = context_attention(*rows, *self.cache, *place, scale=SCALE)[:used]
            self._append(*rows[1:], *place)
        return out.flatten(1)[inputs["logits_index"].long()] @ self._head

    def expected(self, step: StepInput) -> torch.Tensor:
        """The logits of a step by the op's reference, over a cache of its own."""
        given = [torch.from_numpy(array) for array in (step.query_start, step.kv_length, step.page_table)]
        q, k, v = self._projected(torch.from_numpy(step.token_ids), torch.from_numpy(step.positions))
        attention, attrs = get_op("attention").reference, {"layer": 0, "scale": SCALE}
        out = attention(ReferenceContext([tuple(self.other_cache)]), attrs, q, k, v, *given)
        logits: torch.Tensor = out.flatten(1)[torch.from_numpy(step.logits_index).long()] @ self._head
        return logits

    def check_cache(self) -> None:
        for ours, other in zip(self.cache, self.other_cache, strict=True):
            assert max_error(ours.transpose(1, 2).nan_to_num(1e9), other.nan_to_num(1e9)) <= FLOAT64_ABS

    def _projected(self, token_ids: torch.Tensor, positions: torch.Tensor) -> list[torch.Tensor]:
        x = self._tokens[token_ids.long()] + self._positions[positions.long()]
        return [part.view(-1, HEADS, HEAD_DIM) for part in (x @ self._qkv).chunk(3, -1)]

    def _append(self, k: torch.Tensor, v: torch.Tensor, *place: torch.Tensor) -> None:
        self.cache = list(append_kv(k, v, *self.cache, *place))


class Pool:
    """`GraphPool`: what is captured runs when it is replayed."""

    device = CPU

    def __init__(self) -> None:
        self.captured = 0
        self.is_full = False

    def capture(self, run: Callable[[], torch.Tensor]) -> Any:
        if self.is_full:
            raise torch.OutOfMemoryError
        self.captured += 1
        return SimpleNamespace(replay=run), None


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *sizes, pin_memory=False, **more: empty(*sizes, **more))


def graphs_of(
    model: Model, pool: Pool, buckets: tuple[Bucket, ...] = SMALL, times: StepTimes = SLOW_HOST
) -> PromptGraphs:
    return PromptGraphs(cast(CudaProgram, model), cast(GraphPool, pool), buckets, times, PAGES)


def some_tokens(count: int, seed: int) -> list[int]:
    return [(seed + 5 * index) % VOCAB for index in range(count)]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(1, 30), max_size=3), min_size=1, max_size=6), st.integers(0, 3))
def test_a_padded_step_does_what_the_step_does(new: list[list[int]], chunks: int) -> None:
    """Prompts beside continued ones and beside sequences that decode, whose tokens only the device knows."""
    model, pool, sequences = Model(), Pool(), PagedSequences(PAGE_SIZE, NUM_PAGES)
    graphs = graphs_of(model, pool)
    while graphs.prepare():
        pass
    assert pool.captured == len(SMALL) and all(part.isnan().all() for part in model.cache)
    old: list[str] = []
    for number, lengths in enumerate(new):
        running = old[-8:]
        work = {name: some_tokens(1, number) for name in running[chunks:]}
        work |= {name: some_tokens(2 + number, 1) for name in running[:chunks]}
        work |= {f"{number}.{index}": some_tokens(length, number) for index, length in enumerate(lengths)}
        if not work:
            continue
        old += [name for name in work if name not in old]
        step = step_input(sequences.step(work, last_rows_only=True))
        rows = PromptRows.of(step)
        decodes = len(rows.decode_length)
        tokens = torch.from_numpy(rows.token_ids[:decodes].copy())
        rows.token_ids[:decodes] = -1
        logits = graphs.run(rows, (torch.arange(decodes), tokens))
        rows.token_ids[:decodes] = tokens
        expected = model.expected(step)
        if logits is None:
            assert not any(bucket.holds(rows) for bucket in SMALL)
            logits = launch_prompts(cast(CudaProgram, model), send(rows, CPU))
        assert max_error(logits, expected) <= FLOAT64_ABS
        model.check_cache()
    assert pool.captured == len(SMALL)


def test_steps_of_exact_sizes_are_launched_as_they_are() -> None:
    """Chunks, decodes, and a step without wanted logits."""
    model, sequences = Model(), PagedSequences(PAGE_SIZE, NUM_PAGES)
    for work in (
        {"a": some_tokens(9, 0), "b": some_tokens(1, 2)},
        {"b": [3], "a": [4]},
        {"b": [1], "a": some_tokens(7, 3), "c": [5]},
    ):
        step = step_input(sequences.step(work, last_rows_only=True))
        found = launch_prompts(cast(CudaProgram, model), send(PromptRows.of(step), CPU))
        assert max_error(found, model.expected(step)) <= FLOAT64_ABS
        model.check_cache()


def step_of(lengths: list[int], wanted: int) -> PromptRows:
    """Of sequences with so many new tokens, the first `wanted` rows of which want logits."""
    ends = np.cumsum(lengths, dtype=np.int32)
    zeros = np.zeros(ends[-1], np.int32)
    return PromptRows.of(
        StepInput(
            token_ids=zeros,
            positions=zeros,
            query_start=np.array([0, *ends], np.int32),
            kv_length=np.array(lengths, np.int32),
            page_table=np.zeros((len(lengths), 2), np.int32),
            logits_index=np.arange(wanted, dtype=np.int32),
        )
    )


@pytest.mark.parametrize(
    ("lengths", "wanted", "bucket"),
    [
        ([64], 1, Bucket(64, 0)),
        ([65], 1, Bucket(128, 0)),
        ([1, 56], 2, Bucket(64, 8)),
        ([1, 57], 2, Bucket(128, 8)),
        ([1] * 9 + [500], 10, Bucket(640, 32)),
        ([10] * 3, 3, Bucket(128, 0)),  # short prompts: there is no room for three in 64 tokens
        ([1] * 128 + [128], 129, Bucket(256, 128)),
        ([1] * 129 + [128], 129, None),
        ([1, 1023], 2, None),
        ([1024], 1, Bucket(1024, 0)),
        ([40, 1, 5], 3, Bucket(128, 0)),  # what decodes behind a prompt counts as one
        ([60], 60, Bucket(256, 128)),  # every logit is wanted, as where prompts are scored
        ([200], 200, None),
    ],
)
def test_the_smallest_bucket_that_holds_a_step(
    lengths: list[int], wanted: int, bucket: Bucket | None
) -> None:
    rows = step_of(lengths, wanted)
    assert next((one for one in prompt_buckets(4096, 512) if one.holds(rows)), None) == bucket


def test_buckets_are_those_that_an_engine_may_need() -> None:
    assert prompt_buckets(100, 1) == (Bucket(64, 0), Bucket(128, 0))
    assert prompt_buckets(128, 9) == tuple(Bucket(*sizes) for sizes in ((64, 0), (64, 8), (128, 0), (128, 8)))
    largest = prompt_buckets(1 << 20, 1024)
    assert largest[-1] == (ROWS[-1], DECODES[-1])
    assert len(largest) == len(set(largest)) == len(ROWS) * len(DECODES) - 2


def test_expected_times_are_those_of_weights_and_cache() -> None:
    """Oracle: sizes, by hand. What follows the last attention is not for every token, nor are embeddings products."""
    config = {**hf_config_fields("cuda_pre_norm"), "architectures": ["OPTForCausalLM"], "model_type": "opt"}
    family = plugins().family_of(config)
    graph = family.compose(dataclasses.replace(family.config(config), dtype=DType.FLOAT16))
    times = StepTimes.of(graph, CacheShape.of(graph, 16), 100)
    hidden, ffn, layers = (int(config[name]) for name in ("hidden_size", "ffn_dim", "num_hidden_layers"))
    weights = layers * (4 * hidden * hidden + 2 * hidden * ffn)
    assert times.host == pytest.approx(100 * INSTRUCTION_S)
    assert times.row == pytest.approx(2 * weights / FLOPS_PER_S, rel=0.02)
    assert times.cached_token == pytest.approx(layers * 2 * hidden * 2 / BYTES_PER_S)


RESULTS = json.loads((ROOT / "bench/results/h200-prompt-graphs.json").read_text())
SIZES = {"125m": (12, 768), "1.3b": (24, 2048), "2.7b": (32, 2560), "6.7b": (32, 4096)}
"""Layers and hidden size."""


@pytest.mark.parametrize(
    "row", RESULTS["rows"], ids=lambda row: f"{row['model']} {row['decodes']} + {row['prompts']}"
)
def test_steps_are_replayed_where_that_was_measured_to_be_faster(row: dict[str, Any]) -> None:
    """Oracle: times of an H200 with all steps replayed, and all launched."""
    layers, hidden = SIZES[row["model"]]
    times = StepTimes(
        (12 * layers + 6) * INSTRUCTION_S,
        24 * hidden**2 * layers / FLOPS_PER_S,
        4 * hidden * layers / BYTES_PER_S,
    )
    step = step_of([1] * row["decodes"] + row["prompts"], row["decodes"] + len(row["prompts"]))
    bucket = next(bucket for bucket in prompt_buckets(16384, 512) if bucket.holds(step))
    if times.wait_for_host(bucket.rows, row["decodes"] * RESULTS["cached_tokens_per_sequence"]):
        assert row["replayed_ms"] < row["launched_ms"]
    else:
        assert row["replayed_ms"] > 0.95 * row["launched_ms"]


def test_buckets_in_which_the_gpu_is_the_limit_have_no_graphs() -> None:
    model, pool, sequences = Model(), Pool(), PagedSequences(PAGE_SIZE, NUM_PAGES)
    graphs = graphs_of(
        model, pool, times=StepTimes(host=1.0, row=GPU_SHARE / 64, cached_token=GPU_SHARE / 64)
    )
    while graphs.prepare():
        pass
    assert pool.captured == 2  # of 64 rows
    for work, replayed in (
        ({"a": [1] * 20}, True),
        ({"b": [1] * 65}, False),
        ({"a": [2], "c": [1] * 9}, False),  # what decodes takes the rest of the GPU's time
    ):
        rows = PromptRows.of(step_input(sequences.step(work, last_rows_only=True)))
        assert (graphs.run(rows) is not None) == replayed


def test_a_graph_is_captured_when_its_bucket_comes_again() -> None:
    model, pool, sequences = Model(), Pool(), PagedSequences(PAGE_SIZE, NUM_PAGES)
    graphs = graphs_of(model, pool)
    captured = []
    for number, lengths in enumerate(([20], [30], [7], [40, 30], [35, 30])):
        work = {f"{number}.{index}": some_tokens(length, 1) for index, length in enumerate(lengths)}
        logits = graphs.run(PromptRows.of(step_input(sequences.step(work, last_rows_only=True))))
        captured.append((logits is not None, pool.captured))
    assert captured == [(False, 0), (True, 1), (True, 1), (False, 1), (True, 2)]


def test_without_memory_for_a_graph_steps_are_launched() -> None:
    model, pool, sequences = Model(), Pool(), PagedSequences(PAGE_SIZE, NUM_PAGES)
    graphs = graphs_of(model, pool)
    rows = PromptRows.of(step_input(sequences.step({"a": some_tokens(20, 1)}, last_rows_only=True)))
    assert graphs.run(rows) is None
    pool.is_full = True
    assert graphs.run(rows) is None
    pool.is_full = False
    assert graphs.run(rows) is None and not graphs.prepare()


def test_graphs_that_were_captured_serve_when_there_is_no_memory_for_more() -> None:
    model, pool, sequences = Model(), Pool(), PagedSequences(PAGE_SIZE, NUM_PAGES)
    graphs = graphs_of(model, pool)
    assert graphs.prepare()
    few = PromptRows.of(step_input(sequences.step({"a": some_tokens(20, 1)}, last_rows_only=True)))
    assert graphs.run(few) is not None
    pool.is_full = True
    more = PromptRows.of(step_input(sequences.step({"b": some_tokens(100, 1)}, last_rows_only=True)))
    assert graphs.run(more) is None and graphs.run(more) is None
    assert graphs.run(few) is not None and pool.captured == 1


def test_an_executor_launches_what_has_no_graph() -> None:
    """The same logits either way, and what a stage of a pipeline has received never goes into a graph."""
    model, pool, sequences = Model(), Pool(), PagedSequences(PAGE_SIZE, NUM_PAGES)
    executor: Any = object.__new__(CudaExecutor)
    executor._program, executor._device, executor._prompts = model, CPU, graphs_of(model, pool)
    step = step_input(sequences.step({"a": [1], "b": some_tokens(20, 1)}, last_rows_only=True))
    expected = model.expected(step)
    for captured in (0, 1, 1):
        assert max_error(executor._prefill(step), expected) <= FLOAT64_ABS
        assert pool.captured == captured
    executor._prompts = None
    assert max_error(executor._prefill(step), expected) <= FLOAT64_ABS


def test_the_driver_s_own_shortage_of_memory_is_one_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the driver says when it has no room for a graph; another of its errors stays what it is."""

    @contextmanager
    def no_graph(*_: Any, **__: Any) -> Iterator[None]:
        yield
        raise torch.AcceleratorError(message)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", no_graph)
    message = "CUDA error: out of memory"
    with pytest.raises(torch.OutOfMemoryError, match="CUDA error: out of memory"):
        GraphPool(CPU).capture(lambda: torch.zeros(1))
    message = "CUDA error: an illegal memory access was encountered"
    with pytest.raises(torch.AcceleratorError, match="illegal"):
        GraphPool(CPU).capture(lambda: torch.zeros(1))
