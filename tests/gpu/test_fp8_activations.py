"""Products of e4m3 numbers by e4m3 numbers on a GPU, and engines that have them. Oracle: float64 over the rounded rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from trtc.core.build import build_engine
from trtc.core.dtypes import DType, to_torch
from trtc.core.engine import Engine
from trtc.core.graph import Graph
from trtc.core.ops.attention import CACHE_DTYPE
from trtc.core.ops.quantized import ACTIVATIONS
from trtc.core.quantize.source import nearest
from trtc.kernels.launch import architecture
from trtc.kernels.library import KernelLibrary
from trtc.kernels.quantize_rows.reference import quantize_rows
from trtc.runtime.load import load_executor
from trtc.tests.engine_steps import TOKENS, batch_work, engine_logits, execute
from trtc.tests.fp8_products import W8A8, planned, products
from trtc.tests.opt_models import BUILD, OptCheckpoint, save_hf
from trtc.tests.packed_steps import Inputs, PagedSequences, Reference
from trtc.tests.prompt_steps import check_prompt_graphs
from trtc.tests.tolerances import ROUNDING_RATIO, max_error

pytestmark = pytest.mark.gpu
PRODUCT_RELATIVE = {DType.FLOAT16: 2e-3, DType.BFLOAT16: 1.5e-2}
"""Of the largest result: it is rounded to the type, and the library sums in float32."""


@pytest.mark.parametrize("rows", [1, 7, 65, 300])
@pytest.mark.parametrize("dtype", [DType.FLOAT16, DType.BFLOAT16])
@pytest.mark.parametrize(
    "variant", ["cuda_pre_norm", "cuda_bias_free_gelu", "cuda_head_dim_80_odd_vocabulary"]
)
def test_products(variant: str, dtype: DType, rows: int, tmp_path: Path) -> None:
    """Every product of a layer, with its bias and activation; a ReLU that the next product applies to its rows."""
    graph, weights = planned(variant, dtype, tmp_path)
    on_gpu = {name: tensor.cuda() for name, tensor in weights.items()}
    library = KernelLibrary()
    if library.capability != 90:
        pytest.skip("only Hopper multiplies these")
    made, large = products(graph, on_gpu, library)
    generator = torch.Generator(device="cuda").manual_seed(4)
    nodes = [node for node in graph.nodes if node.op == "quantized_linear"]
    for node in nodes[:4]:
        assert large.takes_fp8(node)
        columns = graph.specs[node.used[0]].shape[-1]
        x = torch.randn(rows, columns, device="cuda", generator=generator).to(to_torch(dtype))
        integers, scale = (made[name] for name in node.used[1:3])
        bias = made[node.inputs[4]] if len(node.inputs) > 4 and node.inputs[4] else None
        y = large.kernel(graph, node)(x, integers, scale, bias, None)
        takes_relu = graph.producers[node.used[0]].attrs.get("activation") == "relu"
        numbers, row_scale = quantize_rows(x, relu=takes_relu)
        weight = integers.double()[:, :columns] * scale.double()[:, None]
        expected = (numbers.double() * row_scale.double()[:, None]) @ weight.T
        if bias is not None:
            expected += bias.double()
        if node.attrs.get("activation") == "gelu":
            expected = torch.nn.functional.gelu(expected)
        error = max_error(y.cpu(), expected.cpu())
        assert error <= PRODUCT_RELATIVE[dtype] * float(expected.abs().max()), node.name


def references(path: Path, page_size: int, num_pages: int) -> tuple[Reference, Reference]:
    """The engine's own graph, and the same without anything rounded to e4m3 but weights."""
    engine = Engine.open(path)
    graph, model = engine.ranks[0].graph, to_torch(engine.model.dtype)
    weights = {
        name: tensor.double() if tensor.dtype is model else tensor
        for name, tensor in engine.map_weights(0).items()
    }
    return (
        Reference(graph, weights, page_size, num_pages),
        Reference(without_rounding(graph), weights, page_size, num_pages),
    )


def without_rounding(graph: Graph) -> Graph:
    rounding = {ACTIVATIONS, CACHE_DTYPE}
    nodes = tuple(
        dataclasses.replace(
            node, attrs={name: value for name, value in node.attrs.items() if name not in rounding}
        )
        for node in graph.nodes
    )
    return Graph(nodes, graph.outputs)


def distance(value: torch.Tensor, exact: torch.Tensor) -> float:
    return float((value.double() - exact).square().mean().sqrt())


def build(variant: str, dtype: DType, folder: Path, **options: object) -> Path:
    checkpoint = OptCheckpoint.open(save_hf(variant, folder / "hf"))
    target = {"architectures": [architecture()]}
    build = dataclasses.replace(BUILD, target="cuda", target_options=target, **options)
    model = dataclasses.replace(checkpoint.config, dtype=dtype)
    weights = nearest(W8A8)(checkpoint.weights(dtype))
    build_engine(checkpoint.family, model, weights, build, folder / "engine")
    return folder / "engine"


@pytest.mark.parametrize("cache", ["auto", "fp8"])
@pytest.mark.parametrize("dtype", [DType.FLOAT16, DType.BFLOAT16])
@pytest.mark.parametrize("variant", ["cuda_pre_norm", "cuda_post_norm_projected", "cuda_bias_free_gelu"])
def test_logits(variant: str, dtype: DType, cache: str, tmp_path: Path) -> None:
    """One prompt, a prompt with chunks, and token by token from CUDA graphs, whose rows are not rounded: as far from exact as
    float64 that rounds."""
    path = build(variant, dtype, tmp_path, kv_cache_dtype=cache)
    whole = PagedSequences(BUILD.page_size, 16).step({"a": TOKENS})
    rounded, exact = (reference.run(whole) for reference in references(path, BUILD.page_size, 16))
    for chunks in ([len(TOKENS)], [9, 20, *[1] * (len(TOKENS) - 29)]):
        ratio = distance(engine_logits(path, TOKENS, chunks), exact) / distance(rounded, exact)
        assert ratio <= ROUNDING_RATIO, f"chunks {chunks[:3]}: {ratio}"


def test_steps_with_prompts_in_cuda_graphs(tmp_path: Path) -> None:
    """No further from exact than twice what float64 that rounds is, at the worst logit."""
    path = build("cuda_pre_norm", DType.FLOAT16, tmp_path, max_batch_size=8)
    rounding = [0.0]

    def reference(*sizes: int) -> Callable[[Inputs], torch.Tensor]:
        rounded, exact = references(path, *sizes)

        def run(inputs: Inputs) -> torch.Tensor:
            logits = exact.run(inputs)
            rounding[0] = max_error(rounded.run(inputs), logits)
            return logits

        return run

    check_prompt_graphs(path, reference, lambda _: 2 * rounding[0])


@pytest.mark.parametrize("sequences", [40, 70])
def test_batches(sequences: int, tmp_path: Path) -> None:
    """Decode steps of more sequences than the decode kernels are used for: rounded rows in CUDA graphs."""
    path = build("cuda_pre_norm", DType.FLOAT16, tmp_path, max_batch_size=80, max_num_tokens=240)
    executor = load_executor(path)
    paged = PagedSequences(executor.page_size, executor.num_pages)
    both = references(path, executor.page_size, executor.num_pages)
    for step in range(3):
        inputs = paged.step(batch_work(sequences, step))
        rounded, exact = (reference.run(inputs) for reference in both)
        ratio = distance(execute(executor, inputs), exact) / distance(rounded, exact)
        assert ratio <= ROUNDING_RATIO, f"step {step}: {ratio}"
    executor.close()
