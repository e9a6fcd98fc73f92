"""Building for target cuda without a GPU. Oracles: the interpreter in float64, and NVRTC itself."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from trtc.core.build import build_engine, plan
from trtc.core.dtypes import DType
from trtc.core.engine import Engine
from trtc.core.errors import BuildError, ConfigError, EngineError, TargetError
from trtc.core.graph import Graph, GraphBuilder
from trtc.core.interpreter import interpret
from trtc.core.ops import ReferenceContext, get_op
from trtc.core.passes import fuse
from trtc.core.passes.rewrite import rewrite
from trtc.core.quantize.scheme import QuantizeOptions, WeightFormat
from trtc.core.quantize.source import nearest
from trtc.core.targets.base import CacheShape, get_target
from trtc.core.targets.cuda.code import (
    code_file,
    decode_buckets,
    kernel_sources,
    linear_shapes,
    read_code,
    verify_buckets,
)
from trtc.core.targets.cuda.program import (
    ContextRows,
    CudaProgram,
    DecodeRows,
    _quantized_for_kernels,
    narrow_logits,
)
from trtc.core.targets.cuda.variants import decode_graph, prefill_graph
from trtc.kernels.append_kv.reference import append_kv
from trtc.kernels.layer_norm import check_norm
from trtc.kernels.library import KernelLibrary
from trtc.kernels.paged_decode_attention.reference import paged_decode_attention
from trtc.runtime.load import executor_of, load_executor
from trtc.tests.asymmetric import with_zeros
from trtc.tests.opt_models import BUILD, CUDA_VARIANTS, OptCheckpoint, save_hf
from trtc.tests.packed_steps import PagedSequences, filled_cache
from trtc.tests.tolerances import FLOAT64_ABS, max_error
from trtc.tests.toy_decoder import weight_rows

CUDA = {"target": "cuda", "target_options": {"architectures": ["sm_90"]}}


def checkpoint(variant: str, folder: Path) -> OptCheckpoint:
    return OptCheckpoint.open(save_hf(variant, folder / "hf"))


def planned(source: OptCheckpoint) -> tuple[Graph, dict[str, torch.Tensor]]:
    """The graph an engine would have, and its weights in float64."""
    model = dataclasses.replace(source.config, dtype=DType.FLOAT16)
    parts = plan(source.family, model, source.weights(DType.FLOAT16), dataclasses.replace(BUILD, **CUDA), 0)
    raw = {name: source.weights().read(0, name).double() for name in source.weights().names(0)}
    made = {name: interpret(recipe, raw) for name, recipe in parts.recipes.items()}
    return parts.graph, raw | made


def planned_quantized(source: OptCheckpoint, how: WeightFormat) -> tuple[Graph, dict[str, torch.Tensor]]:
    """The same of an engine with integer weights, every scale and float weight widened to float64."""
    model = dataclasses.replace(source.config, dtype=DType.FLOAT16)
    floats = source.weights(DType.FLOAT16)
    zeros = with_zeros(floats, how, lm_head=True) if how.zero_point else None
    weights = zeros or nearest(QuantizeOptions(how, lm_head=True))(floats)
    parts = plan(source.family, model, weights, dataclasses.replace(BUILD, **CUDA), 0)
    raw = {name: weights.read(0, name) for name in weights.names(0)}
    raw = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in raw.items()}
    made = {name: interpret(recipe, raw) for name, recipe in parts.recipes.items()}
    return parts.graph, raw | made


INT8, INT4, ZEROS = WeightFormat("int8"), WeightFormat("int4", 64), WeightFormat("int4", 64, zero_point=True)
VARIANTS = [
    *((variant, None) for variant in CUDA_VARIANTS),
    *((variant, INT8) for variant in ("cuda_pre_norm", "cuda_post_norm_projected", "cuda_bias_free_gelu")),
    ("cuda_bias_free_gelu", INT4),
    ("cuda_bias_free_gelu", ZEROS),
]


@pytest.mark.parametrize(("variant", "how"), VARIANTS, ids=str)
def test_variants_compute_what_the_graph_does(variant: str, how: WeightFormat | None, tmp_path: Path) -> None:
    source = checkpoint(variant, tmp_path)
    graph, weights = planned(source) if how is None else planned_quantized(source, how)
    sequences = PagedSequences(16, 32)

    def run(one: Graph, inputs: dict[str, torch.Tensor], cache: list) -> torch.Tensor:
        return interpret(one, weights | inputs, ReferenceContext(cache))

    caches = [filled_cache(graph, 16, 32, torch.float64) for _ in range(3)]
    prompt = sequences.step({"a": [3, 4, 5], "b": list(range(20))})
    expected = run(graph, prompt, caches[0])
    assert max_error(run(prefill_graph(graph), prompt, caches[1]), expected) <= FLOAT64_ABS
    run(graph, prompt, caches[2])
    token = sequences.step({"a": [7], "b": [8]})
    expected = run(graph, token, caches[0])
    for rows, residuals in ((1, True), (64, True), (96, False)):
        decode = decode_graph(graph, rows=rows, capability=80, fuse_residuals=residuals)
        assert (
            max_error(run(decode, token, [tuple(t.clone() for t in layer) for layer in caches[2]]), expected)
            <= FLOAT64_ABS
        )


def test_decode_graph_has_few_kernels(tmp_path: Path) -> None:
    """Five a layer: q/k/v, attention, output, and the two of the MLP; norms and sums are inside."""
    graph, _ = planned(checkpoint("cuda_pre_norm", tmp_path))
    decode = decode_graph(graph, rows=1, capability=90)
    views = {"input", "weight", "reshape", "split", "cast"}
    work = [node.op for node in decode.nodes if node.op not in views]
    assert work == ["embedding", *["linear", "attention", "linear", "linear", "linear"] * 2, "linear"]


def test_graph_of_many_rows_sums_in_its_norms(tmp_path: Path) -> None:
    """Where a library multiplies, a residual is no kernel of its own; and nothing widens logits that nobody reads so."""
    graph, _ = planned(checkpoint("cuda_pre_norm", tmp_path))
    decode = narrow_logits(decode_graph(graph, rows=65, capability=90, fuse_residuals=False))
    views = {"input", "weight", "reshape", "split"}
    work = [node.op for node in decode.nodes if node.op not in views]
    layer = ["linear", "attention", "linear", "add_layer_norm", "linear", "linear", "add_layer_norm"]
    assert work == ["embedding", "layer_norm", *layer * 2, "linear"]
    assert decode.outputs == (decode.nodes[-1].name,) and "cast" in [node.op for node in graph.nodes]


def test_quantized_decode_graph_has_few_kernels(tmp_path: Path) -> None:
    """Residuals are inside the products, and so are norms without weights; others keep theirs and are kernels of their own."""
    views = {"input", "weight", "reshape", "split", "cast"}
    for variant, norms in (("cuda_bias_free_gelu", []), ("cuda_pre_norm", ["layer_norm"])):
        graph, _ = planned_quantized(checkpoint(variant, tmp_path / variant), INT8)
        work = [node.op for node in decode_graph(graph, rows=1, capability=90).nodes if node.op not in views]
        product = ["quantized_linear"]
        layer = [*norms, *product, "attention", *product, *norms, *product, *product]
        assert work == ["embedding", *layer * 2, *norms, *product], variant


@pytest.mark.parametrize("how", [INT8, INT4], ids=str)
def test_norms_with_weights_go_into_quantized_products(how: WeightFormat, tmp_path: Path) -> None:
    """Where a kernel has them inside: on Hopper for int4, for int8 if these sizes were larger. Oracle: the graph with the
    norms before them."""
    graph, weights = planned_quantized(checkpoint("cuda_pre_norm", tmp_path), how)
    decode, inside = (decode_graph(graph, rows=1, capability=capability) for capability in (80, 90))
    if how is INT8:
        inside = rewrite(inside, (fuse.norm_linear,)).verify()
    norms = [[node.op for node in one.nodes].count("layer_norm") for one in (decode, inside)]
    assert norms == [5, 0]
    token = PagedSequences(16, 32).step({"a": [7], "b": [8]})
    outputs = [
        interpret(one, weights | token, ReferenceContext(filled_cache(graph, 16, 32, torch.float64)))
        for one in (decode, inside)
    ]
    assert max_error(*outputs) <= FLOAT64_ABS


def test_rows_of_one_sequence_attend_as_a_chunk_does() -> None:
    """What the program launches for rows of which several are of one sequence, its kernels replaced by their references; the
    last row is unused. Oracle: the op's reference, over chunks. Slots that nobody wrote hold NaN."""
    random = torch.Generator().manual_seed(5)
    sequences = PagedSequences(16, 32)

    ours = tuple(torch.full((32, 2, 16, 64), float("nan"), dtype=torch.float64) for _ in range(2))
    expected = tuple(torch.full((32, 16, 2, 64), float("nan"), dtype=torch.float64) for _ in range(2))

    def append(
        k: torch.Tensor, v: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *place: torch.Tensor
    ) -> None:
        for cache, new in zip((keys, values), append_kv(k, v, keys, values, *place), strict=True):
            cache.copy_(new)

    def attention(*tensors: torch.Tensor, out: torch.Tensor, scale: float, early: bool, **_: object) -> None:
        assert not early
        out.copy_(paged_decode_attention(*tensors, scale=scale))

    program: Any = object.__new__(CudaProgram)
    program._cache, program._append, program._decode_attention = [ours], append, attention
    program._decode_plan = lambda rows, heads: (None, None)
    for work in (
        {"a": [0] * 14, "b": [0]},
        {"b": [0] * 3, "a": [0] * 5, "c": [0]},
        {"a": [0], "b": [0] * 16},
    ):
        step = sequences.step(work)
        count = len(step["token_ids"])
        q = torch.randn(count + 1, 4, 64, generator=random, dtype=torch.float64)
        k, v = (torch.randn(count + 1, 2, 64, generator=random, dtype=torch.float64) for _ in range(2))
        starts = (step["query_start"], step["kv_length"], step["page_table"])
        chunks = get_op("attention").reference(
            ReferenceContext([expected]),
            {"layer": 0, "scale": 0.125},
            q[:count],
            k[:count],
            v[:count],
            *starts,
        )
        owner = torch.repeat_interleave(step["query_start"].diff())
        rows = DecodeRows(
            torch.cat([step["positions"] + 1, torch.zeros(1, dtype=torch.int32)]),
            torch.cat([step["page_table"][owner], step["page_table"][:1]]),
            early=False,
            row_start=torch.arange(count + 2, dtype=torch.int32).clamp_(max=count),
        )
        out = torch.empty_like(q)
        program._decode(0, 0.125, q, k, v, out, rows)
        assert max_error(out[:count], chunks) <= FLOAT64_ABS


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norms_of_heads_and_of_parts_of_a_split(kind: str) -> None:
    """The kernel takes [rows, columns] as it lies in memory, and norms of q and k are over each head of a part of a fused
    product. The kernel is replaced by its contract and its reference; oracle: the op's reference."""
    x = torch.randn(5, 3 * 32, generator=torch.Generator().manual_seed(1)).half()
    heads, part = x.split(32, -1)[1].reshape(5, 4, 8), x.split(32, -1)[2]
    launched = []

    def norm(rows: torch.Tensor, scale: Any, shift: Any, *, out: torch.Tensor, **how: Any) -> None:
        check_norm("layer_norm", rows, scale, shift, how.get("residual"), how.get("total"), out, kind)
        launched.append(rows.shape)
        if "total" in how:
            rows = how["total"].copy_(rows + how["residual"])
        out.copy_(get_op(f"{kind}_norm").reference(ReferenceContext(), {"eps": 1e-5}, rows, scale, shift))

    program: Any = object.__new__(CudaProgram)
    program._norm = norm
    node = SimpleNamespace(attrs={"eps": 1e-5})
    for value in (heads, part):
        weight = torch.rand(value.shape[-1]).half()
        expected = get_op(f"{kind}_norm").reference(ReferenceContext(), node.attrs, value, weight)
        assert torch.equal(program._norm_kernel(kind, node)(value, weight), expected)
        added = get_op(f"add_{kind}_norm").reference(ReferenceContext(), node.attrs, value, value, weight)
        for found, wanted in zip(
            program._add_norm_kernel(kind, node)(value, value, weight), added, strict=True
        ):
            assert torch.equal(found, wanted)
    assert launched == [(20, 8), (20, 8), (5, 32), (5, 32)]


@pytest.mark.parametrize("cached", [torch.float64, torch.float8_e4m3fn], ids=str)
def test_unfused_attention_writes_into_the_pages_of_the_kernels(cached: torch.dtype) -> None:
    """Oracle: the op's reference over pages of its own, token by token; slots that nobody wrote hold NaN in both."""
    random = torch.Generator().manual_seed(6)
    sequences = PagedSequences(16, 8)
    ours = tuple(torch.full((8, 2, 16, 64), float("nan")).to(cached) for _ in range(2))
    expected = tuple(torch.full((8, 16, 2, 64), float("nan")).to(cached) for _ in range(2))
    attrs = {"layer": 0, "scale": 0.125}
    if cached is torch.float8_e4m3fn:
        attrs["cache_dtype"] = "float8_e4m3fn"
    program: Any = object.__new__(CudaProgram)
    program._cache, program._accumulation, program._decode_rows = [ours], "unfused", None
    attention = program._attention_kernel(SimpleNamespace(attrs=attrs))
    for work in ({"a": [0] * 20, "b": [0] * 3}, {"b": [0] * 30, "a": [0] * 2}):
        step = sequences.step(work)
        count = len(step["token_ids"])
        q = torch.randn(count, 4, 64, generator=random, dtype=torch.float64)
        k, v = (torch.randn(count, 2, 64, generator=random, dtype=torch.float64) for _ in range(2))
        starts = (step["query_start"], step["kv_length"], step["page_table"])
        program._context_rows = ContextRows(*starts)
        wanted = get_op("attention").reference(ReferenceContext([expected]), attrs, q, k, v, *starts)
        assert torch.equal(attention(q, k, v), wanted)
    for held, other in zip(ours, expected, strict=True):
        found, other = held.transpose(1, 2).float(), other.float()
        assert torch.equal(found.nan_to_num(7.0), other.nan_to_num(7.0)) and bool(found.isfinite().any())


@pytest.mark.parametrize("how", [None, INT8, INT4, ZEROS], ids=str)
def test_engine_carries_its_kernels(how: WeightFormat | None, tmp_path: Path) -> None:
    """Every kernel the program can ask for is in the engine: entries compare equal with the sources asked for."""
    source = checkpoint("cuda_pre_norm", tmp_path)
    folder = tmp_path / "engine"
    if how is None:
        source.build(folder, dtype=DType.FLOAT16, **CUDA)
    else:
        model = dataclasses.replace(source.config, dtype=DType.FLOAT16)
        floats = source.weights(DType.FLOAT16)
        weights = (with_zeros(floats, how) if how.zero_point else None) or nearest(QuantizeOptions(how))(
            floats
        )
        build_engine(source.family, model, weights, dataclasses.replace(BUILD, **CUDA), folder)
    engine = Engine.open(folder)
    assert code_file("sm_90") in engine.files
    (part,) = engine.ranks
    code = {entry: compiled for source, _, compiled in read_code(part.artifacts["code"]["sm_90"], "sm_90", folder)
            for entry in source.entries}  # fmt: skip
    shape = CacheShape.of(part.graph, engine.build.page_size)
    wanted = kernel_sources(part.graph, shape, engine.build.max_batch_size, "sm_90", "float16")
    assert set(code) == {entry for source in wanted for entry in source.entries}
    integers = {
        entry for entry in code if "Int8Weight" in entry or "Int4Weight" in entry or "Int4zeroWeight" in entry
    }
    assert bool(integers) == (how is not None)
    assert all("Int4zero" in entry for entry in integers) == (how is ZEROS or how is None)
    assert any("dequantize" in entry for entry in code) == (how is not None)
    for compiled in code.values():
        assert compiled.cubin.startswith(b"\x7fELF")
        assert all(use.spill_store_bytes == use.spill_load_bytes == 0 for use in compiled.resources.values())


def test_an_engine_whose_kernels_have_another_cache_layout_is_refused(tmp_path: Path) -> None:
    """As built before the heads of a page came first: its description says nothing of it."""
    engine = Engine.open(
        checkpoint("cuda_pre_norm", tmp_path).build(tmp_path / "engine", dtype=DType.FLOAT16, **CUDA)
    )
    (part,) = engine.ranks
    artifacts = {name: value for name, value in part.artifacts.items() if name != "cache_layout"}
    old = dataclasses.replace(engine, ranks=(dataclasses.replace(part, artifacts=artifacts),))
    with pytest.raises(EngineError, match=r"KV cache of another layout.*build the engine again") as caught:
        executor_of(old)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_running_without_a_gpu_says_so(tmp_path: Path) -> None:
    folder = checkpoint("cuda_pre_norm", tmp_path).build(tmp_path / "engine", dtype=DType.FLOAT16, **CUDA)
    with pytest.raises(TargetError, match=r"target cuda.*--target cpu"):
        load_executor(folder)


@pytest.mark.parametrize(
    ("variant", "dtype", "options", "error", "says"),
    [
        ("cuda_pre_norm", DType.FLOAT32, {}, ConfigError, "float32"),
        ("pre_norm", DType.FLOAT16, {}, BuildError, "head_dim 16"),
        ("cuda_pre_norm", DType.FLOAT16, {"architectures": ["sm_70"]}, ConfigError, "sm_70"),
        ("cuda_pre_norm", DType.FLOAT16, {"context_fmha": "maybe"}, ConfigError, "fp32_acc"),
        ("cuda_pre_norm", DType.BFLOAT16, {"context_fmha": "enable"}, BuildError, "bfloat16"),
        ("cuda_pre_norm", DType.FLOAT16, {"speed": "ludicrous"}, ConfigError, "speed"),
    ],
)
def test_refusals(
    variant: str, dtype: DType, options: dict[str, object], error: type[Exception], says: str, tmp_path: Path
) -> None:
    source = checkpoint(variant, tmp_path)
    target_options = {"architectures": ["sm_90"], **options}
    with pytest.raises(error, match=says):
        source.build(tmp_path / "engine", dtype=dtype, target="cuda", target_options=target_options)
    assert not (tmp_path / "engine").exists()


def test_a_batch_beyond_the_largest_bucket_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_batch_size 2000"):
        checkpoint("cuda_pre_norm", tmp_path).build(
            tmp_path / "engine", dtype=DType.FLOAT16, max_batch_size=2000, max_num_tokens=4000, **CUDA
        )


def test_buckets_hold_every_batch() -> None:
    assert decode_buckets(1) == (1,)
    assert decode_buckets(5) == (1, 2, 4, 5)
    assert decode_buckets(64)[-1] == 64 and decode_buckets(4096)[-1] == 1024
    assert verify_buckets(1) == verify_buckets(8) == decode_buckets(32) and verify_buckets(
        64
    ) == decode_buckets(64)


def test_zeros_are_read_beside_their_scales(tmp_path: Path) -> None:
    """What a program makes of the weights of a graph: for each product a scale with its zeros. Oracle: the parts."""
    graph, _ = planned_quantized(checkpoint("cuda_pre_norm", tmp_path), ZEROS)
    stored = with_zeros(checkpoint("cuda_pre_norm", tmp_path).weights(DType.FLOAT16), ZEROS, lm_head=True)
    node = next(node for node in graph.nodes if node.op == "quantized_linear" and node.name.endswith("fc1"))
    names = [name for name in node.inputs[1:4] if name is not None]
    weights = {name: stored.read(0, name) for name in names}
    one = Graph((node,), (node.name,))
    made = _quantized_for_kernels(one, {name: tensor.clone() for name, tensor in weights.items()})
    assert torch.equal(made[names[1]], torch.stack((weights[names[1]], weights[names[2]].half()), -1))
    shapes = linear_shapes(graph, 1)
    assert {weight for *_, weight in shapes} == {"int4zero/64"}


def test_prompts_are_captured_where_nothing_can_wait_for_the_host(tmp_path: Path) -> None:
    graph, weights = planned(checkpoint("cuda_pre_norm", tmp_path))

    def captures(accumulation: str = "float32", **options: Any) -> bool:
        library = KernelLibrary(precompiled=[])
        return CudaProgram(
            graph, weights, [], library, accumulation=accumulation, max_kv_length=64, **options
        ).captures_prefill

    foreign = {"linear": lambda _: None}
    assert (
        captures() and captures("float16") and captures(kernels={"an op of another model": foreign["linear"]})
    )
    assert not (captures("unfused") or captures(kernels=foreign) or captures(communicator=object()))
    graph, weights = planned_quantized(checkpoint("cuda_pre_norm", tmp_path), INT8)
    fused = {"add_layer_norm": foreign["linear"]}
    assert captures() and not captures(kernels=fused), "an op of the graph of prompts alone"


def test_a_closed_program_is_gone_with_its_last_reference(tmp_path: Path) -> None:
    """Its weights are the GPU's memory, which the next engine needs: nobody may have to collect garbage first."""
    graph, weights = planned(checkpoint("cuda_pre_norm", tmp_path))
    program = CudaProgram(
        graph, weights, [], KernelLibrary(precompiled=[]), accumulation="float32", max_kv_length=64
    )
    there = weakref.ref(program)
    gc.disable()
    try:
        program.close()
        del program
        assert there() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("out_heads", "message"),
    [
        (4, "attention layers have 2 and 4 heads; accepted: the same"),
        (2, "linear 'by_head': input is float16.T, 2, 64.;"),
    ],
)
def test_what_the_kernels_do_not_do_is_refused_before_weights_are_made(out_heads: int, message: str) -> None:
    """Attention with other numbers of heads in other layers, and products of heads; target cpu runs both."""
    g = GraphBuilder(DType.FLOAT16, weight_rows(table=(11, 128), wide=(64 * out_heads, 128), square=(64, 64)))
    k = g.add(
        "reshape",
        g.add("embedding", "token_ids", g.weight("table"), name="x", offset=0),
        name="k",
        shape=("T", 2, 64),
    )
    x = g.add("linear", "x", g.weight("wide"), name="q")
    q = g.add("reshape", x, name="heads", shape=("T", out_heads, 64))
    by_head = g.add("linear", k, g.weight("square"), name="by_head")
    starts = ("query_start", "kv_length", "page_table")
    g.add("attention", k, by_head if out_heads == 2 else k, k, *starts, name="first", layer=0, scale=1.0)
    graph = g.finish(g.add("attention", q, k, k, *starts, name="second", layer=1, scale=1.0))
    with pytest.raises(BuildError, match=message):
        get_target("cuda").check(graph, dataclasses.replace(BUILD, **CUDA))
