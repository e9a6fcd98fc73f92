"""Engines of target cuda whose KV cache holds e4m3 numbers. Oracle: the graph in float64 over such a cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from trtc.core.dtypes import DType
from trtc.runtime.llm import LLM
from trtc.runtime.load import load_executor
from trtc.runtime.sampling_params import SamplingParams
from trtc.tests.fp8_cache import Fp8CacheEngine, execute
from trtc.tests.opt_models import BUILD, CUDA_VARIANTS
from trtc.tests.packed_steps import PagedSequences
from trtc.tests.tolerances import LOGITS_FP8_CACHE_RELATIVE, max_error

pytestmark = pytest.mark.gpu
TOKENS = [5, 17, 1, 90, 0, 23, 64, 2, 11, *range(20, 80)]


@pytest.fixture(scope="module", autouse=True)
def needs_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")


def build(
    variant: str, dtype: DType, folder: Path, fmha: str = "fp32_acc", **options: object
) -> Fp8CacheEngine:
    major, minor = torch.cuda.get_device_capability()
    target = {"architectures": [f"sm_{major}{minor}"], "context_fmha": fmha}
    return Fp8CacheEngine.build(variant, dtype, folder, target="cuda", target_options=target, **options)


def check_chunks(engine: Fp8CacheEngine, dtype: DType, chunks: list[int]) -> None:
    whole = PagedSequences(BUILD.page_size, 16).step({"a": TOKENS})
    expected = engine.reference(BUILD.page_size, 16).run(whole)
    executor = load_executor(engine.path)
    sequence = PagedSequences(executor.page_size, executor.num_pages)
    rows, start = [], 0
    for size in chunks:
        rows.append(execute(executor, sequence.step({"a": TOKENS[start : start + size]})))
        start += size
    executor.close()
    error, tolerance = max_error(torch.cat(rows), expected), LOGITS_FP8_CACHE_RELATIVE[dtype]
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
        inputs = paged.step({str(i): [(7 * i + step) % 90, (5 * i) % 90, i % 90][: 3 if step == 0 else 1]
                             for i in range(70)})  # fmt: skip
        expected = reference.run(inputs)
        tolerance = LOGITS_FP8_CACHE_RELATIVE[DType.FLOAT16] * float(expected.abs().max())
        assert max_error(execute(executor, inputs), expected) <= tolerance
    executor.close()


def test_copied_pages(tmp_path: Path) -> None:
    """A sequence goes on from copies of another's pages as that does. Oracle: the logits of the other."""
    executor = load_executor(build("cuda_pre_norm", DType.FLOAT16, tmp_path).path)
    sequence = PagedSequences(executor.page_size, executor.num_pages)
    execute(executor, sequence.step({"a": TOKENS[:30]}))
    step = sequence.step({"a": [7]})
    pages = step["page_table"][0].tolist()
    copies = [page for page in range(executor.num_pages) if page not in pages][: len(pages)]
    executor.copy_pages(pages, copies)
    expected = execute(executor, step)
    step["page_table"][0] = torch.tensor(copies, dtype=torch.int32)
    assert torch.equal(execute(executor, step), expected)
    executor.close()


def test_generation_is_reproducible(tmp_path: Path) -> None:
    """Greedy tokens, run ahead in CUDA graphs, twice."""
    engine = build("cuda_pre_norm", DType.FLOAT16, tmp_path)
    params = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
    runs = []
    for _ in range(2):
        with LLM(engine.path) as llm:
            runs.append(list(llm.generate([TOKENS[:20]], params)[0].outputs[0].token_ids))
    assert runs[0] == runs[1]
