"""Kernels of the CPU target, compiled when trtc is installed.

`step.c`: one decode step of a transformer as one call. A program is an array of `Instruction`s, which all threads run side by
side with a barrier after each. For steps of many tokens, `int8_layer.c`: a layer with int8 weights, and `context_attention.c`.
The library is optional: where no C compiler was at hand at installation, or the processor lacks AVX-512, `library()` is None.
"""

from __future__ import annotations

import ctypes
from enum import IntEnum
from functools import cache
from pathlib import Path


class Op(IntEnum):
    EMBEDDING = 0
    LINEAR = 1
    NORM = 2
    ATTENTION = 3
    ROTARY = 4
    ACTIVATION = 5
    MULTIPLY = 6
    ADD = 7
    SCREEN = 8
    RESCORE = 9
    PICK = 10


WEIGHT_TYPES = {"float32": 0, "bfloat16": 1, "float16": 2, "int8": 3}
ACTIVATION_KINDS = {None: 0, "relu": 1, "silu": 2, "gelu_tanh": 3, "gelu": 4}
NORM_KINDS = {"layer_norm": 0, "rms_norm": 1}
INTERFACE = 1
"""Of step.c, which gives its own: raised with every change of these structures and numbers, on both sides."""
MAX_HEAD_DIM = 256
"""16 MAX_VECTORS of step.c, MAX_DIM of context_attention.c."""


class Instruction(ctypes.Structure):
    """`Instr` of step.c, which says what the fields mean for each op."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("op", "kind", "wtype", "n", "k")),
        *((name, ctypes.c_int32) for name in ("ldx", "ld2", "ld3", "dim")),
        ("offset", ctypes.c_int32),
        ("offset2", ctypes.c_int32),
        ("number", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("x", "w", "bias", "residual", "scale", "y", "y2")),
    )


class Step(ctypes.Structure):
    """`Step` of step.c: what changes from step to step, and the threads' own memory."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("tokens", "pages", "page_size", "max_len")),
        *((name, ctypes.c_void_p) for name in ("token_ids", "positions", "page_table", "sequence")),
        *((name, ctypes.c_void_p) for name in ("scratch", "best", "best_id", "picked", "narrow")),
        ("narrow_k", ctypes.c_int32),
        ("unused", ctypes.c_int32),
    )


INT8_GROUP = 64
"""Columns of a token that share a step in `int8_layer`: GROUP of int8_layer.c."""


class Int8Layer(ctypes.Structure):
    """`Layer` of int8_layer.c, which says what the fields are. The last three are its scratch memory."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("tokens", "n", "k", "kind")),
        *((name, ctypes.c_void_p) for name in ("x", "scale", "bias", "residual", "w", "y")),
        *((name, ctypes.c_void_p) for name in ("narrow", "steps", "starts")),
    )


class Context(ctypes.Structure):
    """`Context` of context_attention.c, which says what the fields are."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("type", "sequences", "heads", "kv_heads", "dim")),
        *((name, ctypes.c_int32) for name in ("page_size", "pages", "ldq", "ldk", "ldv")),
        ("scale", ctypes.c_float),
        ("unused", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "keys", "values", "y")),
        *((name, ctypes.c_void_p) for name in ("query_start", "kv_length", "page_table")),
    )


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, if they were compiled and this processor can run them."""
    found = sorted(Path(__file__).parent.glob("_step*.so"))
    if not found:
        return None
    loaded = ctypes.CDLL(str(found[0]))
    if not hasattr(loaded, "trtc_interface") or loaded.trtc_interface() != INTERFACE:
        return None  # of another checkout: it has to be compiled again
    return loaded if loaded.trtc_step_supported() else None


def run(program: ctypes.Array[Instruction], step: Step, threads: int) -> None:
    """Runs one step. Every pointer must be valid; `step` holds memory for `threads` threads."""
    loaded = library()
    assert loaded is not None, "the library is not there"
    loaded.trtc_run_step(program, len(program), ctypes.byref(step), threads)


def context_attention(context: Context, threads: int) -> None:
    """Attention of a step of many tokens. Every pointer must be valid."""
    loaded = library()
    assert loaded is not None, "the library is not there"
    loaded.trtc_context_attention(ctypes.byref(context), threads)


def int8_layer(layer: Int8Layer, threads: int) -> None:
    """One layer of many tokens. Every pointer must be valid."""
    loaded = library()
    assert loaded is not None and has_int8(), "no kernels for int8 here"
    loaded.trtc_int8_layer(ctypes.byref(layer), threads)


@cache
def has_int8() -> bool:
    """Whether `int8_layer` runs on this processor: it needs AVX-512 VNNI."""
    loaded = library()
    return loaded is not None and bool(loaded.trtc_int8_supported())
