"""Building for the CUDA target: checks, fusions, and compilation of the kernels the engine needs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...config import KV_CACHE_DTYPES, BuildConfig
from ...dtypes import DType
from ...errors import BuildError, ConfigError
from ...graph import Graph
from ...ops import op_names
from ...passes.fuse import ACTIVATION, AFFINE, DEQUANTIZE, POSITIONS, SIBLINGS
from ...quantize.scheme import KINDS
from ..base import CacheShape, Capabilities
from .code import (
    ARCHITECTURES,
    CACHE_LAYOUT,
    MAX_DECODE_BUCKET,
    check_sizes,
    check_supported,
    compute_dtype,
    kernel_sources,
    write_code,
)

if TYPE_CHECKING:
    import torch

ACCUMULATIONS = {"enable": "float16", "fp32_acc": "float32", "disable": "unfused"}
"""`--context-fmha` -> how prefill attention sums; `disable` is the unfused path in torch."""
DEFAULT_OPTIONS: Mapping[str, Any] = {"architectures": ARCHITECTURES, "context_fmha": "fp32_acc"}


class CudaTarget:
    name = "cuda"
    embeds_weights = False

    def capabilities(self, build: BuildConfig) -> Capabilities:
        _options(build)
        if build.max_batch_size > MAX_DECODE_BUCKET:
            raise ConfigError(
                f"target cuda: max_batch_size {build.max_batch_size} is too large; accepted: 1 to {MAX_DECODE_BUCKET}"
            )
        return Capabilities(
            ops=op_names(),
            # What more is fused depends on the rows of a step: see `variants`.
            fusions=frozenset({SIBLINGS, ACTIVATION, POSITIONS, AFFINE, DEQUANTIZE}),
            dtypes=frozenset({DType.FLOAT16, DType.BFLOAT16}),
            tensor_parallel=True,
            pipeline_parallel=True,
            quantized=KINDS,
            kv_cache_dtypes=frozenset(KV_CACHE_DTYPES),
        )

    def check(self, graph: Graph, build: BuildConfig) -> None:
        shape = CacheShape.of(graph, build.page_size)
        heads = {graph.specs[node.used[0]].shape[1] for node in graph.nodes if node.op == "attention"}
        num_heads, *others = sorted(map(int, heads))
        if others:
            raise BuildError(
                f"target cuda: attention layers have {num_heads} and {others[0]} heads; accepted: the same number in all"
            )
        dtype = compute_dtype(graph)
        check_supported(shape, num_heads, dtype)
        check_sizes(graph)
        if ACCUMULATIONS[_options(build)["context_fmha"]] == "float16" and dtype is not DType.FLOAT16:
            raise BuildError(
                f"target cuda: context_fmha enable sums in float16, which {dtype} cannot; accepted: fp32_acc, disable"
            )

    def compile(
        self,
        graph: Graph,
        build: BuildConfig,
        directory: Path,
        rank: int,
        weights: Mapping[str, torch.Tensor],
    ) -> Mapping[str, Any]:
        options = _options(build)
        shape = CacheShape.of(graph, build.page_size)
        code = {}
        stage, member = divmod(rank, build.tp_size)
        for arch in options["architectures"]:
            sources = kernel_sources(graph, shape, build.max_batch_size, arch, logits_dtype(graph).value)
            # All ranks of a stage run the same kernels.
            code[arch] = write_code(sources, arch, directory, stage) if member == 0 else []
        return {"code": code, "context_fmha": options["context_fmha"], "cache_layout": CACHE_LAYOUT}


TARGET = CudaTarget()


def logits_dtype(graph: Graph) -> DType:
    """Type in which the head leaves its logits: the sampling kernels read them before the graph widens them."""
    (name,) = graph.outputs
    node = graph.producers[name]
    return graph.specs[node.used[0]].dtype if node.op == "cast" else graph.specs[name].dtype


def _options(build: BuildConfig) -> dict[str, Any]:
    """The target's options, defaults filled in. Raises ConfigError for what is unknown or not accepted."""
    unknown = sorted(set(build.target_options) - set(DEFAULT_OPTIONS))
    if unknown:
        raise ConfigError(
            f"target cuda has no option {', '.join(unknown)}; known: {', '.join(DEFAULT_OPTIONS)}"
        )
    options = {**DEFAULT_OPTIONS, **build.target_options}
    for arch in options["architectures"]:
        if arch not in ARCHITECTURES:
            raise ConfigError(
                f"target cuda: architecture {arch!r} is not supported; accepted: {', '.join(ARCHITECTURES)}"
            )
    if options["context_fmha"] not in ACCUMULATIONS:
        raise ConfigError(
            f"target cuda: context_fmha {options['context_fmha']!r} is not known; accepted: {', '.join(ACCUMULATIONS)}"
        )
    return options
