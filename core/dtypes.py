"""Element types of tensors, by the names that Hugging Face configurations and safetensors users know."""

from __future__ import annotations

from enum import StrEnum
from functools import cache
from typing import TYPE_CHECKING

from .errors import ConfigError

if TYPE_CHECKING:
    import torch


class DType(StrEnum):
    """An element type. Its value is the torch name of the type (`torch.<value>`)."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    FLOAT8_E4M3 = "float8_e4m3fn"
    INT64 = "int64"
    INT32 = "int32"
    INT8 = "int8"
    UINT8 = "uint8"
    BOOL = "bool"

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return _ITEMSIZE[self]

    @property
    def is_float(self) -> bool:
        return self.value.startswith(("float", "bfloat"))


_ITEMSIZE = {
    DType.FLOAT32: 4,
    DType.FLOAT16: 2,
    DType.BFLOAT16: 2,
    DType.FLOAT8_E4M3: 1,
    DType.INT64: 8,
    DType.INT32: 4,
    DType.INT8: 1,
    DType.UINT8: 1,
    DType.BOOL: 1,
}

MODEL_DTYPES = (DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16)
"""The types a model can be computed in."""

_ALIASES = {"fp32": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16", "float": "float32"}


def parse_model_dtype(text: str, where: str) -> DType:
    """The compute type named by `text` (`float16`, `torch.float16`, `fp16`, ...).

    Raises ConfigError, naming `where` the value came from, when it is not one of MODEL_DTYPES.
    """
    name = str(text).removeprefix("torch.")
    name = _ALIASES.get(name, name)
    if name not in MODEL_DTYPES:
        accepted = ", ".join(MODEL_DTYPES)
        raise ConfigError(f"{where}: dtype {text!r} is not supported; accepted: {accepted}")
    return DType(name)


@cache
def to_torch(dtype: DType) -> torch.dtype:
    """The torch dtype of `dtype`."""
    import torch

    result = getattr(torch, dtype.value)
    assert isinstance(result, torch.dtype)
    return result


def from_torch(dtype: torch.dtype) -> DType:
    """The DType of a torch dtype. Raises ConfigError for types no graph uses (complex, float64)."""
    name = str(dtype).removeprefix("torch.")
    try:
        return DType(name)
    except ValueError:
        raise ConfigError(f"torch dtype {name} is not used by trtc; accepted: {', '.join(DType)}") from None
