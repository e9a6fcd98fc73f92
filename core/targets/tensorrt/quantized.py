"""Dequantize layers: integers as they are stored, so that a plan holds (and a kernel may read) the few bits alone.

TensorRT has no zero points: a weight that has them becomes int8 blocks of integer - zero, which is exact and twice as
large. Its four-bit constants are packed as ours, the even column in the low four bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ...dtypes import DType
from ...graph import Node
from ...quantize.integers import unpack_int4
from .network import ITensor

if TYPE_CHECKING:
    from .lower import Lowering


def lower_dequantize(low: Lowering, node: Node) -> Sequence[ITensor]:
    """[out, in] in the dtype of the scales, by one layer over constants.

    Builds for compute capability 8.0 and later; TensorRT refuses four bits for older GPUs, and says so.
    """
    net, spec = low.network, node.outputs[0]
    names = node.used
    integers, scale = (low.weights[name] for name in names[:2])
    if len(names) == 3:
        integers = _without_zeros(integers, low.weights[names[2]])
    constant = net.int4_constant if integers.dtype == torch.uint8 else net.constant
    stored = constant(names[0], integers)
    scales = net.constant(names[1], scale)
    layer = net.definition.add_dequantize(stored, scales, net.data_type(DType(spec.dtype)))
    if layer is not None and scale.dim() == 1:
        layer.axis = 0  # one scale a row; blocks follow from the shape of the scales
    return (net.output(layer, node.name),)


def _without_zeros(integers: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """int8 [out, in]: integer - zero."""
    values = unpack_int4(integers) if integers.dtype == torch.uint8 else integers
    groups = values.reshape(
        len(values), -1 if zero.dim() == 2 else 1, values.shape[1] // max(1, zero[0].numel())
    )
    return (groups - zero.reshape(len(zero), -1, 1)).flatten(1)
