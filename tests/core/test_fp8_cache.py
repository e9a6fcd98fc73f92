"""KV caches of e4m3 numbers: what a build accepts, and engines of target cpu. Oracle: the graph in float64 over such a one."""

from __future__ import annotations

from pathlib import Path

import pytest
from trtc.core.config import BuildConfig
from trtc.core.dtypes import DType
from trtc.core.engine import Engine
from trtc.core.errors import ConfigError, ShapeError
from trtc.core.graph import make_node
from trtc.core.passes.cache import cache_type
from trtc.core.targets.base import CacheShape
from trtc.core.targets.cuda.code import kernel_sources, read_code
from trtc.runtime.benchmark import step_bytes
from trtc.runtime.load import load_executor
from trtc.tests.engine_steps import TOKENS, check_copied_pages, engine_logits
from trtc.tests.fp8_cache import Fp8CacheEngine
from trtc.tests.opt_models import BUILD, OptCheckpoint, save_hf
from trtc.tests.packed_steps import PagedSequences
from trtc.tests.tolerances import LOGITS_FP8_CACHE_RELATIVE, max_error
from trtc.tests.toy_decoder import toy_decoder


@pytest.mark.parametrize("dtype", [DType.FLOAT32, DType.FLOAT16])
def test_engines_of_target_cpu(dtype: DType, tmp_path: Path) -> None:
    """A prompt, a chunk, and token by token; a cache without rounding is further away than the tolerance."""
    engine = Fp8CacheEngine.build("bias_free_non_affine_gelu", dtype, tmp_path)
    whole = PagedSequences(BUILD.page_size, 16).step({"a": TOKENS})
    expected, exact = (
        engine.reference(BUILD.page_size, 16, rounds=rounds).run(whole) for rounds in (True, False)
    )
    tolerance = LOGITS_FP8_CACHE_RELATIVE[dtype] * float(expected.abs().max())
    assert max_error(exact, expected) > LOGITS_FP8_CACHE_RELATIVE[DType.FLOAT32] * float(expected.abs().max())
    chunks = [20, 20, *[1] * (len(TOKENS) - 40)]
    assert max_error(engine_logits(engine.path, TOKENS, chunks), expected) <= tolerance


def test_copied_pages(tmp_path: Path) -> None:
    check_copied_pages(Fp8CacheEngine.build("pre_norm", DType.FLOAT32, tmp_path).path)


def test_an_engine_counts_the_bytes_of_its_cache(tmp_path: Path) -> None:
    """Oracle: by hand. What a step reads of the cache is half of float16's, and so is a page."""
    checkpoint = OptCheckpoint.open(save_hf("pre_norm", tmp_path / "hf"))
    half, fp8 = (
        Engine.open(checkpoint.build(tmp_path / name, dtype=DType.FLOAT16, kv_cache_dtype=name))
        for name in ("auto", "fp8")
    )
    shapes = [CacheShape.of(engine.ranks[0].graph, BUILD.page_size) for engine in (half, fp8)]
    assert shapes[0].bytes_per_page == 2 * shapes[1].bytes_per_page
    context, batch = 100, 3
    read = batch * context * shapes[0].bytes_per_page // BUILD.page_size
    assert step_bytes(half, batch, context) - step_bytes(fp8, batch, context) == read // 2


def test_memory_for_a_cache_holds_twice_the_pages(tmp_path: Path) -> None:
    engine = Fp8CacheEngine.build("pre_norm", DType.FLOAT16, tmp_path)
    shape = CacheShape.of(Engine.open(engine.path).ranks[0].graph, BUILD.page_size)
    executor = load_executor(engine.path, kv_cache_memory_bytes=10 * shape.bytes_per_page)
    assert executor.num_pages == 10
    executor.close()


def test_what_is_no_cache_type_is_refused() -> None:
    with pytest.raises(ConfigError, match="kv_cache_dtype: 'int8' is not supported; accepted: auto, fp8"):
        BuildConfig(max_input_len=8, max_seq_len=16, kv_cache_dtype="int8")
    graph = toy_decoder()
    (node, *_) = (node for node in graph.nodes if node.op == "attention")
    with pytest.raises(ShapeError, match="cache_dtype is 'int8'"):
        make_node("y", node.op, node.inputs, {**node.attrs, "cache_dtype": "int8"}, graph.specs)
    assert cache_type(graph, None) is graph


def test_target_tensorrt_refuses_it(tmp_path: Path) -> None:
    checkpoint = OptCheckpoint.open(save_hf("pre_norm", tmp_path / "hf"))
    with pytest.raises(ConfigError, match="target tensorrt has no KV cache of fp8 numbers; accepted: auto"):
        checkpoint.build(tmp_path / "engine", dtype=DType.FLOAT16, target="tensorrt", kv_cache_dtype="fp8")
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize(("cache", "arch"), [("fp8", "sm_90"), ("fp8", "sm_80"), ("auto", "sm_80")])
def test_an_engine_of_target_cuda_carries_its_kernels(cache: str, arch: str, tmp_path: Path) -> None:
    """Those that launches of this architecture ask for, and only those for its cache."""
    checkpoint = OptCheckpoint.open(save_hf("cuda_pre_norm", tmp_path / "hf"))
    options = {"target": "cuda", "target_options": {"architectures": [arch]}, "max_batch_size": 1}
    folder = checkpoint.build(tmp_path / "engine", dtype=DType.BFLOAT16, kv_cache_dtype=cache, **options)
    engine = Engine.open(folder)
    (part,) = engine.ranks
    found = list(read_code(part.artifacts["code"][arch], arch, folder))
    carried = {entry for source, _, _ in found for entry in source.entries}
    shape = CacheShape.of(part.graph, BUILD.page_size)
    assert shape.dtype is {"auto": DType.BFLOAT16, "fp8": DType.FLOAT8_E4M3}[cache]
    assert carried == {
        entry for source in kernel_sources(part.graph, shape, 1, arch, "bfloat16") for entry in source.entries
    }
    attention = {entry for entry in carried if "attention" in entry or "append_kv" in entry}
    assert all(("e4m3" in entry.lower()) == (cache == "fp8") for entry in attention)
    assert any("context_attention_hopper" in entry for entry in attention) == (arch == "sm_90")
    assert any("context_attention<" in entry for entry in attention) == (arch == "sm_80")
    for _, _, compiled in found:
        assert all(use.spill_store_bytes == 0 for use in compiled.resources.values())
