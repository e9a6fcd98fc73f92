"""The op table: inputs and attributes that an op refuses. Oracle: the text."""

from __future__ import annotations

from typing import Any

import pytest
from trtc.core.dtypes import DType
from trtc.core.errors import ShapeError
from trtc.core.spec import TensorSpec

from .op_calls import f32, i32, infer, int8, uint8

X = f32("T", 8)
HALF = TensorSpec(DType.FLOAT16, ("T", 8))
QKV = (f32("T", 4, 6), f32("T", 2, 6), f32("T", 2, 6))
TABLES = (i32("B+1"), i32("B"), i32("B", "P"))
ATTENTION = {"layer": 0, "scale": 1.0}
SUM_NORM = {"tp_size": 2, "norm": "layer", "eps": 1e-5}


@pytest.mark.parametrize(
    ("op", "inputs", "attrs", "message"),
    [
        ("linear", (X, f32(3, 9)), {}, "input float32[T, 8] does not fit weight float32[3, 9]"),
        ("linear", (X, f32(3)), {}, "weight float32[3] is not [out_features, in_features]"),
        ("linear", (HALF, f32(3, 8)), {}, "dtypes differ: input float16[T, 8], weight float32[3, 8]"),
        ("linear", (X, f32(3, 8), f32(4)), {}, "bias float32[4] does not fit weight"),
        ("linear", (X, f32(3, 8), TensorSpec(DType.FLOAT16, (3,))), {}, "dtypes differ: bias"),
        ("linear", (X, f32(3, 8)), {"activation": "tanh"}, "attribute activation is 'tanh'; accepted: relu"),
        ("linear", (X, f32(3, 8), None, X), {}, "residual float32[T, 8] does not fit output float32[T, 3]"),
        ("linear", (X, f32(3, 8)), {"norm": "batch"}, "attribute norm is 'batch'"),
        ("linear", (X, f32(3, 8)), {"norm": "rms"}, "attribute 'eps' is missing"),
        ("linear", (X, f32(3, 8)), {"norm": "rms", "eps": 10**400}, "attribute eps is 1000"),
        ("linear", (X,), {}, "input 1 is missing"),
        ("linear", (None, f32(3, 8)), {}, "input 0 is missing"),
        ("quantized_linear", (X, int8(3, 9), f32(3)), {}, "input float32[T, 8] does not fit weight float32[3, 9]"),
        ("quantized_linear", (HALF, int8(3, 8), f32(3)), {}, "dtypes differ: input float16[T, 8], weight float32[3, 8]"),
        ("quantized_linear", (X, int8(3, 8), f32(3), None, f32(4)), {}, "bias float32[4] does not fit weight"),
        ("quantized_linear", (X, int8(3, 8), f32(3), None, None, X), {}, "residual float32[T, 8] does not fit output"),
        ("quantized_linear", (X, int8(3, 8)), {}, "input 2 is missing"),
        ("dequantize", (f32(3, 8), f32(3)), {}, "integers float32[3, 8] are not int8 or float8_e4m3fn [out, in]"),
        ("dequantize", (int8(3, 8), int8(3)), {}, "scale int8[3] is not floating point"),
        ("dequantize", (int8(3, 8), f32(8)), {}, "scale float32[8] does not fit integers int8[3, 8]"),
        ("dequantize", (uint8(3, 4), f32(3, 3)), {}, "scale float32[3, 3] does not fit integers uint8[3, 4]"),
        ("dequantize", (uint8(3, 4), f32(3, 2), int8(3)), {}, "zero int8[3] is not int8 of the shape of scale"),
        ("embedding", (f32("T"), f32(6, 4)), {"offset": 0}, "ids float32[T] are not int32[tokens]"),
        ("embedding", (i32("T", 1), f32(6, 4)), {"offset": 0}, "ids int32[T, 1] are not int32[tokens]"),
        ("embedding", (i32("T"), f32(6)), {"offset": 0}, "table float32[6] is not [rows, features]"),
        ("embedding", (i32("T"), f32(6, 4)), {}, "attribute 'offset' is missing"),
        ("embedding", (i32("T"), f32(6, 4)), {"offset": 0.5}, "offset is 0.5; accepted: a whole number of 32 bits"),
        ("embedding", (i32("T"), f32(6, 4)), {"offset": 2**31}, "offset is 2147483648; accepted: a whole number of 32"),
        ("embedding", (i32("T"), f32(6, 4), i32("T")), {"offset": 0}, "position table None do not come together"),
        ("embedding", (i32("T"), f32(6, 4), i32("R"), f32(6, 4)), {"offset": 0}, "positions int32[R] and ids int32[T]"),
        ("embedding", (i32("T"), f32(6, 4), i32("T"), f32(6, 5)), {"offset": 0}, "position table float32[6, 5] does"),
        ("activation", (X,), {"kind": "tanh"}, "attribute kind is 'tanh'; accepted: relu, gelu,"),
        ("activation", (X,), {}, "attribute 'kind' is missing"),
        ("add", (X, HALF), {}, "dtypes differ: float32[T, 8] and float16[T, 8]"),
        ("mul", (X, f32("T", 4)), {}, "shapes differ: float32[T, 8] and float32[T, 4]"),
        ("mul", (f32(8), X), {}, "shapes differ"),
        ("cast", (X,), {"dtype": "float31"}, "attribute dtype is 'float31'"),
        ("layer_norm", (X, f32(4)), {"eps": 1e-5}, "weight float32[4] does not fit input float32[T, 8]"),
        ("rms_norm", (X, None, f32(4)), {"eps": 1e-5}, "bias float32[4] does not fit"),
        ("layer_norm", (HALF, f32(8)), {"eps": 1e-5}, "dtypes differ: weight float32[8], input float16[T, 8]"),
        ("layer_norm", (X,), {}, "attribute 'eps' is missing"),
        ("add_layer_norm", (X, f32("R", 8)), {"eps": 1e-5}, "input float32[T, 8] and residual float32[R, 8] differ"),
        ("add_rms_norm", (X, X, f32(4)), {"eps": 1e-5}, "weight float32[4] does not fit"),
        ("reshape", (X,), {"shape": ("T", 3, 3)}, "float32[T, 8] has another number of elements than shape"),
        ("reshape", (X,), {"shape": ("R", 8)}, "float32[T, 8] has another number of elements than shape ['R', 8]"),
        ("reshape", (f32("B", "P"),), {"shape": ("P", "B")}, "shape ['P', 'B'] has more than one symbol"),
        ("concat", (X, f32("R", 8)), {"axis": 1}, "float32[R, 8] does not fit float32[T, 8] along axis 1"),
        ("concat", (X, f32(8)), {"axis": 1}, "float32[8] does not fit float32[T, 8]"),
        ("concat", (X, HALF), {"axis": 1}, "does not fit"),
        ("concat", (X, X), {"axis": 0}, "axis 0 of float32[T, 8] is not a known size"),
        ("layer_norm", (X,), {"eps": "1e-5"}, "attribute eps is '1e-5'; accepted: a finite number"),
        ("rms_norm", (X,), {"eps": True}, "attribute eps is True; accepted: a finite number"),
        ("reshape", (X,), {"shape": ("T", -8)}, "attribute shape is ('T', -8); accepted: sizes of at least 0"),
        ("reshape", (X,), {"shape": "T"}, "attribute shape is 'T'; accepted: sizes of at least 0"),
        ("concat", (X, X), {"axis": True}, "attribute axis is True; accepted: a whole number"),
        ("concat", (X, X), {"axis": 2}, "axis 2 is outside of float32[T, 8]"),
        ("split", (X,), {"axis": 1, "sizes": (4, 5)}, "sizes (4, 5) do not add up to axis 1"),
        ("split", (X,), {"axis": 0, "sizes": ("T",)}, "sizes ('T',) do not add up to axis 0"),
        ("split", (X,), {"axis": 0, "sizes": (4, 4)}, "do not add up to axis 0"),
        ("slice", (X,), {"axis": 1, "start": 4, "stop": 9}, "[4:9] is outside of axis 1 of float32[T, 8]"),
        ("slice", (X,), {"axis": 1, "start": 4, "stop": 4}, "[4:4] is outside"),
        ("slice", (X,), {"axis": 0, "start": 0, "stop": 1}, "[0:1] is outside of axis 0"),
        ("slice", (X,), {"axis": -3, "start": 0, "stop": 1}, "axis -3 is outside of"),
        ("transpose", (f32("T", 4, 6),), {}, "float32[T, 4, 6] is not a matrix"),
        ("select_rows", (X, f32("R")), {}, "index float32[R] is not int32[rows]"),
        ("attention", (X, *QKV[1:], *TABLES), ATTENTION, "q float32[T, 8] is not [tokens, heads, head_dim]"),
        ("attention", (QKV[0], QKV[1], f32("T", 2, 5), *TABLES), ATTENTION, "k float32[T, 2, 6] and v float32"),
        ("attention", (f32("T", 4, 5), *QKV[1:], *TABLES), ATTENTION, "q float32[T, 4, 5] and k float32[T, 2, 6]"),
        ("attention", (f32("T", 3, 6), *QKV[1:], *TABLES), ATTENTION, "3 heads are not a multiple of 2 kv heads"),
        ("attention", (*QKV, f32("B+1"), *TABLES[1:]), ATTENTION, "query_start float32[B+1] is not int32"),
        ("attention", (*QKV, TABLES[0], f32("B"), TABLES[2]), ATTENTION, "kv_length float32[B] is not int32"),
        ("attention", (*QKV, *TABLES[:2]), ATTENTION, "input 5 is missing"),
        ("attention", (f32("T", "H", 6), *QKV[1:], *TABLES), ATTENTION, "H heads are not a multiple of 2 kv heads"),
        ("attention", (*QKV, *TABLES), {"layer": "0", "scale": 1.0}, "attribute layer is '0'; accepted: a whole"),
        ("attention", (*QKV, *TABLES), {"layer": 0, "scale": float("nan")}, "attribute scale is nan; accepted: a finite"),
        ("attention", (*QKV, *TABLES), ATTENTION | {"cache_dtype": "x"}, "attribute cache_dtype is 'x'; accepted"),
        ("attention", (*QKV, *TABLES), {"scale": 1.0}, "attribute 'layer' is missing"),
        ("attention", (*QKV, *TABLES), {"layer": 0}, "attribute 'scale' is missing"),
        ("rotary", (X, i32("T")), {"theta": 1e4}, "input float32[T, 8] is not [tokens, heads, head_dim]"),
        ("rotary", (QKV[0], i32("R")), {"theta": 1e4}, "positions int32[R] do not fit"),
        ("rotary", (f32("T", 4, 5), i32("T")), {"theta": 1e4}, "head_dim of float32[T, 4, 5] is not even"),
        ("rotary", (QKV[0], i32("T")), {"theta": 0}, "attribute theta is 0; accepted: a number above 0"),
        ("rotary", (QKV[0], i32("T")), {"theta": "1e4"}, "attribute theta is '1e4'; accepted: a finite number"),
        ("layer_norm", (X,), {"eps": None}, "attribute eps is None; accepted: a finite number"),
        ("rms_norm", (X,), {"eps": float("nan")}, "attribute eps is nan; accepted: a finite number"),
        ("all_gather", (X,), {"axis": 0, "tp_size": 2}, "axis 0 of float32[T, 8] is not a known size"),
        ("all_gather", (X,), {"axis": 2, "tp_size": 2}, "axis 2 is outside of float32[T, 8]"),
        ("all_reduce", (X,), {}, "attribute 'tp_size' is missing"),
        ("all_reduce_norm", (X, f32("R", 8)), SUM_NORM, "input float32[T, 8] and residual float32[R, 8] differ"),
        ("all_reduce_norm", (X, None, f32(4)), SUM_NORM, "weight float32[4] does not fit input float32[T, 8]"),
        ("all_reduce_norm", (X,), SUM_NORM | {"norm": "none"}, "attribute norm is 'none'; accepted: layer, rms"),
        ("all_reduce_norm", (X,), {"tp_size": 2, "norm": "rms"}, "attribute 'eps' is missing"),
        ("weight", (), {"dtype": "float31", "shape": (1,)}, "attribute dtype is 'float31'"),
        ("input", (), {"dtype": "float32"}, "attribute 'shape' is missing"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(
    op: str, inputs: tuple[TensorSpec | None, ...], attrs: dict[str, Any], message: str
) -> None:
    """The message starts with op and node, as every message about a graph does."""
    with pytest.raises(ShapeError) as error:
        infer(op, *inputs, **attrs)
    assert str(error.value).startswith(f"{op} 'n': ")
    assert message in str(error.value)
