"""Engines of target cuda whose KV cache holds e4m3 numbers. Oracle: the graph in float64 over such a cache."""

from __future__ import annotations

from pathlib import Path

import pytest
from trtc.core.dtypes import DType
from trtc.kernels.launch import architecture
from trtc.runtime.load import load_executor
from trtc.tests.engine_steps import (
    TOKENS,
    batch_work,
    check_copied_pages,
    check_reproducible,
    engine_logits,
    execute,
)
from trtc.tests.fp8_cache import Fp8CacheEngine
from trtc.tests.opt_models import BUILD, CUDA_VARIANTS
from trtc.tests.packed_steps import PagedSequences
from trtc.tests.prompt_steps import check_prompt_graphs
from trtc.tests.tolerances import LOGITS_FP8_CACHE_RELATIVE, max_error

pytestmark = pytest.mark.gpu


def build(
    variant: str, dtype: DType, folder: Path, fmha: str = "fp32_acc", **options: object
) -> Fp8CacheEngine:
    target = {"architectures": [architecture()], "context_fmha": fmha}
    return Fp8CacheEngine.build(variant, dtype, folder, target="cuda", target_options=target, **options)


def check_chunks(engine: Fp8CacheEngine, dtype: DType, chunks: list[int]) -> None:
    whole = PagedSequences(BUILD.page_size, 16).step({"a": TOKENS})
    expected = engine.reference(BUILD.page_size, 16).run(whole)
    logits = engine_logits(engine.path, TOKENS, chunks)
    error, tolerance = max_error(logits, expected), LOGITS_FP8_CACHE_RELATIVE[dtype]
    assert error <= tolerance * float(expected.abs().max()), f"chunks {chunks[:3]}: {error}"


@pytest.mark.parametrize("dtype", [DType.FLOAT16, DType.BFLOAT16])
@pytest.mark.parametrize("variant", CUDA_VARIANTS)
def test_logits(variant: str, dtype: DType, tmp_path: Path) -> None:
    """One prompt, a prompt with chunks, and, from CUDA graphs, several tokens at a time and token by token."""
    engine = build(variant, dtype, tmp_path)
    for chunks in ([len(TOKENS)], [33, 36], [33, 3, 20, *[1] * (len(TOKENS) - 56)], [5, 32, 32]):
        check_chunks(engine, dtype, chunks)


@pytest.mark.parametrize("fmha", ["disable", "enable"])
def test_context_attention_modes(fmha: str, tmp_path: Path) -> None:
    check_chunks(build("cuda_pre_norm", DType.FLOAT16, tmp_path, fmha), DType.FLOAT16, [33, 36])


def test_batches(tmp_path: Path) -> None:
    """Prompts and decode steps of many sequences at once."""
    engine = build("cuda_pre_norm", DType.FLOAT16, tmp_path, max_batch_size=80, max_num_tokens=240)
    executor = load_executor(engine.path)
    paged = PagedSequences(executor.page_size, executor.num_pages)
    reference = engine.reference(executor.page_size, executor.num_pages)
    for step in range(4):
        inputs = paged.step(batch_work(70, step))
        expected = reference.run(inputs)
        tolerance = LOGITS_FP8_CACHE_RELATIVE[DType.FLOAT16] * float(expected.abs().max())
        assert max_error(execute(executor, inputs), expected) <= tolerance
    executor.close()


def test_steps_with_prompts_in_cuda_graphs(tmp_path: Path) -> None:
    engine = build("cuda_pre_norm", DType.FLOAT16, tmp_path, max_batch_size=8)
    check_prompt_graphs(
        engine.path,
        lambda *sizes: engine.reference(*sizes).run,
        lambda expected: LOGITS_FP8_CACHE_RELATIVE[DType.FLOAT16] * float(expected.abs().max()),
    )


def test_copied_pages(tmp_path: Path) -> None:
    check_copied_pages(build("cuda_pre_norm", DType.FLOAT16, tmp_path).path)


def test_generation_is_reproducible(tmp_path: Path) -> None:
    check_reproducible(build("cuda_pre_norm", DType.FLOAT16, tmp_path).path)
