"""Network -> plan: builder configuration, optimization profiles, and the build itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...config import BuildConfig
from .attention import PAST_LENGTH
from .network import Network
from .options import TensorRTOptions

Range = tuple[int, int, int]
"""Smallest size, the one to optimize for, largest."""


@dataclass(frozen=True)
class Profile:
    """Sizes that one set of kernels is chosen for: B sequences of S (padded) new tokens each, or T packed ones in all."""

    name: str
    batch: Range
    length: Range | None = None
    tokens: Range | None = None

    def to_json(self) -> dict[str, Any]:
        sizes = {"batch": self.batch, "length": self.length, "tokens": self.tokens}
        return {"name": self.name, **{key: list(size) for key, size in sizes.items() if size is not None}}


def profiles(build: BuildConfig) -> tuple[Profile, ...]:
    """Decode, then prefill.

    Two profiles and not a shared one: S = 1 lets TensorRT take kernels for vectors, and the batch of padded prompts is
    bounded so that B * S keeps within max_num_tokens, where a shared profile would have to reserve activation memory
    for max_batch_size prompts of max_input_len. A step that holds both kinds of sequences, or more prompts than the
    prefill profile takes, is run as several.
    """
    length = min(build.max_input_len, build.max_num_tokens)
    batch = min(build.max_batch_size, build.max_num_tokens // length)
    return (
        Profile("decode", (1, build.max_batch_size, build.max_batch_size), (1, 1, 1)),
        Profile("prefill", (1, batch, batch), (1, length, length)),
    )


def packed_profiles(build: BuildConfig) -> tuple[Profile, ...]:
    """Decode, one token for each sequence, then prefill: any step that the engine takes."""
    batch = (1, build.max_batch_size, build.max_batch_size)
    return (
        Profile("decode", batch, tokens=batch),
        Profile("prefill", batch, tokens=(1, build.max_num_tokens, build.max_num_tokens)),
    )


@dataclass(frozen=True)
class Plan:
    """A serialized engine, and what a runtime has to know to use it. `data` supports the buffer protocol."""

    data: Any
    description: dict[str, Any]
    """JSON: flavour, version, compute capabilities, profiles, and the inputs and outputs by name."""

    @property
    def nbytes(self) -> int:
        return int(self.data.nbytes)

    def write(self, path: Path) -> None:
        with path.open("wb") as file:
            file.write(memoryview(self.data))


def build_plan(network: Network, build: BuildConfig, options: TensorRTOptions) -> Plan:
    """Builds `network`. Raises BuildError with TensorRT's own reasons when it cannot be built."""
    options.require(network.flavour)
    chosen = packed_profiles(build) if options.attention_plugin else profiles(build)
    config = _builder_config(network, options)
    for profile in chosen:
        _add_profile(network, config, profile, build)
    data = network.builder.build_serialized_network(network.definition, config)
    if data is None:
        hint = (
            " (strip_plan and refit may need a GPU to build)" if options.strip_plan or options.refit else ""
        )
        raise network.log.error(f"{network.flavour} cannot build the network{hint}")
    if options.timing_cache is not None:
        Path(options.timing_cache).write_bytes(memoryview(config.get_timing_cache().serialize()))
    return Plan(data, _describe(network, chosen, options))


def _builder_config(network: Network, options: TensorRTOptions) -> Any:
    trt, config = network.trt, network.builder.create_builder_config()
    config.builder_optimization_level = options.optimization_level
    flags = {
        trt.BuilderFlag.TF32: options.tf32,
        trt.BuilderFlag.WEIGHT_STREAMING: options.weight_streaming,
        trt.BuilderFlag.STRIP_PLAN: options.strip_plan,
        trt.BuilderFlag.REFIT: options.refit,
    }
    for flag, wanted in flags.items():
        (config.set_flag if wanted else config.clear_flag)(flag)
    if network.plugins:
        config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    if options.compute_capabilities:
        _target_gpus(trt, config, options.compute_capabilities)
    if options.timing_cache is not None:
        file = Path(options.timing_cache)
        cache = config.create_timing_cache(file.read_bytes() if file.exists() else b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
    return config


def _target_gpus(trt: Any, config: Any, compute_capabilities: Sequence[str]) -> None:
    """Exists in flavours that build ahead of time only; `TensorRTOptions.require` has checked that."""
    config.num_compute_capabilities = len(compute_capabilities)
    for i, capability in enumerate(compute_capabilities):
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{capability.replace('.', '')}"), i)


def _add_profile(network: Network, config: Any, profile: Profile, build: BuildConfig) -> None:
    """Shapes of every input for the smallest, the usual and the largest step; the last asks logits of B rows."""
    trt_profile = network.builder.create_optimization_profile()
    for i in range(network.definition.num_inputs):
        tensor = network.definition.get_input(i)
        trt_profile.set_shape(tensor.name, *(_shape(tensor, profile, build, which) for which in range(3)))
    if config.add_optimization_profile(trt_profile) < 0:
        raise network.log.error(f"{network.flavour} refuses the {profile.name} profile {profile}")


def _shape(tensor: Any, profile: Profile, build: BuildConfig, which: int) -> tuple[int, ...]:
    """Smallest (0), usual (1) or largest (2) shape of an input; by its name, see attention.py and packed.py."""
    batch, name, rest = profile.batch[which], tensor.name, tuple(tensor.shape)[1:]
    if name in ("token_ids", "positions"):
        if profile.length is not None:
            return (batch, profile.length[which])
        assert profile.tokens is not None
        return (profile.tokens[which],)
    if name in (PAST_LENGTH, "logits_index", "kv_length"):
        return (batch,)
    if name == "query_start":
        return (batch + 1,)
    pages = -(-build.max_seq_len // build.page_size) if which else 1
    if name == "page_table":
        return (batch, pages)
    return (batch if profile.length is not None else pages * batch, *rest)


def _describe(network: Network, chosen: Sequence[Profile], options: TensorRTOptions) -> dict[str, Any]:
    definition = network.definition
    inputs = [definition.get_input(i) for i in range(definition.num_inputs)]
    outputs = [definition.get_output(i) for i in range(definition.num_outputs)]
    return {
        "flavour": network.flavour.name,
        "version": network.flavour.version,
        "compute_capabilities": list(options.compute_capabilities),
        "profiles": [profile.to_json() for profile in chosen],
        "plugins": list(network.plugins),
        "layers": definition.num_layers,
        "inputs": {tensor.name: _type(tensor) for tensor in inputs},
        "outputs": {tensor.name: _type(tensor) for tensor in outputs},
        "logits": outputs[-1].name,
    }


def _type(tensor: Any) -> list[Any]:
    return [tensor.dtype.name, list(tensor.shape)]
