"""Linear layer for 1 to 64 rows, bound by the one read of its weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..contract import addresses_and_key, check_tensor, element_type
from ..errors import KernelContractError
from ..launch import BoundKernel, tensor_map
from ..library import KernelLibrary
from .choice import choose_plan, outruns_cublas
from .formats import FLOAT
from .multicast_plan import MULTICAST_SIGNATURE, MulticastPlan
from .plan import (
    ACTIVATIONS,
    MAX_ROWS,
    MAX_STREAM_ROWS,
    NORMS,
    STREAM_SIGNATURE,
    TILE_SIGNATURE,
    WARPGROUP_SIGNATURE,
    Plan,
    StreamPlan,
    TilePlan,
    WarpgroupPlan,
    check_sizes,
    sources,
)
from .quantized_warpgroup_plan import QUANTIZED_WARPGROUP_SIGNATURE, QuantizedWarpgroupPlan
from .stripe_plan import STRIPE_SIGNATURE, StripePlan

if TYPE_CHECKING:
    import torch

__all__ = [
    "ACTIVATIONS",
    "FLOAT",
    "MAX_ROWS",
    "MAX_STREAM_ROWS",
    "NORMS",
    "Linear",
    "Norm",
    "Plan",
    "choose_plan",
    "outruns_cublas",
    "sources",
    "weight_sums",
]

ELEMENTS = ("float16", "bfloat16")
SIGNATURES = {
    StreamPlan: STREAM_SIGNATURE,
    TilePlan: TILE_SIGNATURE,
    WarpgroupPlan: WARPGROUP_SIGNATURE,
    MulticastPlan: MULTICAST_SIGNATURE,
    QuantizedWarpgroupPlan: QUANTIZED_WARPGROUP_SIGNATURE,
    StripePlan: STRIPE_SIGNATURE,
}


@dataclass(frozen=True)
class Norm:
    """A norm of the rows of x, fused in front of a linear layer.

    A norm's scale g and shift s belong into the layer, W' = W * g and b' = b + W s, except where integer weights have no room
    for them.
    weight_sums: [out_features] float32, `weight_sums(W')`, for kind "layer"; None for kind "rms", and for kernels that norm x
                 before the product (`StripePlan`).
    scale, shift: [in_features] in the dtype of x, or None; for those kernels only.
    """

    weight_sums: torch.Tensor | None
    kind: str = "layer"
    epsilon: float = 1e-5
    scale: torch.Tensor | None = None
    shift: torch.Tensor | None = None

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        return self.weight_sums, self.scale, self.shift


def weight_sums(weight: torch.Tensor) -> torch.Tensor:
    """The sum of each row of [out_features, in_features], in float32, as `Norm` wants it."""
    import torch

    return weight.sum(dim=1, dtype=torch.float32)


class Linear:
    """Launcher of the linear kernels; see `__call__`. One per device and thread."""

    def __init__(self, library: KernelLibrary) -> None:
        self._library = library
        self._bound: dict[tuple[object, ...], tuple[Plan, BoundKernel]] = {}

    def __call__(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        out: torch.Tensor,
        residual: torch.Tensor | None = None,
        activation: str = "none",
        norm: Norm | None = None,
        dependent: bool = True,
        plan: Plan | None = None,
    ) -> torch.Tensor:
        """`activation(norm(x) @ weight.T + bias) + residual`, written to `out`, on torch's current stream.

        x:        [rows, in_features]          float16 or bfloat16; rows 1 to 64, in_features a multiple of 8
        weight:   [out_features, in_features]  dtype of x
        bias:     [out_features]               dtype of x, or None
        residual: [rows, out_features]         dtype of x, or None; may be `out`
        out:      [rows, out_features]         dtype of x
        activation: a key of ACTIVATIONS.
        norm:     for up to MAX_STREAM_ROWS rows. It is applied to the sums, so that the normed x is not rounded; a row's
                  mean should be less than about 50 of its standard deviations.
        dependent: programmatic dependent launch: the weight is loaded while the predecessor still runs, so that the
                   predecessor must not be what writes the weight.
        plan:     overrides `choose_plan`, for measurements.
        Sums are float32 and rounded once. The result of a row depends neither on timing nor on the other rows' values.
        Raises KernelContractError for tensors that do not fit; DeviceError without a GPU.
        """
        rows, columns = x.shape
        features = weight.shape[0]
        normed = norm.tensors if norm else (None,)
        addresses, contract = addresses_and_key((out, x, weight, bias, residual, *normed))
        key = (contract, activation, norm.kind if norm else None, dependent, plan)
        found = self._bound.get(key)
        if found is None:
            self._check(x, weight, bias, residual, out, activation, norm)
            found = self._bound[key] = self._bind(x, rows, features, columns, norm, dependent, plan)
        plan, kernel = found
        epsilon = norm.epsilon if norm else 0.0
        kernel(*_arguments(plan, addresses, x, features, ACTIVATIONS[activation], epsilon))
        return out

    def _bind(
        self, x: torch.Tensor, rows: int, features: int, columns: int, norm: Norm | None, dependent: bool,
        plan: Plan | None,
    ) -> tuple[Plan, BoundKernel]:  # fmt: skip
        library = self._library
        plan = plan or choose_plan(
            rows, features, columns, norm=norm.kind if norm else "none", capability=library.capability,
            multiprocessors=library.multiprocessors,
        )  # fmt: skip
        entry, shape = plan.entry(element_type("linear", x, ELEMENTS)), plan.launch_shape(dependent)
        return plan, library.bind(plan.source, entry, SIGNATURES[type(plan)], shape)

    @staticmethod
    def _check(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        out: torch.Tensor,
        activation: str,
        norm: Norm | None,
    ) -> None:
        element_type("linear", x, ELEMENTS)
        rows, columns = x.shape
        features = weight.shape[0]
        check_sizes(rows, columns, features)
        sizes = {"out_features": features, "in_features": columns}
        check_epilogue("linear", x, features, bias, residual, out, activation, norm)
        check_tensor("linear", "weight", weight, x.dtype, sizes, x)


def _arguments(
    plan: Plan, addresses: Sequence[int], x: torch.Tensor, features: int, activation: int, epsilon: float
) -> tuple[float | bytes, ...]:
    """What the kernel of `plan` takes, in order. addresses: of out, x, weight, bias, residual and the weight's sums."""
    out, at_x, weight, bias, residual, sums, *_ = addresses
    rows, columns = x.shape
    sizes = (rows, features, columns)
    if isinstance(plan, StreamPlan):
        return (out, at_x, weight, 0, bias, residual, sums, *sizes, activation, epsilon)
    if isinstance(plan, TilePlan):
        share = (plan.features_per_block, plan.columns_per_block)
        return (out, at_x, weight, 0, bias, residual, *sizes, *share, activation)
    dtype = str(x.dtype).removeprefix("torch.")
    weight_map = tensor_map(weight, dtype, features, columns, plan.features_per_block)
    if isinstance(plan, WarpgroupPlan):
        x_map = tensor_map(at_x, dtype, rows, columns, plan.tokens)
        share = (plan.features_per_block, plan.columns_per_block)
        return (out, bias, residual, weight_map, x_map, *sizes, *share, activation, plan.stages)
    x_map = tensor_map(at_x, dtype, rows, columns, plan.tile_rows // plan.copies)
    stages = (plan.tile_rows, plan.weight_stages, plan.row_stages)
    return (out, bias, residual, weight_map, x_map, *sizes, plan.columns_per_block, activation, *stages)


def check_epilogue(
    op: str,
    x: torch.Tensor,
    features: int,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    activation: str,
    norm: Norm | None,
    *,
    norms_rows: bool = False,
) -> None:
    """Raise KernelContractError unless everything but the weight fits x [rows, in_features] and `features`.

    norms_rows: the kernel norms x before the product, not the sums after it.
    """
    import torch

    if activation not in ACTIVATIONS:
        raise KernelContractError(
            f"{op}: activation {activation!r} is unknown; accepted: {', '.join(ACTIVATIONS)}"
        )
    if norm and norm.kind not in ("layer", "rms"):
        raise KernelContractError(f"{op}: norm {norm.kind!r} is unknown; accepted: layer, rms")
    rows, columns = x.shape
    row_sizes = {"rows": rows, "out_features": features}
    for name, tensor, sizes in (
        ("x", x, {"rows": rows, "in_features": columns}),
        ("bias", bias, {"out_features": features}),
        ("residual", residual, row_sizes),
        ("out", out, row_sizes),
    ):
        if tensor is not None:
            check_tensor(op, name, tensor, x.dtype, sizes, x)
    if norm and norms_rows:
        for name, tensor in (("norm.scale", norm.scale), ("norm.shift", norm.shift)):
            if tensor is not None:
                check_tensor(op, name, tensor, x.dtype, {"in_features": columns}, x)
    elif norm and (norm.scale is not None or norm.shift is not None):
        raise KernelContractError(
            f"{op}: the kernel for these sizes norms without scale and shift; fold them into the weight"
        )
    elif norm and norm.kind == "layer":
        if norm.weight_sums is None:
            raise KernelContractError(
                f"{op}: a layer norm needs weight_sums, the float32 sums of the weight's rows"
            )
        check_tensor(op, "norm.weight_sums", norm.weight_sums, torch.float32, {"out_features": features}, x)
