"""The executor of TensorRT plans, without a GPU: the plan is executed by the network interpreter of the tests.

Oracle: greedy tokens of transformers, through the whole `LLM`; an exact copy of what a padded batch may touch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from trtc.core.config import BuildConfig
from trtc.core.dtypes import DType
from trtc.core.engine import Engine, RankPart
from trtc.core.errors import ConfigError, TargetError
from trtc.core.targets.tensorrt.build import profiles
from trtc.core.targets.tensorrt.flavour import Flavour, find_flavour
from trtc.core.targets.tensorrt.lower import LoweringOptions, lower_graph
from trtc.core.targets.tensorrt.network import Network
from trtc.runtime.cache_size import CacheBudget
from trtc.runtime.llm import LLM
from trtc.runtime.load import executor_of
from trtc.runtime.sampling_params import SamplingParams
from trtc.runtime.step_input import StepInput
from trtc.runtime.tensorrt_executor import TensorRTExecutor, cache_slots, limits
from trtc.runtime.tensorrt_session import TensorRTSession, require_gpu
from trtc.runtime.tensorrt_steps import Limits, PaddedBatch, StepPadder
from trtc.tests.core.targets.tensorrt_opt import Rank, ranks_of
from trtc.tests.opt_models import OptCheckpoint, hf_model
from trtc.tests.trt_interpreter import NetworkInterpreter

Checkpoints = Callable[[str], OptCheckpoint]
BUILD = BuildConfig(target="tensorrt", max_batch_size=3, max_input_len=24, max_seq_len=40, max_num_tokens=48)
GREEDY = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)


class InterpretedSession:
    """A `PlanSession` over the network definition. It keeps the rules of the plan that it stands for."""

    def __init__(self, lowered: Network, num_slots: int, allowed: Limits) -> None:
        self.lowered = lowered  # keeps the constants' memory
        network = NetworkInterpreter(lowered.definition, lowered.trt)
        self.network, self.allowed, self.batches = network, allowed, list[PaddedBatch]()
        self.caches = {
            t.name: torch.zeros(num_slots, *tuple(t.shape)[1:])
            for t in network.inputs
            if t.name.startswith(("k_cache.", "v_cache."))
        }

    def run(self, batch: PaddedBatch) -> torch.Tensor:
        self.batches.append(batch)
        rows, width = batch.token_ids.shape
        most, tokens = {
            "decode": (self.allowed.decode_rows, 1),
            "prefill": (self.allowed.prefill_rows, self.allowed.prefill_tokens),
        }[batch.profile]
        assert 1 <= rows <= most and 1 <= width <= tokens and 1 <= len(batch.logits_index) <= most
        assert (batch.past_length + width <= self.allowed.capacity).all()
        part = batch.cache_rows
        feed = {name: torch.from_numpy(array) for name, array in batch.inputs.items()}
        outputs = self.network.run({**feed, **{name: cache[part] for name, cache in self.caches.items()}})
        for name, cache in self.caches.items():
            cache[part] = outputs[f"{name}.updated"]
        return outputs[self.network.outputs[-1]]

    def close(self) -> None:
        self.caches.clear()


def engine_of(checkpoint: OptCheckpoint, rank: Rank, build: BuildConfig) -> Engine:
    """What an engine directory would say; its plan is not made."""
    artifacts = {"plan": "rank0.plan", "flavour": "tensorrt_rtx", "version": "1.7", "compute_capabilities": ["8.9"],
                 "plugins": [], "profiles": [profile.to_json() for profile in profiles(build)]}  # fmt: skip
    return Engine(Path("engine"), checkpoint.config, build, (RankPart(rank.graph, (), artifacts),), {}, "0")


def executor(
    checkpoint: OptCheckpoint, build: BuildConfig = BUILD
) -> tuple[TensorRTExecutor, InterpretedSession]:
    pytest.importorskip("tensorrt_rtx")
    (rank,) = ranks_of(checkpoint)
    options = LoweringOptions(kv_capacity=build.max_seq_len)
    network = lower_graph(rank.graph, rank.weights, find_flavour("tensorrt_rtx"), options)
    engine = engine_of(checkpoint, rank, build)
    slots = cache_slots(engine)
    session = InterpretedSession(network, slots, limits(engine))
    return TensorRTExecutor(engine, session, slots), session


def hf_greedy(variant: str, prompt: list[int], count: int) -> list[int]:
    text = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            text.append(int(hf_model(variant)(torch.tensor([text])).logits[0, -1].argmax()))
    return text[len(prompt) :]


@pytest.mark.tensorrt_rtx
@pytest.mark.parametrize("variant", ["pre_norm", "post_norm_projected"])
def test_tokens_through_the_whole_runtime_equal_transformers(
    variant: str, opt_checkpoint: Checkpoints
) -> None:
    """More requests than rows, of lengths that leave holes, chunks and waves, one of them to the end of its row."""
    runner, session = executor(opt_checkpoint(variant))
    prompts = [[7], list(range(2, 26)), [3, 1, 4, 1, 5], list(range(40, 62)), [9, 9]]
    params = [replace(GREEDY, max_tokens=count) for count in (3, 16, 8, 5, 12)]
    llm = LLM.from_executor(runner)
    outputs = llm.generate(prompts, params)
    for prompt, one, output in zip(prompts, params, outputs, strict=True):
        assert one.max_tokens is not None
        assert output.outputs[0].token_ids == hf_greedy(variant, prompt, one.max_tokens)
    assert max(len(batch.past_length) for batch in session.batches if batch.profile == "decode") == 3
    assert not any(batch.first_row for batch in session.batches if batch.profile == "decode")
    llm.core.check_integrity()
    llm.close()
    assert not session.caches


@pytest.mark.tensorrt_rtx
def test_prompt_logprobs_need_more_rows_than_a_batch_gives(opt_checkpoint: Checkpoints) -> None:
    runner, session = executor(opt_checkpoint("pre_norm"))
    prompt = [5, 6, 7, 8, 9, 10, 11]
    (output,) = LLM.from_executor(runner).generate([prompt], replace(GREEDY, max_tokens=1, prompt_logprobs=0))
    with torch.no_grad():
        expected = hf_model("pre_norm")(torch.tensor([prompt])).logits[0].log_softmax(-1)
    assert output.prompt_logprobs is not None
    found = [
        entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], prompt[1:], strict=True)
    ]
    assert found == pytest.approx([float(expected[i, t]) for i, t in enumerate(prompt[1:])], abs=1e-4)
    assert len(session.batches) > 2


LIMITS = Limits(decode_rows=4, prefill_rows=2, prefill_tokens=4, capacity=16)


def step_of(*sequences: tuple[int, int, list[int]], wanted: list[int]) -> StepInput:
    """Sequences as (slot, tokens in the cache, new tokens)."""
    counts = [len(tokens) for _, _, tokens in sequences]
    return StepInput(
        token_ids=np.array([t for _, _, tokens in sequences for t in tokens], np.int32),
        positions=np.concatenate([np.arange(p, p + len(t)) for _, p, t in sequences]).astype(np.int32),
        query_start=np.cumsum([0, *counts]).astype(np.int32),
        kv_length=np.array([past + len(tokens) for _, past, tokens in sequences], np.int32),
        page_table=np.array([[slot] for slot, _, _ in sequences], np.int32),
        logits_index=np.array(wanted, np.int32),
    )


def test_decodes_run_from_row_0_and_idle_rows_write_behind_their_sequence() -> None:
    padder = StepPadder(LIMITS, 4)
    list(padder.batches(step_of((1, 0, [5, 6, 7]), wanted=[])))
    (batch,) = padder.batches(step_of((2, 9, [8]), (0, 3, [4]), wanted=[0, 1]))
    assert (batch.profile, batch.first_row) == ("decode", 0)
    assert batch.token_ids.tolist() == [[4], [0], [8], [0]]
    assert batch.past_length.tolist() == [3, 3, 9, 0]
    assert batch.positions.tolist() == [[3], [3], [9], [0]]
    assert batch.logits_index.tolist() == [0, 2, 0, 0]
    assert batch.results.tolist() == [1, 0]


def test_a_row_that_is_full_belongs_to_nobody() -> None:
    padder = StepPadder(LIMITS, 4)
    list(padder.batches(step_of((0, 15, [1]), wanted=[0])))
    (batch,) = padder.batches(step_of((1, 2, [7]), wanted=[0]))
    assert batch.past_length.tolist() == [0, 2]


def test_decode_batches_have_few_sizes() -> None:
    """Powers of two, or all rows: every size has an execution context and a CUDA graph of its own."""
    wide = Limits(decode_rows=6, prefill_rows=2, prefill_tokens=4, capacity=16)
    sizes = [
        (len(batch.past_length), len(batch.logits_index))
        for slot in range(6)
        for batch in StepPadder(wide, 6).batches(step_of((slot, 1, [7]), wanted=[0]))
    ]
    assert sizes == [(1, 1), (2, 2), (4, 4), (4, 4), (6, 6), (6, 6)]


def test_prompts_run_with_neighbours_that_fit() -> None:
    """Rows 0, 1 | 2 (the batch is full) | 4 (no neighbour); the wide one of row 1 does not fit behind row 0's 14 tokens."""
    padder = StepPadder(LIMITS, 5)
    step = step_of((0, 0, [1, 2]), (1, 0, [3, 4, 5]), (2, 0, [6, 7]), (4, 0, [8, 9]), wanted=[1, 4, 8])
    batches = list(padder.batches(step))
    assert [(b.profile, b.first_row, len(b.past_length)) for b in batches] == [
        ("prefill", 0, 2), ("prefill", 2, 1), ("prefill", 4, 1),
    ]  # fmt: skip
    assert batches[0].token_ids.tolist() == [[1, 2, 0], [3, 4, 5]]
    assert batches[0].logits_index.tolist() == [1, 5]
    assert batches[1].logits_index.tolist() == [0] and not len(batches[1].results)
    near_end = step_of((0, 14, [1, 2]), (1, 0, [3, 4, 5]), wanted=[])
    assert [b.first_row for b in padder.batches(near_end)] == [0, 1]


def test_long_prompts_run_in_waves() -> None:
    batches = list(StepPadder(LIMITS, 2).batches(step_of((1, 2, [1, 2, 3, 4, 5, 6]), wanted=[2, 5])))
    assert [b.past_length.tolist() for b in batches] == [[2], [6]]
    assert [b.token_ids.tolist() for b in batches] == [[[1, 2, 3, 4]], [[5, 6]]]
    assert [b.logits_index.tolist() for b in batches] == [[2], [1]]
    assert [b.results.tolist() for b in batches] == [[0], [1]]


RTX = Flavour(
    "tensorrt_rtx", None, "1.7", ("8.0", "8.9"), plugins=False, native_attention=True, timing_cache=False
)


@pytest.mark.parametrize(
    ("planned", "found", "message"),
    [
        ([], "9.0", "compute capability 8.0, 8.9; this GPU has 9.0: build with --target cuda"),
        (["8.9"], "8.0", "compute capability 8.9; this GPU has 8.0: build with --target cuda"),
        (["8.9"], None, "compute capability 8.9; this machine has no GPU that torch can use: build with --target cpu"),
    ],
)  # fmt: skip
def test_refused_gpus_are_told_what_to_do(planned: list[str], found: str | None, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        require_gpu(Path("engine"), RTX, planned, found)


def test_accepted_gpus() -> None:
    require_gpu(Path("engine"), RTX, ["8.9"], "8.9")
    require_gpu(Path("engine"), replace(RTX, compute_capabilities=()), [], "9.0")


@pytest.mark.tensorrt_rtx
@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without a GPU")
def test_loading_without_a_gpu_is_refused(opt_checkpoint: Checkpoints) -> None:
    pytest.importorskip("tensorrt_rtx")
    checkpoint = opt_checkpoint("pre_norm")
    engine = engine_of(checkpoint, ranks_of(checkpoint, DType.FLOAT16)[0], BUILD)
    with pytest.raises(TargetError, match="no GPU that torch can use: build with --target cpu"):
        executor_of(engine)


def test_kv_memory(opt_checkpoint: Checkpoints) -> None:
    checkpoint = opt_checkpoint("pre_norm")
    engine = engine_of(checkpoint, ranks_of(checkpoint)[0], BUILD)
    row = 2 * 2 * 40 * 64 * 4  # k and v of two layers, float32
    budgets = (CacheBudget(memory_bytes=memory) for memory in (row, 2 * row, 9 * row, None))
    assert [cache_slots(engine, budget) for budget in budgets] == [1, 2, 3, 3]
    with pytest.raises(
        ConfigError, match=f"cannot hold one sequence of max_seq_len 40: .* {row} bytes for each"
    ):
        cache_slots(engine, CacheBudget(memory_bytes=row - 1))


@pytest.mark.parametrize("accepted", [True, False])
def test_every_context_gets_the_communicator_of_the_ranks(accepted: bool) -> None:
    """Of the profile that it is for. Oracle: by hand; a context that refuses it says so with TensorRT's reason."""
    seen: list[Any] = []

    def set_communicator(capsule: Any) -> bool:
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
        seen.append(pointer(capsule, None))
        return accepted

    context = SimpleNamespace(
        set_optimization_profile_async=lambda index, stream: seen.append(index),
        set_device_memory=lambda address, size: seen.append(size),
        set_communicator=set_communicator,
    )
    session = TensorRTSession.__new__(TensorRTSession)
    vars(session).update(
        _trt=SimpleNamespace(ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED=1)),
        _plan=SimpleNamespace(create_execution_context=lambda strategy: context),
        _artifacts={"profiles": [{"name": "decode"}, {"name": "prefill"}]},
        _stream=SimpleNamespace(cuda_stream=0), _memory=torch.empty(64, dtype=torch.uint8),
        _group=SimpleNamespace(nccl_communicator=lambda: 0xABCDEF),
        _path=Path("rank1.plan"), _log=SimpleNamespace(reasons=lambda: "ranks differ"),
    )  # fmt: skip
    if accepted:
        assert session._context("prefill") is context
    else:
        with pytest.raises(TargetError, match=r"rank1.plan: the communicator .* is refused: ranks differ"):
            session._context("prefill")
    assert seen == [1, 64, 0xABCDEF]
