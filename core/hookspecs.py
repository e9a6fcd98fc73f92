"""Everything a plugin can implement: the hooks, called by keyword, that make up the plugin interface.

A plugin is a module (or object) named by an entry point of group `trtc`; the entry point's name is the
family's name. It marks its functions with `@hookimpl`. Implementations may take fewer arguments than a hook
offers. A family implements the first four hooks; the others are optional. What a hook raises is reported with
the plugin's name; raise a TrtcError (ConfigError, ...) to say it in words of your own. docs/plugins.md shows
each with an example.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pluggy

from .config import BuildConfig, ModelConfig
from .graph import GraphBuilder, Node
from .ops import Op
from .weights import WeightTable

PROJECT = "trtc"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec(firstresult=True)
def trtc_architectures() -> list[str]:  # type: ignore[empty-body]
    """The values of `architectures` in config.json that this family owns, e.g. ["GPT2LMHeadModel"].

    Called once, when the plugin is loaded: keep it free of heavy imports.
    """


@hookspec(firstresult=True)
def trtc_model_config(hf_config: Mapping[str, Any], family: str) -> ModelConfig:  # type: ignore[empty-body]
    """Hugging Face config.json -> ModelConfig (or a frozen dataclass derived from it).

    Called once for each checkpoint of the family. `family` is the plugin's name, to be put into the result.
    Raises ConfigError for a value the family does not support (`core.hf_config.HFConfigReader` helps).
    """


@hookspec(firstresult=True)
def trtc_weight_table(config: ModelConfig) -> WeightTable:  # type: ignore[empty-body]
    """The declarative map from checkpoint names to the names the composition uses, with shapes and sharding.

    Called for every conversion and build, with what `trtc_model_config` returned.
    """


@hookspec(firstresult=True)
def trtc_compose(config: ModelConfig, g: GraphBuilder) -> str:  # type: ignore[empty-body]
    """Builds the graph with `core.layers` and returns the name of the logits tensor (of `layers.lm_head`).

    Called for every rank of a build, with an empty builder that knows the weights of the table. The whole
    model is composed, as if for one rank: sharding, folding and fusing are passes of the core.
    Raises GraphError, naming the node, when something does not fit (`g` does it for you).
    """


@hookspec(firstresult=True)
def trtc_ops() -> list[Op]:  # type: ignore[empty-body]
    """Ops of the plugin's own, each with shape rule and torch reference; the CPU target runs the reference.

    Called once, when the plugin is loaded. An op whose name is taken is an error of the plugin.
    """


@hookspec(firstresult=True)
def trtc_kernels(target: str) -> dict[str, Callable[[Node], Callable[..., Any]]] | None:
    """Kernels for `target` ("cpu", "cuda"), as a dict: op name -> function of a node that returns the op's
    implementation there, itself called with the op's input tensors. They come before the target's own.

    Called when an engine is loaded; None where the plugin has nothing for `target`.
    """


@hookspec(firstresult=True)
def trtc_tensorrt_plugins(flavour: str, build: BuildConfig) -> dict[str, Callable[..., Any]] | None:
    """Lowering to TensorRT for `flavour` ("tensorrt", "tensorrt_rtx": the module), as a dict: op name -> function
    `(network, node, inputs) -> outputs` that adds layers, or a custom layer (a TensorRT plugin), to the
    `INetworkDefinition`; inputs (None where an optional one is absent) and outputs are its tensors. They come before the
    target's own; those for `attention` and `embedding` only where the build asks for plugins in their place.

    build: what the engine is built for. Called when an engine is built; None where the plugin has nothing for `flavour`.
    """
