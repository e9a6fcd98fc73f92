"""The two flavours of the one TensorRT API: the data-centre libraries and TensorRT-RTX.

Nothing else in this package imports either module: what a flavour has is asked here, once, and passes and lowering
ask the answer, never the name.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

from ...errors import TargetError

FLAVOURS = ("tensorrt", "tensorrt_rtx")
"""Names of the flavours, which are also the names of their Python modules, in the order in which they are tried."""

_INSTALL = {
    "tensorrt": "pip install 'trtc[tensorrt]'",
    "tensorrt_rtx": "pip install 'trtc[tensorrt-rtx]'",
}


@dataclass(frozen=True)
class Flavour:
    """One TensorRT module, and what it can do."""

    name: str
    trt: Any
    """The module. Typed Any: its classes come from compiled bindings without stubs."""
    version: str
    compute_capabilities: tuple[str, ...]
    """GPUs that plans can be made for without having one, as `8.9`; empty: a plan is for the GPU it is built on."""
    plugins: bool
    """Whether a network can have custom plugins."""
    native_attention: bool
    """Whether there are attention and KV-cache layers with lengths as tensors."""
    timing_cache: bool
    """Whether the builder measures kernels and can keep what it measured."""

    def __str__(self) -> str:
        return f"{self.name} {self.version}"

    @classmethod
    def of_module(cls, trt: ModuleType) -> Flavour:
        """What `trt` can do, read from the module itself."""
        config, network = trt.IBuilderConfig, trt.INetworkDefinition
        ahead_of_time = hasattr(config, "set_compute_capability")
        return cls(
            name=trt.__name__,
            trt=trt,
            version=trt.__version__,
            compute_capabilities=_selectable(trt.ComputeCapability) if ahead_of_time else (),
            plugins=hasattr(network, "add_plugin_v3"),
            native_attention=(
                hasattr(network, "add_kv_cache_update")
                and hasattr(network, "add_attention_v2")
                and hasattr(trt.IAttention, "key_value_lengths")
            ),
            timing_cache=not ahead_of_time,
        )


def _selectable(enum: Any) -> tuple[str, ...]:
    """`SM89` -> `8.9`: the members that name a GPU; NONE and CURRENT do not."""
    digits = [name.removeprefix("SM") for name in enum.__members__ if name.startswith("SM")]
    return tuple(f"{text[:-1]}.{text[-1]}" for text in digits)


@cache
def find_flavour(name: str | None = None) -> Flavour:
    """The installed flavour called `name`; without a name, the first one installed.

    Raises TargetError, with the command that installs it, when it is not there or its libraries do not load.
    """
    if name is not None and name not in FLAVOURS:
        raise TargetError(f"TensorRT flavour {name!r} is not known; accepted: {', '.join(FLAVOURS)}")
    reasons = []
    for candidate in FLAVOURS if name is None else (name,):
        try:
            return Flavour.of_module(importlib.import_module(candidate))
        except (ImportError, OSError) as error:
            reasons.append(f"{candidate}: {error} ({_INSTALL[candidate]})")
    raise TargetError(f"no TensorRT on this machine: {'; '.join(reasons)}")
