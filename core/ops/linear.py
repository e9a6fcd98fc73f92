"""Matrix products with weights, and table lookup."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from ..dtypes import DType
from ..spec import TensorSpec
from .elementwise import ACTIVATIONS
from .norm import NORMS
from .registry import Attrs, Op, ReferenceContext, Signature, no_flops, register


def _linear(sig: Signature) -> tuple[TensorSpec, ...]:
    weight = sig[1]
    sig.require(weight.rank == 2, f"weight {weight} is not [out_features, in_features]")
    return (check_linear(sig, weight, bias=2, residual=3),)


def check_linear(sig: Signature, weight: TensorSpec, *, bias: int, residual: int) -> TensorSpec:
    """The type of activation(norm(x) weight^T + bias) + residual, for input 0 and the inputs with these indices."""
    x, bias_spec, residual_spec = sig[0], sig.get(bias), sig.get(residual)
    sig.require(x.shape[-1:] == weight.shape[1:], f"input {x} does not fit weight {weight}")
    sig.require(x.dtype == weight.dtype, f"dtypes differ: input {x}, weight {weight}")
    if bias_spec is not None:
        sig.require(bias_spec.shape == weight.shape[:1], f"bias {bias_spec} does not fit weight {weight}")
        sig.require(bias_spec.dtype == weight.dtype, f"dtypes differ: bias {bias_spec}, weight {weight}")
    if "activation" in sig.attrs:
        sig.attr("activation", *ACTIVATIONS)
    if "norm" in sig.attrs:
        sig.attr("norm", *NORMS)
        sig.number("eps")
    output = x.with_shape((*x.shape[:-1], weight.shape[0]))
    sig.require(residual_spec in (None, output), f"residual {residual_spec} does not fit output {output}")
    return output


def _linear_reference(
    _: ReferenceContext,
    attrs: Attrs,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    return linear(attrs, x, weight, bias, residual)


def linear(
    attrs: Attrs,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """activation(norm(x) weight^T + bias) + residual, with activation and norm, without weights, as `attrs` say."""
    if "norm" in attrs:
        x = NORMS[attrs["norm"]](x, None, None, attrs["eps"])
    y = F.linear(x, weight, bias)
    if "activation" in attrs:
        y = ACTIVATIONS[attrs["activation"]](y)
    return y if residual is None else y + residual


def _linear_flops(sig: Signature, outputs: tuple[TensorSpec, ...], sizes: Mapping[str, int]) -> int:
    in_features = sig[1].shape[1]
    assert isinstance(in_features, int)
    return 2 * outputs[0].numel(sizes) * in_features


def _embedding(sig: Signature) -> tuple[TensorSpec, ...]:
    ids, table, positions, position_table = sig[0], sig[1], sig.get(2), sig.get(3)
    sig.require(ids.rank == 1 and ids.dtype == DType.INT32, f"ids {ids} are not int32[tokens]")
    sig.require(table.rank == 2, f"table {table} is not [rows, features]")
    sig.integer("offset")
    both = (positions is None) == (position_table is None)
    sig.require(both, f"positions {positions} and position table {position_table} do not come together")
    if positions is not None and position_table is not None:
        sig.require(positions == ids, f"positions {positions} and ids {ids} differ")
        fits = position_table.shape[1:] == table.shape[1:] and position_table.dtype == table.dtype
        sig.require(fits, f"position table {position_table} does not fit table {table}")
        sig.integer("position_offset")
    return (TensorSpec(table.dtype, (ids.shape[0], table.shape[1])),)


def _embedding_reference(
    _: ReferenceContext,
    attrs: Attrs,
    ids: torch.Tensor,
    table: torch.Tensor,
    positions: torch.Tensor | None = None,
    position_table: torch.Tensor | None = None,
) -> torch.Tensor:
    found = _rows(ids + attrs["offset"], table, masked=attrs.get("masked", False))
    if positions is None or position_table is None:
        return found
    return found + F.embedding(positions + attrs["position_offset"], position_table)


def _rows(rows: torch.Tensor, table: torch.Tensor, *, masked: bool) -> torch.Tensor:
    if not masked:
        return F.embedding(rows, table)
    inside = (rows >= 0) & (rows < table.shape[0])
    found: torch.Tensor = F.embedding(torch.where(inside, rows, 0), table)
    return found.masked_fill(~inside.unsqueeze(-1), 0)


def _embedding_bytes(sig: Signature, outputs: tuple[TensorSpec, ...], sizes: Mapping[str, int]) -> int:
    return sig[0].nbytes(sizes) + 2 * outputs[0].nbytes(sizes)  # only the rows looked up are read


LINEAR = register(
    Op("linear", _linear, _linear_reference, _linear_flops, attrs=("activation", "norm", "eps"))
)
"""`linear(x[..., in], weight[out, in], bias[out]?, residual[..., out]?; activation?, norm?, eps?)` -> [..., out]:
activation(norm(x) weight^T + bias) + residual, with a norm that has no weights.

Families write the first three inputs; passes fuse the rest in for targets that run it as one kernel.
"""

EMBEDDING = register(
    Op(
        "embedding",
        _embedding,
        _embedding_reference,
        no_flops,
        _embedding_bytes,
        attrs=("offset", "masked", "position_offset"),
    )
)
"""`embedding(ids[T], table[rows, features], positions[T]?, position_table[rows, features]?; offset, masked?,
position_offset?)` -> [T, features]: row `id + offset`, plus the position's row where a pass fused that in.

With `masked`, ids whose row is not in the table give zeros: one rank's share of a table sharded by rows.
"""
