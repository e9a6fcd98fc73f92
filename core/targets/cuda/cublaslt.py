"""Products of many rows by cuBLASLt, without torch in between.

For two things that torch does not ask it for: a residual beside the bias in the epilogue, and another algorithm than the
first of those that it proposes.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ....kernels.errors import DeviceError
from ....kernels.launch import current_stream
from .epilogue import finished

WORKSPACE_BYTES = 32 << 20
CANDIDATES = 8
PREFERRED = (24, 5)
"""(tile, cluster) as cuBLASLt numbers them: 256 features by 128 rows, clusters of 1 by 2. See bench/notes/kernels_linear.md."""
PREFERRED_CAPABILITY, PREFERRED_ROWS = (9, 0), 8192
"""Where it has been seen to be faster than what cuBLASLt proposes first: on Hopper, from so many rows on."""

_MOST_PLANS = 1024
"""Kept at once: a plan is for a number of rows, and steps with prompts have any."""

# Numbers of cublasLt.h and library_types.h.
_DATA_TYPES = {torch.float16: 2, torch.bfloat16: 14}
_FLOAT32, _COMPUTE_FLOAT32 = 0, 68
_TRANSPOSE_A, _EPILOGUE, _BIAS_POINTER = 3, 7, 8
_TRANSPOSED = 1
_EPILOGUE_PLAIN, _EPILOGUE_RELU, _EPILOGUE_BIAS = 1, 2, 4  # 6: bias and ReLU
_MAX_WORKSPACE_BYTES, _MIN_ALIGNMENTS = 1, (5, 6, 7, 8)
_MOST_ALIGNMENT = 256
_TILE, _CLUSTER = 1, 8
_SIGNATURES = {
    "cublasLtCreate": "p",
    "cublasLtDestroy": "p",
    "cublasLtMatmulDescCreate": "pii",
    "cublasLtMatmulDescSetAttribute": "pipz",
    "cublasLtMatmulDescDestroy": "p",
    "cublasLtMatrixLayoutCreate": "piQQq",
    "cublasLtMatrixLayoutDestroy": "p",
    "cublasLtMatmulPreferenceCreate": "p",
    "cublasLtMatmulPreferenceSetAttribute": "pipz",
    "cublasLtMatmulPreferenceDestroy": "p",
    "cublasLtMatmulAlgoGetHeuristic": "pppppppipp",
    "cublasLtMatmulAlgoConfigGetAttribute": "pipzp",
    "cublasLtMatmul": "ppppppppppppppzp",
}
_TYPES = {
    "p": ctypes.c_void_p,
    "i": ctypes.c_int,
    "z": ctypes.c_size_t,
    "Q": ctypes.c_uint64,
    "q": ctypes.c_int64,
}


class Proposal(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t"""

    _fields_ = (
        ("algorithm", ctypes.c_uint64 * 8),
        ("workspace_bytes", ctypes.c_size_t),
        ("status", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


class _Key(NamedTuple):
    """What an algorithm depends on. x_stride, weight_stride: elements between rows; alignment: of all matrices, in bytes."""

    dtype: torch.dtype
    rows: int
    columns: int
    features: int
    x_stride: int
    weight_stride: int
    epilogue: int
    adds: bool
    alignment: int


@dataclass(frozen=True)
class _Plan:
    """What cuBLASLt keeps of a shape: how to multiply, where rows lie, and an algorithm."""

    operation: ctypes.c_void_p
    weight: ctypes.c_void_p
    x: ctypes.c_void_p
    y: ctypes.c_void_p
    proposal: Proposal


class CublasLt:
    """Products on one GPU, one thread and one stream at a time, for they share a workspace. Nothing is made before one."""

    def __init__(self) -> None:
        self._plans: dict[_Key, _Plan] = {}
        one, zero = ctypes.c_float(1.0), ctypes.c_float(0.0)
        self._one, self._zero = ctypes.byref(one), ctypes.byref(zero)
        self._workspace: torch.Tensor | None = None

    def linear(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        activation: str,
    ) -> torch.Tensor:
        """activation(x weight^T + bias) + residual, [rows, features]; rounded once where the activation is none or
        ReLU, and only one of ReLU and the residual is asked for.

        x: [rows, columns], at least one row; weight: [features, columns]; bias: [features]; residual: [rows, features].
        float16 or bfloat16, all the same; sums are float32. activation: as `finished` takes it. Raises DeviceError when
        cuBLASLt refuses.
        """
        if activation == "none":
            return self._product(x, weight, bias, residual, relu=False)
        relu = activation == "relu"
        y = self._product(x, weight, bias, None, relu)
        return finished(y, "none" if relu else activation, residual)

    def _product(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        relu: bool,
    ) -> torch.Tensor:
        x = x if x.stride(1) == 1 else x.contiguous()
        (rows, columns), features = x.shape, weight.shape[0]
        out = x.new_empty(rows, features)
        addend = out if residual is None else residual.contiguous()
        places = [tensor.data_ptr() for tensor in (weight, x, addend, out)]
        epilogue = (_EPILOGUE_RELU if relu else 0) | (0 if bias is None else _EPILOGUE_BIAS)
        plan = self._plan(
            _Key(
                x.dtype, rows, columns, features, x.stride(0), weight.stride(0), epilogue or _EPILOGUE_PLAIN,
                residual is not None, common_alignment(places),
            )
        )  # fmt: skip
        if bias is not None:
            self._set(plan.operation, _BIAS_POINTER, ctypes.c_void_p(bias.data_ptr()))
        if self._workspace is None:
            self._workspace = x.new_empty(WORKSPACE_BYTES, dtype=torch.uint8)
        factor = self._zero if residual is None else self._one
        self._call(
            "cublasLtMatmul", self._handle, plan.operation,
            self._one, places[0], plan.weight, places[1], plan.x,
            factor, places[2], plan.y, places[3], plan.y,
            ctypes.byref(plan.proposal), self._workspace.data_ptr(), WORKSPACE_BYTES,
            current_stream(),
        )  # fmt: skip
        return out

    @functools.cached_property
    def _library(self) -> Any:
        return loaded_library()

    @functools.cached_property
    def _handle(self) -> ctypes.c_void_p:
        handle = self._create("cublasLtCreate")
        weakref.finalize(self, _free, self._library, handle, self._plans).atexit = False
        return handle

    def _plan(self, key: _Key) -> _Plan:
        plan = self._plans.pop(key, None) or self._make_plan(key)
        self._plans[key] = plan  # the latest is the last
        if len(self._plans) > _MOST_PLANS:
            _free_plan(self._library, self._plans.pop(next(iter(self._plans))))
        return plan

    def _make_plan(self, key: _Key) -> _Plan:
        """The library counts by columns: y^T = W x^T with matrices that are the transposes of ours."""
        operation = self._create("cublasLtMatmulDescCreate", _COMPUTE_FLOAT32, _FLOAT32)
        self._set(operation, _TRANSPOSE_A, ctypes.c_int32(_TRANSPOSED))
        self._set(operation, _EPILOGUE, ctypes.c_int32(key.epilogue))
        weight, x, y = (
            self._create("cublasLtMatrixLayoutCreate", _DATA_TYPES[key.dtype], length, count, stride)
            for length, count, stride in (
                (key.columns, key.features, key.weight_stride),
                (key.columns, key.rows, key.x_stride),
                (key.features, key.rows, key.features),
            )
        )
        proposals = self._proposals(operation, weight, x, y, key)
        if not proposals:
            raise DeviceError(f"cuBLASLt has no algorithm for {key}")
        return _Plan(operation, weight, x, y, self._chosen(proposals, key.rows))

    def _proposals(
        self,
        operation: ctypes.c_void_p,
        weight: ctypes.c_void_p,
        x: ctypes.c_void_p,
        y: ctypes.c_void_p,
        key: _Key,
    ) -> list[Proposal]:
        preference = self._create("cublasLtMatmulPreferenceCreate")
        limits: list[tuple[int, Any]] = [(_MAX_WORKSPACE_BYTES, ctypes.c_uint64(WORKSPACE_BYTES))]
        limits += [(number, ctypes.c_uint32(key.alignment)) for number in _MIN_ALIGNMENTS]
        for number, value in limits:
            self._call(
                "cublasLtMatmulPreferenceSetAttribute", preference, number, ctypes.byref(value), ctypes.sizeof(value)
            )  # fmt: skip
        wanted = (
            CANDIDATES if key.rows >= PREFERRED_ROWS else 1
        )  # asking for 8 takes half as long again, 0.5 ms
        found, count = (Proposal * wanted)(), ctypes.c_int()
        self._call(
            "cublasLtMatmulAlgoGetHeuristic", self._handle, operation, weight, x, y, y, preference, wanted,
            found, ctypes.byref(count),
        )  # fmt: skip
        self._call("cublasLtMatmulPreferenceDestroy", preference)
        return list(found[: count.value])

    def _chosen(self, proposals: Sequence[Proposal], rows: int) -> Proposal:
        if rows >= PREFERRED_ROWS and torch.cuda.get_device_capability() == PREFERRED_CAPABILITY:
            for proposal in proposals:
                shape = (
                    self._attribute(proposal, _TILE, ctypes.c_uint32),
                    self._attribute(proposal, _CLUSTER, ctypes.c_uint16),
                )
                if shape == PREFERRED:
                    return proposal
        return proposals[0]

    def _attribute(self, proposal: Proposal, attribute: int, kind: Any) -> int:
        value, written = kind(), ctypes.c_size_t()
        self._call(
            "cublasLtMatmulAlgoConfigGetAttribute", ctypes.byref(proposal), attribute, ctypes.byref(value),
            ctypes.sizeof(value), ctypes.byref(written),
        )  # fmt: skip
        return int(value.value)

    def _create(self, function: str, *arguments: Any) -> ctypes.c_void_p:
        made = ctypes.c_void_p()
        self._call(function, ctypes.byref(made), *arguments)
        return made

    def _set(self, operation: ctypes.c_void_p, attribute: int, value: Any) -> None:
        self._call(
            "cublasLtMatmulDescSetAttribute", operation, attribute, ctypes.byref(value), ctypes.sizeof(value)
        )

    def _call(self, function: str, *arguments: Any) -> None:
        status = getattr(self._library, function)(*arguments)
        if status:
            raise DeviceError(f"{function}: cuBLAS status {status}")


def common_alignment(places: Sequence[int]) -> int:
    """The largest power of two, up to _MOST_ALIGNMENT, that divides all of `places`."""
    together = _MOST_ALIGNMENT
    for place in places:
        together |= place
    return together & -together


def _free_plan(library: Any, plan: _Plan) -> None:
    library.cublasLtMatmulDescDestroy(plan.operation)
    for layout in (plan.weight, plan.x, plan.y):
        library.cublasLtMatrixLayoutDestroy(layout)


def _free(library: Any, handle: ctypes.c_void_p, plans: dict[_Key, _Plan]) -> None:
    for plan in plans.values():
        _free_plan(library, plan)
    library.cublasLtDestroy(handle)


@functools.cache
def loaded_library() -> Any:
    """The library that torch has loaded. Raises DeviceError where it has none."""
    name = f"libcublasLt.so.{(torch.version.cuda or '').partition('.')[0]}"
    try:
        library = ctypes.CDLL(name)
    except OSError as error:
        raise DeviceError(
            f"{name} is not loaded ({error}); it comes with a CUDA build of torch, this is {torch.__version__}"
        ) from None
    for function, letters in _SIGNATURES.items():
        getattr(library, function).argtypes = [_TYPES[letter] for letter in letters]
    return library
