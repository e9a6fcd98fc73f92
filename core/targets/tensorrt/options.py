"""Build options that only TensorRT knows: the `target_options` of a BuildConfig."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...config import checked_fields
from ...errors import BuildError, ConfigError
from .flavour import FLAVOURS, Flavour

OPTIMIZATION_LEVELS = range(6)
CONTEXT_FMHA = ("disable", "enable", "fp32_acc")
SWITCHES = (
    "tf32", "fused_attention_only", "attention_plugin", "lookup_plugin", "weight_streaming", "strip_plan", "refit",
)  # fmt: skip
_WHERE = "tensorrt target options"


@dataclass(frozen=True, kw_only=True)
class TensorRTOptions:
    """How TensorRT shall build. The values are checked here; whether a flavour has them, in `require`."""

    flavour: str | None = None
    """`tensorrt` or `tensorrt_rtx`; None takes the one that is installed."""
    compute_capabilities: tuple[str, ...] = ()
    """GPUs that one plan is for, as `8.9`; none: the default (TensorRT-RTX: 8.0, 8.6, 8.9, 12.0 and later)."""
    optimization_level: int = 3
    """0 builds fastest, 5 looks longest for fast kernels. TensorRT-RTX looks when the engine starts, not here."""
    tf32: bool = False
    """Lets float32 matrix products round their inputs to 10 bits of mantissa. No effect on 16-bit models."""
    fused_attention_only: bool = False
    """Refuse a model that TensorRT has no fused attention kernel for, rather than compute it in several kernels.
    TensorRT-RTX 1.7 has none for float32, for fewer than 4 heads a rank, and for head_dim 8."""
    context_fmha: str | None = None
    """`enable`: fused attention or none, as `fused_attention_only`, in the attention plugin with float16 sums; `fp32_acc`:
    sums in float32; `disable`: products and softmax as layers of their own. None: TensorRT decides; in the plugin, fp32_acc."""
    attention_plugin: bool = False
    """Attention over the paged cache by the plugin that the model's family brings. `tensorrt` only."""
    lookup_plugin: bool = False
    """Embedding lookup by the plugin that the model's family brings. `tensorrt` only."""
    weight_streaming: bool = False
    """A plan whose weights may stay in host memory, up to a budget that the runtime sets."""
    strip_plan: bool = False
    """A plan without weights, to be refitted where it runs. TensorRT-RTX 1.7 does this only where a GPU is."""
    refit: bool = False
    """A plan whose weights can be replaced. TensorRT-RTX 1.7: as above."""
    timing_cache: str | None = None
    """File with kernel timings of earlier builds: read if it exists, written after the build."""

    def __post_init__(self) -> None:
        if self.flavour is not None and self.flavour not in FLAVOURS:
            raise ConfigError(
                f"{_WHERE}: flavour {self.flavour!r} is not known; accepted: {', '.join(FLAVOURS)}"
            )
        for switch in SWITCHES:
            if not isinstance(getattr(self, switch), bool):
                raise ConfigError(f"{_WHERE}: {switch} is {getattr(self, switch)!r}; accepted: true, false")
        if not all(isinstance(c, str) and re.fullmatch(r"\d+\.\d", c) for c in self.compute_capabilities):
            raise ConfigError(
                f"{_WHERE}: compute_capabilities is {list(self.compute_capabilities)}; accepted: a list as ['8.9']"
            )
        if self.context_fmha not in (None, *CONTEXT_FMHA):
            raise ConfigError(
                f"{_WHERE}: context_fmha is {self.context_fmha!r}; accepted: {', '.join(CONTEXT_FMHA)}"
            )
        layered = "disable" if self.attention_plugin else ("disable", "fp32_acc")
        if (self.attention_plugin or self.fused_attention_only) and (self.context_fmha or "-") in layered:
            fused = "attention_plugin" if self.attention_plugin else "fused_attention_only"
            raise ConfigError(
                f"{_WHERE}: context_fmha {self.context_fmha} computes attention in several layers, {fused} in one kernel; "
                f"leave one of them out"
            )
        if self.optimization_level not in OPTIMIZATION_LEVELS:
            raise ConfigError(
                f"{_WHERE}: optimization_level is {self.optimization_level!r}; accepted: 0 to 5"
            )
        if len(set(self.compute_capabilities)) != len(self.compute_capabilities):
            raise ConfigError(
                f"{_WHERE}: compute_capabilities names a GPU twice: {', '.join(self.compute_capabilities)}"
            )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TensorRTOptions:
        """From JSON values. Raises ConfigError for unknown names and bad values."""
        values = checked_fields(cls, data, _WHERE)
        return cls(**values | {"compute_capabilities": tuple(values.get("compute_capabilities", ()))})

    def require(self, flavour: Flavour) -> None:
        """Raises BuildError, saying what to do instead, for an option that `flavour` does not have."""
        unknown = [c for c in self.compute_capabilities if c not in flavour.compute_capabilities]
        if unknown and not flavour.compute_capabilities:
            raise BuildError(f"{flavour} builds for the GPU it runs on; leave compute_capabilities out")
        if unknown:
            accepted = ", ".join(flavour.compute_capabilities)
            raise BuildError(
                f"{flavour} makes no plan for compute capability {', '.join(unknown)}; accepted: {accepted}"
            )
        for name in ("attention_plugin", "lookup_plugin"):
            if getattr(self, name) and not flavour.plugins:
                raise BuildError(
                    f"{flavour} takes no custom plugins; leave {name} out, or use flavour tensorrt"
                )
        if self.timing_cache is not None and not flavour.timing_cache:
            raise BuildError(f"{flavour} times no kernels while it builds; leave timing_cache out")
