"""The OPT family (OPTForCausalLM, 125M to 66B). Source: arXiv:2205.01068 and the Hugging Face implementation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ...core.config import BuildConfig
from ...core.graph import GraphBuilder
from ...core.hookspecs import hookimpl
from ...core.weights import WeightTable
from .config import OptConfig, read_config
from .model import compose
from .weights import weight_table


@hookimpl
def trtc_architectures() -> list[str]:
    return ["OPTForCausalLM", "OPTModel"]


@hookimpl
def trtc_model_config(hf_config: Mapping[str, Any], family: str) -> OptConfig:
    return read_config(hf_config, family)


@hookimpl
def trtc_weight_table(config: OptConfig) -> WeightTable:
    return weight_table(config)


@hookimpl
def trtc_compose(config: OptConfig, g: GraphBuilder) -> str:
    return compose(config, g)


@hookimpl
def trtc_tensorrt_plugins(flavour: str, build: BuildConfig) -> dict[str, Callable[..., Any]] | None:
    if flavour != "tensorrt":
        return None
    from .tensorrt_plugins import lowerings

    return lowerings(build)
