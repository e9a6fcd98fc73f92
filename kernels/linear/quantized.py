"""Linear layers with integer weights: fused for 1 to 64 rows, dequantized for more."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..contract import addresses_and_key, check_tensor, element_type, pointer
from ..errors import KernelContractError
from ..launch import BoundKernel, LaunchShape, tensor_map
from ..library import KernelLibrary
from ..nvrtc import KernelSource
from . import ELEMENTS, SIGNATURES, Norm, check_epilogue
from .formats import WEIGHTS, StoredWeight, int4_name, interleave_int4
from .plan import ACTIVATIONS, FOLDER, StreamPlan, check_sizes
from .quantized_plan import QuantizedPlan, choose_quantized
from .quantized_warpgroup_plan import QuantizedWarpgroupPlan
from .stripe_plan import StripePlan

if TYPE_CHECKING:
    import torch

OP = "quantized linear"
DEQUANTIZE_SIGNATURE = "PPPii"
_DEQUANTIZE_THREADS, _PIECES_PER_THREAD = 256, 4


def for_kernels(
    integers: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight as engines store it -> as these kernels read it: rows padded, four-bit integers interleaved.

    integers: int8 or float8_e4m3fn [out, in], or uint8 [out, in / 2] with two of four bits each; scale: [out], or
        [out, groups]; zero: int8 of the shape of scale, of four-bit integers.
    In place where no padding is needed; scales with zeros become [out, groups, 2].
    """
    import torch

    if zero is not None:
        scale = torch.stack((scale, zero.to(scale.dtype)), dim=-1)
    stored = stored_format(integers, scale)
    columns = integers.shape[1] * 8 // stored.bits
    missing = stored.padded(columns) - columns
    if missing:
        integers = _widened(integers, missing * stored.bits // 8)
        if stored.group is not None:
            values = 2 if stored.zeros else 1
            scale = _widened(scale.flatten(1), values * missing // stored.group)
            scale = scale.view(len(scale), -1, 2) if stored.zeros else scale
    if stored.bits == 4:
        integers.copy_(interleave_int4(integers))
    return integers, scale


def _widened(tensor: torch.Tensor, columns: int) -> torch.Tensor:
    """`tensor` with so many columns of zeros more."""
    import torch

    plain = tensor.view(torch.uint8) if tensor.itemsize == 1 else tensor  # not every operation knows float8
    return torch.cat((plain, plain.new_zeros(tensor.shape[0], columns)), dim=1).view(tensor.dtype)


def stored_format(integers: torch.Tensor, scale: torch.Tensor) -> StoredWeight:
    """Which format a weight has. Raises KernelContractError for one that there is no kernel for."""
    import torch

    found = None
    if scale.dim() == 1:
        found = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}.get(integers.dtype)
    elif integers.dtype is torch.uint8 and (scale.dim() == 2 or scale.shape[2:] == (2,)) and scale.shape[1]:
        group, rest = divmod(2 * integers.shape[1], scale.shape[1])
        found = None if rest else int4_name(group, zeros=scale.dim() == 3)
    if found is None or found not in WEIGHTS:
        raise KernelContractError(
            f"quantized linear: integers {integers.dtype} {list(integers.shape)} with scales {list(scale.shape)} are not "
            f"supported; accepted: {', '.join(list(WEIGHTS)[1:])}"
        )
    return WEIGHTS[found]


class QuantizedLinear:
    """Launcher of the linear kernels for integer weights; see `__call__`. One per device and thread."""

    def __init__(self, library: KernelLibrary) -> None:
        self._library = library
        self._bound: dict[tuple[object, ...], tuple[QuantizedPlan, BoundKernel]] = {}

    def __call__(
        self,
        x: torch.Tensor,
        integers: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        out: torch.Tensor,
        residual: torch.Tensor | None = None,
        activation: str = "none",
        norm: Norm | None = None,
        dependent: bool = True,
        plan: QuantizedPlan | None = None,
    ) -> torch.Tensor:
        """`activation(norm(x) @ W.T + bias) + residual` with W = integers * scale, as `Linear` has it.

        integers: int8 or float8_e4m3fn [out_features, in_features] or uint8 [out_features, in_features / 2], from
                  `for_kernels`
        scale:    [out_features], for int4 [out_features, groups], with zeros [out_features, groups, 2]; dtype of x
        The rest as in `Linear`; `norm.weight_sums` are those of W. A norm has weights of its own where `norms_quantized_input`
        says so. Integers and e4m3 numbers are exact in the product; scales are applied to float32 sums: of a group for int4,
        else of a row. For 17 to 64 rows on Hopper a group's scale is multiplied into its weights, rounded to the dtype of x.
        Raises KernelContractError for tensors that do not fit; DeviceError without a GPU.
        """
        rows, columns = x.shape
        features = integers.shape[0]
        normed = norm.tensors if norm else (None, None, None)
        addresses, contract = addresses_and_key((out, x, integers, scale, bias, residual, *normed))
        key = (contract, activation, norm.kind if norm else None, dependent, plan)
        found = self._bound.get(key)
        if found is None:
            stored = self._check(x, integers, scale)
            weighted = norm is not None and (norm.scale is not None or norm.shift is not None)
            norms_rows = isinstance(plan, StripePlan) or weighted
            check_epilogue(OP, x, features, bias, residual, out, activation, norm, norms_rows=norms_rows)
            plan = plan or self._choose(rows, features, columns, stored, norm)
            if weighted and not isinstance(plan, StripePlan):
                raise KernelContractError(
                    f"{OP}: no kernel for {rows} rows times {stored.name} [{features}, {columns}] norms with weights"
                )
            found = self._bound[key] = self._bind(x, stored, dependent, plan)
        plan, kernel = found
        *addresses, sums, norm_scale, norm_shift = addresses
        code, epsilon = ACTIVATIONS[activation], norm.epsilon if norm else 0.0
        if isinstance(plan, StreamPlan):
            kernel(*addresses, sums, rows, features, columns, code, epsilon)
            return out
        if isinstance(plan, StripePlan):
            kernel(
                *addresses, norm_scale, norm_shift, rows, features, columns, code, plan.early_steps, epsilon
            )
            return out
        sizes = (rows, features, columns, plan.features_per_block, plan.columns_per_block, code)
        if isinstance(plan, QuantizedWarpgroupPlan):
            first, at_x, *others = addresses
            x_map = tensor_map(at_x, str(x.dtype).removeprefix("torch."), rows, columns, plan.tokens)
            kernel(first, *others, x_map, *sizes, plan.row_stages)
            return out
        kernel(*addresses, *sizes)
        return out

    def _choose(
        self, rows: int, features: int, columns: int, stored: StoredWeight, norm: Norm | None
    ) -> QuantizedPlan:
        return choose_quantized(
            rows, features, columns, norm=norm.kind if norm else "none", capability=self._library.capability,
            multiprocessors=self._library.multiprocessors, weight=stored.name,
        )  # fmt: skip

    def _bind(
        self, x: torch.Tensor, stored: StoredWeight, dependent: bool, plan: QuantizedPlan
    ) -> tuple[QuantizedPlan, BoundKernel]:
        assert plan.weight == stored.name
        entry, shape = plan.entry(element_type(OP, x, ELEMENTS)), plan.launch_shape(dependent)
        return plan, self._library.bind(plan.source, entry, SIGNATURES[type(plan)], shape)

    @staticmethod
    def _check(x: torch.Tensor, integers: torch.Tensor, scale: torch.Tensor) -> StoredWeight:
        element_type(OP, x, ELEMENTS)
        rows, columns = x.shape
        check_sizes(rows, columns, integers.shape[0])
        return check_weight(OP, integers, scale, columns, x)


class Dequantize:
    """Launcher of the kernel that makes a float matrix of an integer weight; see `__call__`."""

    def __init__(self, library: KernelLibrary) -> None:
        self._library = library

    def __call__(self, integers: torch.Tensor, scale: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        """`integers * scale`, rounded once, written to `out` [out_features, in_features] on torch's current stream.

        integers, scale: as `QuantizedLinear` takes them, scales in the dtype of `out`. in_features is a multiple of 8.
        """
        element = element_type("dequantize", out, ELEMENTS)
        features, columns = out.shape
        check_sizes(1, columns, features)
        stored = check_weight("dequantize", integers, scale, columns, out)
        check_tensor(
            "dequantize", "out", out, out.dtype, {"out_features": features, "in_features": columns}, out
        )
        if integers.shape[0] != features:
            raise KernelContractError(f"dequantize: {integers.shape[0]} rows of integers, out has {features}")
        kernel = self._library.kernel(
            dequantize_source(), dequantize_entry(element, stored.name), DEQUANTIZE_SIGNATURE
        )
        blocks = -(-features * (columns // 8) // (_DEQUANTIZE_THREADS * _PIECES_PER_THREAD))
        shape = LaunchShape((blocks,), (_DEQUANTIZE_THREADS,))
        kernel(shape, *map(pointer, (out, integers, scale)), features, columns)
        return out


def check_weight(
    op: str, integers: torch.Tensor, scale: torch.Tensor, columns: int, like: torch.Tensor
) -> StoredWeight:
    """The format of a weight of `columns` columns. Raises KernelContractError when its parts do not fit each other."""
    stored = stored_format(integers, scale)
    features, padded = integers.shape[0], stored.padded(columns)
    sizes = {"out_features": features, "stored": padded * stored.bits // 8}
    check_tensor(op, "integers", integers, integers.dtype, sizes, like)
    groups = {} if stored.group is None else {"groups": padded // stored.group}
    groups |= {"scale and zero": 2} if stored.zeros else {}
    check_tensor(op, "scale", scale, like.dtype, {"out_features": features, **groups}, like)
    return stored


def dequantize_source(entries: Iterable[str] = ()) -> KernelSource:
    return KernelSource(FOLDER / "dequantize.cu", tuple(entries))


def dequantize_entry(element: str, weight: str) -> str:
    """Name expression of the kernel for CUDA type `element` and a key of `formats.WEIGHTS`."""
    return f"trtc::dequantize_weight<{element}{WEIGHTS[weight].policy(element)}>"


def dequantize_sources(element: str, weights: Iterable[str]) -> tuple[KernelSource, ...]:
    """The source with the kernels for the formats `weights`; none when there are none."""
    entries = sorted({dequantize_entry(element, weight) for weight in weights})
    return (dequantize_source(entries),) if entries else ()
