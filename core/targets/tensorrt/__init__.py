"""The TensorRT target, for both flavours of its API: graph -> network definition -> plan."""

from __future__ import annotations

from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import torch

from ...config import BuildConfig
from ...dtypes import MODEL_DTYPES
from ...errors import BuildError, TargetError
from ...graph import Graph
from ...ops import op_names
from ...passes.fuse import POSITIONS, SIBLINGS
from ...plugin_registry import plugins
from ...quantize.scheme import KINDS
from ..base import Capabilities
from .attention import Attend, fused_attention
from .build import build_plan
from .flavour import Flavour, find_flavour
from .layered_attention import layered_attention
from .lookup import fuse_positions_before_all_reduce
from .lower import LOWERINGS, LoweringOptions, PluginLowering, lower_graph
from .options import TensorRTOptions


class TensorRTTarget:
    """Engines whose file for a rank is a TensorRT plan, `rank{r}.plan`, with the weights inside."""

    name = "tensorrt"
    embeds_weights = True

    def capabilities(self, build: BuildConfig) -> Capabilities:
        """Joined linear layers are asked for, and positions in the lookup where a plugin does it; the other fusions
        TensorRT does by itself.

        Raises ConfigError for options that TensorRT does not know.
        """
        options = TensorRTOptions.from_json(build.target_options)
        fusions = {SIBLINGS, POSITIONS} if options.lookup_plugin else {SIBLINGS}
        return Capabilities(
            frozenset(LOWERINGS.keys() | _brought(options, build)),
            frozenset(fusions),
            frozenset(MODEL_DTYPES),
            tensor_parallel=True,
            quantized=frozenset(kind for kind in KINDS if not kind.startswith("fp8")),
        )

    def check(self, graph: Graph, build: BuildConfig) -> None:
        """What TensorRT refuses, it refuses when it is installed and compiles."""

    def compile(
        self,
        graph: Graph,
        build: BuildConfig,
        directory: Path,
        rank: int,
        weights: Mapping[str, torch.Tensor],
    ) -> Mapping[str, Any]:
        """Writes `rank{rank}.plan` and returns its description.

        weights: by the names of the graph's weight nodes. TensorRT reads them while this runs.
        Raises TargetError when TensorRT is not installed, BuildError when it cannot build this.
        """
        options = TensorRTOptions.from_json(build.target_options)
        flavour = find_flavour(options.flavour)
        options.require(flavour)
        if options.lookup_plugin:
            graph = fuse_positions_before_all_reduce(graph, rank)
        lowering = LoweringOptions(
            kv_capacity=build.max_seq_len,
            attend=attend(options),
            plugins=plugin_lowerings(options, flavour, build),
        )
        plan = build_plan(lower_graph(graph, weights, flavour, lowering), build, options)
        path = directory / f"rank{rank}.plan"
        plan.write(path)
        return {"plan": path.name, **plan.description}


def attend(options: TensorRTOptions) -> Attend:
    """How native attention is computed."""
    if options.context_fmha in ("disable", "fp32_acc"):
        return layered_attention(float32=options.context_fmha == "fp32_acc")
    return fused_attention(only=options.fused_attention_only or options.context_fmha == "enable")


def plugin_lowerings(
    options: TensorRTOptions, flavour: Flavour, build: BuildConfig
) -> dict[str, PluginLowering]:
    """Lowerings that plugins bring for the ops that the options name. Raises BuildError when no plugin has one."""
    asked = [
        op for op, on in (("attention", options.attention_plugin), ("embedding", options.lookup_plugin)) if on
    ]
    brought = plugins().tensorrt_plugins(flavour.name, build)
    for op in asked:
        if op not in brought:
            raise BuildError(f"no installed plugin of trtc brings a TensorRT plugin for op {op} to {flavour}")
    own = {op: lower for op, lower in brought.items() if op not in ("attention", "embedding")}
    return own | {op: brought[op] for op in asked}


def _brought(options: TensorRTOptions, build: BuildConfig) -> Set[str]:
    """Ops that plugins lower. Where TensorRT is not installed, which is said when a plan is made, they may lower any."""
    try:
        return plugins().tensorrt_plugins(find_flavour(options.flavour).name, build).keys()
    except TargetError:
        return op_names()


TARGET = TensorRTTarget()
