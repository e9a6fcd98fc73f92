"""Machine code in an engine: which kernels it needs, compiled for each architecture, and read back."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from ....kernels import (
    all_reduce,
    append_kv,
    context_attention,
    embedding,
    layer_norm,
    linear,
    paged_decode_attention,
    quantize_rows,
    sampling,
)
from ....kernels.all_reduce import norm as all_reduce_norm
from ....kernels.all_reduce import two_shot
from ....kernels.contract import ELEMENT_TYPES
from ....kernels.errors import KernelContractError, KernelError
from ....kernels.linear.quantized import dequantize_sources
from ....kernels.linear.quantized_plan import choose_quantized
from ....kernels.nvrtc import (
    KERNELS_ROOT,
    CompiledKernel,
    Defines,
    KernelSource,
    ResourceUsage,
    compile_kernel,
    compile_target,
)
from ....kernels.paged import check_model
from ...dtypes import DType
from ...errors import BuildError, EngineError
from ...graph import Graph, Node
from ...ops.quantized import ACTIVATIONS
from ...passes.fuse import NORMS, PRODUCTS
from ..base import CacheShape
from .variants import decode_graph, weight_format

ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_120")
"""What an engine can be built for: Ampere, Ada, Hopper and Blackwell (RTX) GPUs."""

MULTIPROCESSORS: Mapping[str, tuple[int, ...]] = {
    "sm_80": (108,),
    "sm_89": (142,),
    "sm_90": (132,),
    "sm_120": (170,),
}
"""The GPU of each architecture that launches are planned for: A100, L40, H100 and H200, RTX 5090.

Which kernel serves a shape depends on the number of multiprocessors. A GPU with another number runs the plans of these.
"""

CACHE_LAYOUT = "num_pages, num_kv_heads, page_size, head_dim"
"""Axes of the KV cache that kernels compiled by this code take, as an engine says it; engines with others are refused."""
MAX_DECODE_BUCKET = 1024
VERIFY_ROWS = 32
"""Tokens that are verified in one step, whatever the batch size."""


def decode_buckets(max_batch_size: int) -> tuple[int, ...]:
    """Batch sizes for which a decode step is captured: a batch runs in the smallest that holds it."""
    sizes = [
        1,
        2,
        4,
        8,
        16,
        24,
        32,
        48,
        64,
        96,
        128,
        192,
        256,
        320,
        384,
        448,
        512,
        640,
        768,
        896,
        MAX_DECODE_BUCKET,
    ]
    return (*(size for size in sizes if size < max_batch_size), min(max_batch_size, MAX_DECODE_BUCKET))


def verify_buckets(max_batch_size: int) -> tuple[int, ...]:
    """Numbers of tokens for which a step is captured that may hold several of one sequence, to verify guesses."""
    return decode_buckets(max(max_batch_size, VERIFY_ROWS))


def compute_dtype(graph: Graph) -> DType:
    """Type of activations, k and v among them."""
    return next(graph.specs[node.used[0]].dtype for node in graph.nodes if node.op == "attention")


def check_supported(shape: CacheShape, num_heads: int, dtype: DType) -> None:
    """Raises BuildError when the attention kernels do not take a model that computes in `dtype`, or the page size."""
    try:
        check_model(
            "attention",
            dtype=dtype.value,
            head_dim=shape.head_dim,
            num_heads=num_heads,
            num_kv_heads=shape.num_kv_heads,
            page_size=shape.page_size,
        )
    except KernelContractError as error:
        raise BuildError(f"target cuda: {error}") from None


def check_sizes(graph: Graph) -> None:
    """Raises BuildError when a linear layer of `graph` has sizes that the kernels do not take."""
    for node in graph.nodes:
        if node.op in PRODUCTS and graph.specs[node.used[0]].rank != 2:
            x = graph.specs[node.used[0]]
            raise BuildError(
                f"target cuda: {node.op} '{node.name}': input is {x}; accepted: [tokens, features]"
            )
    for features, columns, *_ in sorted(linear_shapes(graph, 1)):
        try:
            linear.plan.check_sizes(1, columns, features)
        except KernelContractError as error:
            raise BuildError(f"target cuda: {error}") from None


def kernel_sources(
    graph: Graph, shape: CacheShape, max_batch_size: int, arch: str, logits_dtype: str
) -> tuple[KernelSource, ...]:
    """Every kernel that `CudaProgram` can ask for when it runs `graph` on a GPU of `arch`."""
    element = ELEMENT_TYPES[compute_dtype(graph).value]
    fp8_cache = shape.dtype is DType.FLOAT8_E4M3
    capability = int(arch.removeprefix("sm_"))
    quantized = {weight for _, _, _, weight in linear_shapes(graph, 1)} - {linear.FLOAT}
    return (
        *embedding.sources(element),
        *layer_norm.sources(element),
        *linear.sources(element, _linear_plans(graph, max_batch_size, arch, capability)),
        *dequantize_sources(element, quantized),
        *(quantize_rows.sources(element) if any(map(rounds_rows, graph.nodes)) else ()),
        *paged_decode_attention.sources(element, (shape.head_dim,), capability, fp8_cache=fp8_cache),
        append_kv.source(element, fp8_cache=fp8_cache),
        *context_attention.sources(element, (shape.head_dim,), capability, fp8_cache=fp8_cache),
        *sampling.sources(ELEMENT_TYPES[logits_dtype]),
        *(source for ranks in _ranks(graph) for source in all_reduce.sources(element, ranks)),
        *(
            source
            for ranks in _ranks(graph)
            for source in all_reduce_norm.sources(element, ranks, _norms(graph))
        ),
        *(source for ranks in _ranks(graph) for source in two_shot.sources(element, ranks, _norms(graph))),
    )


def rounds_rows(node: Node) -> bool:
    """Whether a node is a product whose rows are rounded to e4m3 numbers, where there are many of them."""
    return node.op == "quantized_linear" and ACTIVATIONS in node.attrs


def _ranks(graph: Graph) -> set[int]:
    """The number of ranks that `graph` sums over, where it does."""
    return {int(node.attrs["tp_size"]) for node in graph.nodes if node.op == "all_reduce"}


def _norms(graph: Graph) -> set[str]:
    """The kinds of norms in `graph`."""
    return {NORMS[node.op] for node in graph.nodes if node.op in NORMS}


def _linear_plans(
    graph: Graph, max_batch_size: int, arch: str, capability: int
) -> Iterator[linear.plan.AnyPlan]:
    most = min(max_batch_size, linear.MAX_ROWS)
    for rows in sorted({*decode_buckets(most), *verify_buckets(most)}):
        for features, columns, norm, weight in linear_shapes(graph, rows, capability):
            choose = (
                linear.choose_plan if weight == linear.FLOAT else partial(choose_quantized, weight=weight)
            )
            for multiprocessors in MULTIPROCESSORS[arch]:
                yield choose(
                    rows, features, columns, norm=norm, capability=capability, multiprocessors=multiprocessors
                )


def linear_shapes(graph: Graph, rows: int, capability: int = 80) -> set[tuple[int, int, str, str]]:
    """(features, columns, fused norm, format of the weight) of the linear layers in a decode step of `rows` sequences.

    capability: of the GPU; of all this, norms alone depend on it.
    """
    decode = decode_graph(graph, rows=rows, capability=capability)
    shapes = set()
    for node in decode.nodes:
        if node.op in PRODUCTS:
            features, columns = node.outputs[0].shape[-1], decode.specs[node.used[0]].shape[-1]
            assert isinstance(features, int) and isinstance(columns, int)
            weight = linear.FLOAT if node.op == "linear" else weight_format(decode, node)
            shapes.add((features, columns, str(node.attrs.get("norm", "none")), weight))
    return shapes


def code_file(arch: str, stage: int = 0) -> str:
    """Name of the file of an engine with the machine code for `arch` that all ranks of a stage run."""
    return f"kernels.{f'stage{stage}.' if stage else ''}{arch}.cubins"


COMPILERS = 16
"""Kernels that are compiled side by side, at most: one takes a second or so of a processor, and 100 MB."""


def write_code(
    sources: Sequence[KernelSource], arch: str, directory: Path, stage: int = 0
) -> list[dict[str, Any]]:
    """Compiles `sources` for `arch` into the file of a stage; returns its table of contents.

    Raises BuildError when the compiler is missing or refuses a kernel.
    """
    contents: list[dict[str, Any]] = []
    compiling = partial(compile_kernel, arch=compile_target(arch))
    with (
        ThreadPoolExecutor(min(COMPILERS, len(os.sched_getaffinity(0)))) as pool,
        (directory / code_file(arch, stage)).open("wb") as file,
    ):
        futures = [pool.submit(compiling, source) for source in sources]
        for source, future in zip(sources, futures, strict=True):
            try:
                compiled = future.result()
            except KernelError as error:
                raise BuildError(f"target cuda: {str(error).splitlines()[0]}") from None
            contents.append(
                {
                    "source": source.name,
                    "entries": dict(compiled.entries),
                    "resources": {name: asdict(usage) for name, usage in compiled.resources.items()},
                    "key": compiled.key,
                    "offset": file.tell(),
                    "bytes": len(compiled.cubin),
                }
            )
            file.write(compiled.cubin)
    return contents


def read_code(
    contents: Iterable[Mapping[str, Any]], arch: str, directory: Path, stage: int = 0
) -> Iterator[tuple[KernelSource, Defines, CompiledKernel]]:
    """What `KernelLibrary` takes as precompiled. Raises EngineError when the file does not fit its table of contents."""
    path = directory / code_file(arch, stage)
    data = path.read_bytes()
    for item in contents:
        cubin = data[item["offset"] : item["offset"] + item["bytes"]]
        if len(cubin) != item["bytes"]:
            raise EngineError(f"{path}: shorter than engine.json says")
        source = KernelSource(KERNELS_ROOT / item["source"], tuple(item["entries"]))
        resources = {name: ResourceUsage(**usage) for name, usage in item["resources"].items()}
        yield (
            source,
            {},
            CompiledKernel(compile_target(arch), cubin, b"", item["entries"], resources, item["key"]),
        )
