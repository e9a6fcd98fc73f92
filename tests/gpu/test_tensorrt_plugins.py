"""The kernels of the TensorRT plugins on a GPU: the PTX that TensorRT gets, launched with the numbers that it is told.

Oracle: float64 references. A full engine of flavour `tensorrt` needs libnvinfer too (marker `tensorrt`); its oracle is
transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from trtc.bench.kernels.attention_cases import Model, PagedBatch, paged_batch, row_error
from trtc.bench.kernels.attention_checks import HALF_ACCUMULATION_TOLERANCE, TOLERANCE
from trtc.core.dtypes import DType
from trtc.kernels.append_kv.reference import append_kv
from trtc.kernels.context_attention.reference import context_attention
from trtc.kernels.embedding.reference import embedding
from trtc.kernels.launch import LaunchShape, architecture, load
from trtc.kernels.nvrtc import compile_kernel
from trtc.kernels.tensorrt_aot import ATTENTION_SIGNATURE, AotLaunch, lookup, paged_attention
from trtc.runtime.llm import LLM
from trtc.runtime.sampling_params import SamplingParams
from trtc.tests.opt_models import OptCheckpoint, hf_logits, save_hf
from trtc.tests.tolerances import logits_tolerance

MODELS = [
    Model(12, 12, 64, 32, torch.float16),
    Model(12, 12, 64, 16, torch.bfloat16),
    Model(3, 3, 80, 16, torch.float16),
    Model(4, 4, 80, 64, torch.bfloat16),
    Model(4, 4, 96, 32, torch.float16),
    Model(4, 4, 128, 32, torch.float16),
    Model(4, 4, 128, 16, torch.bfloat16),
    Model(8, 2, 64, 32, torch.float16),
]
BATCHES = {
    "generation": ([1] * 14, [0, 1, 14, 15, 16, 30, 31, 32, 63, 64, 127, 1000, 2046, 2047]),
    "context": ([1, 16, 17, 64, 65, 700, 2048], [0] * 7),
    "chunks": ([1, 5, 64, 65, 130, 200, 17], [0, 31, 0, 64, 33, 500, 2031]),
}
"""New tokens and tokens in the cache, of every sequence; 1 to 2048 in all, at and beside the borders of pages and tiles."""


def launch_ptx(
    launch: AotLaunch, signature: str, inputs: list[torch.Tensor], outputs: list[torch.Tensor]
) -> None:
    """As TensorRT does it: addresses of the inputs, scalars, addresses of the outputs; no opt-in, no attributes."""
    compiled = compile_kernel(launch.source, arch=architecture().replace("sm_", "compute_"))
    kernel = load(compiled.ptx).kernel(compiled.entries[launch.entry], signature)
    shape = LaunchShape(launch.grid, (launch.block,), launch.shared_bytes)
    addresses = [[tensor.data_ptr() for tensor in tensors] for tensors in (inputs, outputs)]
    kernel(shape, *addresses[0], *launch.scalars, *addresses[1])
    torch.cuda.synchronize()


def attention_of(model: Model, batch: PagedBatch, accumulation: str) -> AotLaunch:
    return paged_attention(
        dtype=str(model.dtype).removeprefix("torch."), head_dim=model.head_dim, num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads, page_size=model.page_size, scale=model.scale, accumulation=accumulation,
        num_tokens=len(batch.q), num_seqs=len(batch.kv_length), pages_per_seq=batch.page_table.shape[1],
    )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("accumulation", ["float32", "float16"])
@pytest.mark.parametrize("which", BATCHES)
@pytest.mark.parametrize("model", MODELS, ids=str)
def test_attention(model: Model, which: str, accumulation: str) -> None:
    """Output and appended cache; memory that must not be read is NaN."""
    if accumulation == "float16" and model.dtype != torch.float16:
        pytest.skip("float16 sums take float16 inputs")
    new, past = BATCHES[which]
    batch = paged_batch(model, new, past, device="cuda")
    q, k, v = (tensor.contiguous() for tensor in (batch.q, batch.k, batch.v))
    tables = (batch.query_start, batch.kv_length, batch.page_table)
    expected = context_attention(q, k, v, batch.k_cache, batch.v_cache, *tables, scale=model.scale)
    k_wanted, v_wanted = append_kv(k, v, batch.k_cache, batch.v_cache, *tables)
    out = torch.full_like(q, torch.nan)
    caches = [batch.k_cache.clone(), batch.v_cache.clone()]
    launch_ptx(
        attention_of(model, batch, accumulation),
        ATTENTION_SIGNATURE,
        [q, k, v, *caches, *tables],
        [out, *caches],
    )
    tolerance = HALF_ACCUMULATION_TOLERANCE if accumulation == "float16" else TOLERANCE[model.dtype]
    assert row_error(out, expected) < tolerance
    assert torch.equal(caches[0].nan_to_num(7), k_wanted.nan_to_num(7))
    assert torch.equal(caches[1].nan_to_num(7), v_wanted.nan_to_num(7))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("columns", [64, 768, 2048])
@pytest.mark.parametrize("with_positions", [False, True])
def test_lookup(dtype: torch.dtype, columns: int, with_positions: bool) -> None:
    """The second of three shards of a vocabulary, with ids of all of them. Equal bits but for the one addition."""
    generator = torch.Generator(device="cuda").manual_seed(0)
    table, places = (torch.randn(n, columns, generator=generator, device="cuda").to(dtype) for n in (100, 70))
    ids = torch.randint(300, (333,), generator=generator, device="cuda", dtype=torch.int32)
    positions = torch.randint(64, (333,), generator=generator, device="cuda", dtype=torch.int32)
    more: dict[str, Any] = {"position_rows": 70, "position_offset": 2} if with_positions else {}
    launch = lookup(dtype=str(dtype).removeprefix("torch."), columns=columns, table_rows=100, offset=-100, num_tokens=333,
                    **more)  # fmt: skip
    out = torch.full((333, columns), torch.nan, dtype=dtype, device="cuda")
    inputs = [ids, table, positions, places] if with_positions else [ids, table]
    launch_ptx(launch, "PPPPiiiiiP" if with_positions else "PPiiiP", inputs, [out])
    known = (
        {"position_ids": positions, "position_table": places, "position_offset": 2} if with_positions else {}
    )
    expected = embedding(ids, table, offset=-100, masked=True, **known)
    assert torch.equal(out, expected.to(dtype))


@pytest.mark.gpu
@pytest.mark.tensorrt
@pytest.mark.parametrize("fmha", [None, "enable"])
def test_engine_with_plugins(fmha: str | None, tmp_path: Path) -> None:
    """Builds and runs the whole engine. Every token is, by the float32 logits for what came before it, the best or within
    the type's error of it."""
    pytest.importorskip("tensorrt")
    variant, prompts = "cuda_pre_norm", [list(range(3, 3 + size)) for size in (9, 1, 33, 16)]
    options = {"flavour": "tensorrt", "attention_plugin": True, "lookup_plugin": True}
    checkpoint = OptCheckpoint.open(save_hf(variant, tmp_path / "hf"))
    engine = checkpoint.build(tmp_path / "engine", dtype=DType.FLOAT16, target="tensorrt",
                              target_options=options | ({"context_fmha": fmha} if fmha else {}))  # fmt: skip
    _follows_the_reference(variant, engine, prompts)


@pytest.mark.gpu
@pytest.mark.tensorrt
def test_engine_with_native_attention(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt")
    checkpoint = OptCheckpoint.open(save_hf("cuda_pre_norm", tmp_path / "hf"))
    engine = checkpoint.build(tmp_path / "engine", dtype=DType.FLOAT16, target="tensorrt",
                              target_options={"flavour": "tensorrt"})  # fmt: skip
    _follows_the_reference("cuda_pre_norm", engine, [[5, 6, 7], [9], list(range(40))])


def _follows_the_reference(variant: str, engine: Path, prompts: list[list[int]]) -> None:
    params = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
    with LLM(engine) as llm:
        outputs = llm.generate(prompts, params)
    for prompt, output in zip(prompts, outputs, strict=True):
        new = list(output.outputs[0].token_ids)
        logits = hf_logits(variant, prompt + new)[len(prompt) - 1 : -1]
        chosen = logits[torch.arange(len(new)), torch.tensor(new)]
        assert (logits.max(-1).values - chosen).max() <= 2 * logits_tolerance(DType.FLOAT16, logits)
