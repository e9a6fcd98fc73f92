"""The op table. Importing this package registers all core ops."""

from . import attention, collective, elementwise, linear, norm, quantized, source, structure
from .registry import Cost, Op, ReferenceContext, Signature, get_op, op_names, register

__all__ = [
    "Cost",
    "Op",
    "ReferenceContext",
    "Signature",
    "attention",
    "collective",
    "elementwise",
    "get_op",
    "linear",
    "norm",
    "op_names",
    "quantized",
    "register",
    "source",
    "structure",
]
