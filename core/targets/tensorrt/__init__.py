"""The TensorRT target, for both flavours of its API: graph -> network definition -> plan."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...config import BuildConfig
from ...dtypes import MODEL_DTYPES
from ...graph import Graph
from ...passes.fuse import SIBLINGS
from ..base import Capabilities
from .build import build_plan
from .flavour import find_flavour
from .lower import LOWERINGS, LoweringOptions, lower_graph
from .options import TensorRTOptions


class TensorRTTarget:
    """Engines whose file for a rank is a TensorRT plan, `rank{r}.plan`, with the weights inside."""

    name = "tensorrt"
    embeds_weights = True

    def capabilities(self, build: BuildConfig) -> Capabilities:
        """Joined linear layers are asked for, the other fusions TensorRT does by itself.

        Raises ConfigError for options that TensorRT does not know.
        """
        TensorRTOptions.from_json(build.target_options)
        return Capabilities(
            frozenset(LOWERINGS), frozenset({SIBLINGS}), frozenset(MODEL_DTYPES), tensor_parallel=True
        )

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
        lowering = LoweringOptions(
            kv_capacity=build.max_seq_len, fused_attention_only=options.fused_attention_only
        )
        plan = build_plan(lower_graph(graph, weights, flavour, lowering), build, options)
        path = directory / f"rank{rank}.plan"
        plan.write(path)
        return {"plan": path.name, **plan.description}


TARGET = TensorRTTarget()
