"""One decode step of a transformer on the CPU, as one call: `step.c`, compiled when trtc is installed.

A program is an array of `Instruction`s, which all threads run side by side with a barrier after each. The library is optional:
where no C compiler was at hand at installation, or the processor lacks AVX-512, `library()` is None.
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
ACTIVATION_KINDS = {None: 0, "relu": 1, "silu": 2, "gelu_tanh": 3}
NORM_KINDS = {"layer_norm": 0, "rms_norm": 1}


class Instruction(ctypes.Structure):
    """`Instr` of step.c, which says what the fields mean for each op."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("op", "kind", "wtype", "n", "k", "ldx", "ld2", "dim")),
        ("offset", ctypes.c_int32),
        ("offset2", ctypes.c_int32),
        ("number", ctypes.c_float),
        ("unused", ctypes.c_int32),
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


@cache
def library() -> ctypes.CDLL | None:
    """The compiled `step.c`, if it was compiled and this processor can run it."""
    found = sorted(Path(__file__).parent.glob("_step*.so"))
    if not found:
        return None
    loaded = ctypes.CDLL(str(found[0]))
    if not hasattr(loaded, "trtc_run_step"):  # of an older checkout: compiled again, it has what is missing
        return None
    return loaded if loaded.trtc_step_supported() else None


def run(program: ctypes.Array[Instruction], step: Step, threads: int) -> None:
    """Runs one step. Every pointer must be valid; `step` holds memory for `threads` threads."""
    loaded = library()
    assert loaded is not None, "the library is not there"
    loaded.trtc_run_step(program, len(program), ctypes.byref(step), threads)


def split(layer: Instruction, tokens: int, parts: int, steps: int, threads: int) -> None:
    """x [tokens, k] float32 of `layer` as int8 parts [2 tokens, k], to be multiplied by int8, and steps [tokens] float32."""
    loaded = library()
    assert loaded is not None, "the library is not there"
    loaded.trtc_split(ctypes.byref(layer), tokens, ctypes.c_void_p(parts), ctypes.c_void_p(steps), threads)


def join(layer: Instruction, tokens: int, sums: int, steps: int, threads: int) -> None:
    """y [tokens, n] float32 of `layer`, with its scale, bias, activation and residual, from int32 sums [2 tokens, n]."""
    loaded = library()
    assert loaded is not None, "the library is not there"
    loaded.trtc_join(ctypes.byref(layer), tokens, ctypes.c_void_p(sums), ctypes.c_void_p(steps), threads)
