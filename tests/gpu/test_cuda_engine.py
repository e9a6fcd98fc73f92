"""Engines of target cuda on a GPU. Oracle: transformers in float32 on the CPU, on the same weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from trtc.core.dtypes import DType
from trtc.core.engine import Engine
from trtc.kernels.launch import architecture
from trtc.runtime.drafting import StepCosts
from trtc.runtime.early_start import BegunEngine, begin_loading
from trtc.runtime.executor import DecodeLoop, GreedyChooser, StepStarter
from trtc.runtime.llm import LLM
from trtc.runtime.load import load_executor
from trtc.runtime.prompt_lookup import PromptLookup
from trtc.runtime.sampling_params import SamplingParams
from trtc.runtime.weight_loading import loading_to_gpu
from trtc.tests.engine_steps import TOKENS, engine_logits, step_input
from trtc.tests.opt_models import CUDA_VARIANTS, OptCheckpoint, hf_logits, save_hf
from trtc.tests.packed_steps import PagedSequences, Reference
from trtc.tests.prompt_steps import check_prompt_graphs
from trtc.tests.tolerances import logits_tolerance, max_error

pytestmark = pytest.mark.gpu
GREEDY = SamplingParams(max_tokens=48, temperature=0, ignore_eos=True)


def build(variant: str, dtype: DType, folder: Path, **options: object) -> Path:
    checkpoint = OptCheckpoint.open(save_hf(variant, folder / "hf"))
    target_options = {"architectures": [architecture()], **options.pop("target_options", {})}
    return checkpoint.build(
        folder / "engine", dtype=dtype, target="cuda", target_options=target_options, **options
    )


@pytest.mark.parametrize(("threads", "chunk_bytes"), [(1, 1000), (8, 5000), (8, 1 << 20)])
def test_weights_arrive_as_they_are_in_the_files(threads: int, chunk_bytes: int, tmp_path: Path) -> None:
    """Oracle: torch's own copy of the mapped files. Buffers of page-locked memory are filled again many times."""
    engine = Engine.open(build("cuda_pre_norm", DType.FLOAT16, tmp_path))
    device = torch.device("cuda", 0)
    with (
        engine.weight_files(0) as files,
        loading_to_gpu(files, device, threads=threads, chunk_bytes=chunk_bytes) as loaded,
    ):
        pass
    mapped = engine.map_weights(0)
    assert loaded.keys() == mapped.keys()
    for name, tensor in mapped.items():
        assert loaded[name].is_cuda
        assert torch.equal(
            loaded[name].view(-1).view(torch.uint8), tensor.to(device).view(-1).view(torch.uint8)
        ), name


def test_weights_that_come_while_torch_is_imported_are_those_of_the_files(tmp_path: Path) -> None:
    """Oracles: torch's own copy of the mapped files, and the tokens of an engine that was loaded when it was opened."""
    engine_dir = build("cuda_pre_norm", DType.FLOAT16, tmp_path)
    begun = begin_loading(engine_dir)
    assert isinstance(begun, BegunEngine) and begun.weights is not None
    device = torch.device("cuda", 0)
    loaded = begun.weights.tensors(device)
    assert loaded is not None
    mapped = Engine.open(begun).map_weights(0)
    assert loaded.keys() == mapped.keys()
    for name, tensor in mapped.items():
        assert (loaded[name].dtype, loaded[name].shape, loaded[name].is_cuda) == (
            tensor.dtype,
            tensor.shape,
            True,
        )
        assert torch.equal(loaded[name], tensor.to(device)), name
    tokens = []
    for directory in (engine_dir, begin_loading(engine_dir)):
        with LLM(directory) as llm:
            tokens.append([list(o.outputs[0].token_ids) for o in llm.generate([TOKENS[:20], [5]], GREEDY)])
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("dtype", [DType.FLOAT16, DType.BFLOAT16])
@pytest.mark.parametrize("variant", CUDA_VARIANTS)
def test_logits(variant: str, dtype: DType, tmp_path: Path) -> None:
    """One prompt, a prompt with chunks, and, from CUDA graphs, several tokens at a time and token by token, agree with
    float32."""
    engine = build(variant, dtype, tmp_path)
    reference = hf_logits(variant, TOKENS)
    tolerance = logits_tolerance(dtype, reference)
    for chunks in ([len(TOKENS)], [33, 36], [33, 3, 20, *[1] * (len(TOKENS) - 56)], [5, 32, 32]):
        error = max_error(engine_logits(engine, TOKENS, chunks), reference)
        assert error <= tolerance, f"chunks {chunks[:3]}: {error} > {tolerance}"


@pytest.mark.parametrize("dtype", [DType.FLOAT16, DType.BFLOAT16])
def test_all_positions_of_opt(dtype: DType, tmp_path: Path) -> None:
    """2,048 of them, in prompts and up to the last single token: as float32 has them, and finite."""
    tokens = torch.randint(3, 96, (2048,), generator=torch.Generator().manual_seed(1)).tolist()
    engine = build(
        "positions_2048", dtype, tmp_path, max_input_len=2047, max_seq_len=2048, max_num_tokens=2048
    )
    reference = hf_logits("positions_2048", tokens)
    for chunks in ([2048], [1000, 1040, *[1] * 8]):
        logits = engine_logits(engine, tokens, chunks)
        assert logits.isfinite().all()
        assert max_error(logits, reference) <= logits_tolerance(dtype, reference), f"chunks {chunks[:2]}"


@pytest.mark.parametrize("fmha", ["disable", "enable", "fp32_acc"])
def test_context_attention_modes(fmha: str, tmp_path: Path) -> None:
    engine = build("cuda_pre_norm", DType.FLOAT16, tmp_path, target_options={"context_fmha": fmha})
    reference = hf_logits("cuda_pre_norm", TOKENS)
    error = max_error(engine_logits(engine, TOKENS, [33, 36]), reference)
    assert error <= logits_tolerance(DType.FLOAT16, reference)


@pytest.mark.parametrize("dtype", [DType.FLOAT16, DType.BFLOAT16])
@pytest.mark.parametrize("variant", CUDA_VARIANTS)
def test_steps_with_prompts_in_cuda_graphs(variant: str, dtype: DType, tmp_path: Path) -> None:
    """Oracle: the graph in float64."""
    engine = build(variant, dtype, tmp_path, max_batch_size=8)
    checkpoint = OptCheckpoint.open(tmp_path / "hf")
    graph, source = checkpoint.family.compose(checkpoint.config), checkpoint.weights()
    weights = {node.name: source.read(0, node.name).double() for node in graph.weights}
    check_prompt_graphs(
        engine,
        lambda *sizes: Reference(graph, weights, *sizes).run,
        lambda expected: logits_tolerance(dtype, expected),
    )


def test_a_prompt_has_the_tokens_of_its_launches(tmp_path: Path) -> None:
    """With CUDA graphs for steps with prompts, captured the second time, and without: equal but where two logits are."""
    variant = "cuda_pre_norm"
    engine = build(variant, DType.FLOAT16, tmp_path, max_batch_size=8)
    prompts = [list(range(3, 3 + size)) for size in (9, 33, 16, 57, 64, 5)]
    params = replace(GREEDY, max_tokens=8)
    found = []
    with LLM(engine, enable_prefix_cache=False) as llm:
        for _ in range(3):
            found.append([list(llm.generate([p], params)[0].outputs[0].token_ids) for p in prompts])
        assert len(llm.core.executor._prompts._graphs) == 1, "64 tokens and no sequence beside them"
        llm.core.executor._prompts = None
        found.append([list(llm.generate([p], params)[0].outputs[0].token_ids) for p in prompts])
    for tokens in found:
        assert_follows_the_reference(variant, prompts, tokens)
    assert found[1] == found[2]
    same = sum(map(list.__eq__, found[2], found[3]))
    assert same >= len(prompts) - 1, found


def test_batched_tokens_follow_the_reference(tmp_path: Path) -> None:
    """Greedy tokens of prompts of different length, run ahead in CUDA graphs: each is, by the float32 logits for what
    came before it, the best token or within the type's error of it."""
    variant = "cuda_pre_norm"
    engine = build(variant, DType.FLOAT16, tmp_path, max_batch_size=8)
    prompts = [list(range(3, 3 + size)) for size in (9, 1, 33, 16, 2, 57, 64, 5, 12, 31)]
    with LLM(engine) as llm:
        assert isinstance(llm.core.executor, DecodeLoop)
        together = [list(o.outputs[0].token_ids) for o in llm.generate(prompts, GREEDY)]
        alone = [list(llm.generate([p], GREEDY)[0].outputs[0].token_ids) for p in prompts[:3]]
    assert_follows_the_reference(variant, prompts, together)
    first_difference = [next((i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), None)
                        for x, y in zip(together, alone, strict=False)]  # fmt: skip
    print("first token that differs, batched against alone:", first_difference)


@pytest.mark.parametrize("prepared", [False, True])
def test_a_crowd_follows_the_reference(
    prepared: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More sequences than run at once, prompts in pieces: steps begin before the tokens of the one before are known.

    prepared: all CUDA graphs are there before; else those of steps with prompts come while they are used.
    """
    variant = "cuda_pre_norm"
    engine = build(variant, DType.FLOAT16, tmp_path, max_batch_size=40, max_num_tokens=128)
    prompts = [
        list(range(3 + index % 7, 3 + index % 7 + size)) for index, size in enumerate([9, 1, 57, 30] * 20)
    ]
    params = [replace(GREEDY, max_tokens=3 + index % 14) for index in range(len(prompts))]
    started: list[int] = []
    with LLM(engine) as llm:
        executor = llm.core.executor
        assert isinstance(executor, StepStarter)
        while prepared and executor.prepare():
            pass
        start = executor.start_step
        monkeypatch.setattr(
            executor,
            "start_step",
            lambda step, source: (started.append(source is None), start(step, source))[1],
        )
        outputs = [list(o.outputs[0].token_ids) for o in llm.generate(prompts, params)]
    assert [len(tokens) for tokens in outputs] == [3 + index % 14 for index in range(len(prompts))]
    assert len(started) - sum(started) >= 10, "steps that took tokens over from the one before"
    assert_follows_the_reference(variant, prompts, outputs)


def assert_follows_the_reference(variant: str, prompts: list[list[int]], outputs: list[list[int]]) -> None:
    """Each token is, by the float32 logits for what came before it, the best or within the type's error of it."""
    agreed = 0
    for prompt, new in zip(prompts, outputs, strict=True):
        logits = hf_logits(variant, prompt + new)[len(prompt) - 1 : -1]
        chosen = logits[torch.arange(len(new)), torch.tensor(new)]
        assert (logits.max(-1).values - chosen).max() <= 2 * logits_tolerance(DType.FLOAT16, logits)
        agreed += int((logits.argmax(-1) == torch.tensor(new)).sum())
    assert agreed >= 0.97 * sum(map(len, outputs))


def test_prompt_lookup_follows_the_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guesses for prompts of different length, verified in CUDA graphs beside sequences without a guess. Each token is, by the
    float32 logits for what came before it, the best or within the type's error of it."""
    # No step costs more than another, so that all guesses are tried.
    monkeypatch.setattr(StepCosts, "plain", lambda *_: 1.0)
    monkeypatch.setattr(StepCosts, "of", lambda *_: lambda drafted: 1.0)
    variant = "cuda_pre_norm"
    engine = build(variant, DType.FLOAT16, tmp_path, max_batch_size=8)
    prompts = [list(range(3, 3 + size)) for size in (9, 1, 33, 16, 2, 57, 64, 5, 12, 31)]
    params = replace(GREEDY, prompt_lookup=PromptLookup(1, 4))
    with LLM(engine) as llm:
        assert isinstance(llm.core.executor, GreedyChooser)
        plain = [list(o.outputs[0].token_ids) for o in llm.generate(prompts, GREEDY)]
        looked = [list(o.outputs[0].token_ids) for o in llm.generate(prompts, params)]
        stats = llm.core.lookup_stats
    assert stats.proposed > 100 and 0 < stats.accepted < stats.proposed
    for prompt, new in zip(prompts, looked, strict=True):
        logits = hf_logits(variant, prompt + new)[len(prompt) - 1 : -1]
        chosen = logits[torch.arange(len(new)), torch.tensor(new)]
        assert (logits.max(-1).values - chosen).max() <= 2 * logits_tolerance(DType.FLOAT16, logits)
    print(
        "texts that equal those of plain decoding:", sum(map(list.__eq__, plain, looked)), "of", len(prompts)
    )


def test_a_chosen_token_has_the_largest_logit(tmp_path: Path) -> None:
    """Of a prompt, of several tokens of two sequences, and of one of each. Oracle: the logits of the same steps."""
    engine = build("cuda_pre_norm", DType.FLOAT16, tmp_path)
    first, second = load_executor(engine), load_executor(engine)
    sequence = PagedSequences(first.page_size, first.num_pages)
    for work in (
        {"a": TOKENS[:40]},
        {"a": TOKENS[40:45], "b": TOKENS[:7]},
        {"a": [5], "b": [6]},
        {"b": TOKENS[:3], "a": [7]},
    ):
        step = step_input(sequence.step(work))
        assert first.choose(step).tolist() == second.execute(step).argmax(-1).tolist()
    first.close()
    second.close()


def test_sampling_on_the_gpu_is_reproducible(tmp_path: Path) -> None:
    engine = build("cuda_pre_norm", DType.FLOAT16, tmp_path)
    params = SamplingParams(max_tokens=24, temperature=0.8, top_k=20, top_p=0.95, seed=7, ignore_eos=True)
    with LLM(engine) as llm:
        first, second = (llm.generate([TOKENS[:20]], params)[0].outputs[0].token_ids for _ in range(2))
    assert list(first) == list(second)
