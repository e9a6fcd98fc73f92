"""The op table. Oracle of every reference: a formula in numpy float64, written from the op's definition alone.

Attention is in test_attention_ops.py, what ops refuse in test_op_shape_rules.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from trtc.core.dtypes import DType
from trtc.core.errors import GraphError, ShapeError
from trtc.core.ops import Cost, Op, ReferenceContext, get_op, op_names, register
from trtc.core.spec import TensorSpec
from trtc.tests.tolerances import max_error

from .op_calls import Array, close, cost, f32, i32, infer, int8, run, uint8, values

# ---- oracles -----------------------------------------------------------------------------------------


def np_activation(kind: str, x: Array) -> Array:
    scalar: dict[str, Callable[[float], float]] = {
        "relu": lambda v: max(v, 0.0),
        "gelu": lambda v: v * (1 + math.erf(v / math.sqrt(2))) / 2,
        "gelu_tanh": lambda v: v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) / 2,
        "silu": lambda v: v / (1 + math.exp(-v)),
    }
    return np.array([scalar[kind](v) for v in x.flat]).reshape(x.shape)


def np_layer_norm(x: Array, weight: Array | None, bias: Array | None, eps: float) -> Array:
    y: Array = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
    return y * (1 if weight is None else weight) + (0 if bias is None else bias)


def np_rms_norm(x: Array, weight: Array | None, bias: Array | None, eps: float) -> Array:
    y: Array = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)
    return y * (1 if weight is None else weight) + (0 if bias is None else bias)


NORMS = {"layer_norm": np_layer_norm, "rms_norm": np_rms_norm}


# ---- element-wise ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["relu", "gelu", "gelu_tanh", "silu"])
def test_activation(kind: str) -> None:
    x = values(5, 8) * 3
    assert infer("activation", f32("T", 8), kind=kind) == (f32("T", 8),)
    assert close(run("activation", x, kind=kind), np_activation(kind, x))


def test_add_and_mul() -> None:
    x, y, vector = values(5, 8), values(5, 8, seed=1), values(8, seed=2)
    for op, oracle in (("add", np.add), ("mul", np.multiply)):
        assert infer(op, f32("T", 8), f32("T", 8)) == infer(op, f32("T", 8), f32(8)) == (f32("T", 8),)
        assert close(run(op, x, y), oracle(x, y))
        assert close(run(op, x, vector), oracle(x, vector))
        assert cost(op, f32("T", 8), f32("T", 8)) == Cost(5 * 8, 4 * 3 * 5 * 8)


def test_cast() -> None:
    assert infer("cast", f32("T", 8), dtype="float16") == (TensorSpec(DType.FLOAT16, ("T", 8)),)
    x = torch.tensor([1.0, 1 + 2**-12])
    half = get_op("cast").reference(ReferenceContext(), {"dtype": "float16"}, x)
    assert half.dtype == torch.float16 and half.tolist() == [1.0, 1.0]
    wide = run("cast", values(3), dtype="float16")
    assert wide.dtype == torch.float64, "an oracle's run in float64 stays one"
    assert run("cast", values(3), dtype="int32").dtype == torch.int32


# ---- linear, embedding -------------------------------------------------------------------------------


def test_linear() -> None:
    x, w, b = values(5, 8), values(3, 8, seed=1), values(3, seed=2)
    assert infer("linear", f32("T", 8), f32(3, 8), f32(3)) == (f32("T", 3),)
    assert close(run("linear", x, w), x @ w.T)
    assert close(run("linear", x, w, b), x @ w.T + b)
    assert close(run("linear", x, w, b, activation="gelu"), np_activation("gelu", x @ w.T + b))
    assert cost("linear", f32("T", 8), f32(3, 8), f32(3)) == Cost(
        2 * 5 * 8 * 3, 4 * (5 * 8 + 3 * 8 + 3 + 5 * 3)
    )


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_linear_with_everything_fused_in(norm: str) -> None:
    x, w, b, residual = values(5, 8), values(3, 8, seed=1), values(3, seed=2), values(5, 3, seed=3)
    y = NORMS[f"{norm}_norm"](x, None, None, 1e-3) @ w.T + b
    result = run("linear", x, w, b, residual, norm=norm, eps=1e-3, activation="silu")
    assert close(result, np_activation("silu", y) + residual)
    shapes = (f32("T", 8), f32(3, 8), None, f32("T", 3))
    assert infer("linear", *shapes, norm=norm, eps=1e-3) == (f32("T", 3),)


def test_linear_with_integers() -> None:
    """Oracle: the float product with (integer - zero) * scale; int4 holds the even column in its low four bits."""
    x, scale, bias, residual = values(5, 8), values(3, 2, seed=1), values(3, seed=2), values(5, 3, seed=3)
    integers = np.random.default_rng(4).integers(-8, 8, (3, 8)).astype(np.int8)
    zero = np.array([[1, 0], [-2, 3], [0, 7]], np.int8)
    packed = ((integers[:, ::2] & 15) | ((integers[:, 1::2] & 15) << 4)).astype(np.uint8)
    w = (integers - zero.repeat(4, 1)) * scale.repeat(4, 1)
    assert infer("dequantize", uint8(3, 4), f32(3, 2), int8(3, 2)) == (f32(3, 8),)
    assert close(run("dequantize", packed, scale, zero), w)
    assert infer("dequantize", int8(3, 8), f32(3)) == (f32(3, 8),)
    assert close(run("dequantize", integers, scale[:, 0]), integers * scale[:, :1])
    shapes = (f32("T", 8), uint8(3, 4), f32(3, 2), int8(3, 2), f32(3), f32("T", 3))
    attrs = {"norm": "rms", "eps": 1e-3, "activation": "silu"}
    assert infer("quantized_linear", *shapes, **attrs) == (f32("T", 3),)
    result = run("quantized_linear", x, packed, scale, zero, bias, residual, **attrs)
    assert close(result, np_activation("silu", np_rms_norm(x, None, None, 1e-3) @ w.T + bias) + residual)
    assert close(run("quantized_linear", x, packed, scale), x @ (integers * scale.repeat(4, 1)).T)
    norm_scale, norm_shift = values(8, seed=5), values(8, seed=6)
    result = run(
        "quantized_linear", x, packed, scale, zero, None, None, norm_scale, norm_shift, norm="layer", eps=1e-3
    )
    assert close(result, np_layer_norm(x, norm_scale, norm_shift, 1e-3) @ w.T)
    with pytest.raises(ShapeError, match="weights of a norm without a norm"):
        infer("quantized_linear", *shapes, f32(8))
    with pytest.raises(ShapeError, match=r"weight .* does not fit input"):
        infer("quantized_linear", *shapes, f32(7), **attrs)
    # Integers, scales, zeros, bias and residual are read once, half a byte an integer.
    moved = 4 * 5 * 8 + 3 * 4 + 4 * 3 * 2 + 3 * 2 + 4 * 3 + 2 * 4 * 5 * 3
    assert cost("quantized_linear", *shapes) == Cost(2 * 5 * 8 * 3, moved)
    assert cost("dequantize", int8(3, 8), f32(3)) == Cost(24, 24 + 4 * 3 + 4 * 24)


def test_embedding() -> None:
    ids, table = np.array([0, 3, 1, 3], np.int32), values(6, 4)
    assert infer("embedding", i32("T"), f32(6, 4), offset=0) == (f32("T", 4),)
    assert close(run("embedding", ids, table, offset=2), table[[2, 5, 3, 5]])
    position_table, positions = values(9, 4, seed=1), np.array([0, 1, 0, 6], np.int32)
    result = run("embedding", ids, table, positions, position_table, offset=0, position_offset=2)
    assert close(result, table[ids] + position_table[positions + 2])
    # Four ids of 4 bytes; four rows of 16 bytes read and written, whatever the size of the table.
    assert cost("embedding", i32("T"), f32(6000, 4), offset=0) == Cost(0, 5 * 4 + 2 * 5 * 4 * 4)


def test_a_masked_embedding_gives_zeros_outside_even_beside_nan() -> None:
    """Oracle: the whole table; the shares of two ranks add up to its rows."""
    ids, table = np.array([0, 5, 3, 2], np.int32), values(6, 4)
    parts = [run("embedding", ids, table[3 * r : 3 * r + 3], offset=-3 * r, masked=True) for r in range(2)]
    assert close(sum(parts), table[ids])
    table[0] = np.nan
    assert close(run("embedding", np.array([7], np.int32), table, offset=0, masked=True), np.zeros((1, 4)))


# ---- norms -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("affine", ["none", "weight", "bias", "both"])
@pytest.mark.parametrize("op", list(NORMS))
def test_norms(op: str, affine: str) -> None:
    x, residual = values(5, 8) + 2, values(5, 8, seed=3)
    weight = values(8, seed=1) if affine in ("weight", "both") else None
    bias = values(8, seed=2) if affine in ("bias", "both") else None
    assert infer(op, f32("T", 8), f32(8), None, eps=1e-3) == (f32("T", 8),)
    assert close(run(op, x, weight, bias, eps=1e-3), NORMS[op](x, weight, bias, 1e-3))
    total, normed = run(f"add_{op}", x, residual, weight, bias, eps=1e-3)
    assert close(total, x + residual)
    assert close(normed, NORMS[op](x + residual, weight, bias, 1e-3))
    assert infer(f"add_{op}", f32("T", 8), f32("T", 8), eps=1e-3) == (f32("T", 8), f32("T", 8))
    assert cost(op, f32("T", 8), f32(8), eps=1e-3) == Cost(8 * 5 * 8, 4 * (2 * 5 * 8 + 8))


def test_norms_of_half_precision_keep_their_statistics_wide() -> None:
    """Squares of 300 overflow float16. Oracle: the formula in float64."""
    x = torch.tensor([[300.0, -301.0, 299.0, 100.0]], dtype=torch.float16)
    for op, oracle in NORMS.items():
        result = get_op(op).reference(ReferenceContext(), {"eps": 1e-5}, x)
        assert result.dtype == torch.float16
        assert max_error(result, oracle(x.double().numpy(), None, None, 1e-5)) < 2e-3


# ---- structure ---------------------------------------------------------------------------------------


def test_structure() -> None:
    x, y = values(5, 8), values(5, 3, seed=1)
    index = np.array([4, 0], np.int32)
    assert infer("reshape", f32("T", 8), shape=("T", 2, 4)) == (f32("T", 2, 4),)
    assert close(run("reshape", x, shape=("T", 2, 4)), x.reshape(5, 2, 4))
    assert infer("concat", f32("T", 8), f32("T", 3), axis=-1) == (f32("T", 11),)
    assert close(run("concat", x, y, axis=1), np.concatenate([x, y], 1))
    assert infer("split", f32("T", 8), axis=1, sizes=(5, 3)) == (f32("T", 5), f32("T", 3))
    for part, expected in zip(run("split", x, axis=1, sizes=(5, 3)), (x[:, :5], x[:, 5:]), strict=True):
        assert close(part, expected)
    assert infer("slice", f32("T", 8), axis=1, start=2, stop=5) == (f32("T", 3),)
    assert close(run("slice", x, axis=1, start=2, stop=5), x[:, 2:5])
    assert infer("transpose", f32(5, 8)) == (f32(8, 5),)
    assert close(run("transpose", x), x.T)
    assert infer("select_rows", f32("T", 8), i32("R")) == (f32("R", 8),)
    assert close(run("select_rows", x, index), x[[4, 0]])


def test_cost_of_structure() -> None:
    """Views are free; selected rows are read and written once; a concatenation moves everything."""
    free = Cost(0, 0)
    assert cost("reshape", f32("T", 8), shape=("T", 2, 4)) == free
    assert cost("split", f32("T", 8), axis=1, sizes=(5, 3)) == free
    assert cost("slice", f32("T", 8), axis=1, start=2, stop=5) == free
    assert cost("transpose", f32(5, 8)) == free
    assert cost("select_rows", f32("T", 8), i32("R")) == Cost(0, 4 * 2 * 2 * 8)
    assert cost("concat", f32("T", 8), f32("T", 3), axis=1) == Cost(0, 4 * 2 * 5 * 11)
    for op in ("input", "weight"):
        assert cost(op, dtype="float32", shape=("T", 8)) == free


# ---- collectives -------------------------------------------------------------------------------------


class TwoEqualRanks:
    """The other rank has twice what this one has."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x + 2 * x

    def all_gather(self, x: torch.Tensor, axis: int) -> torch.Tensor:
        return torch.cat([x, 2 * x], axis)


def test_collectives() -> None:
    x = values(5, 8)
    context = ReferenceContext(communicator=TwoEqualRanks())
    assert infer("all_reduce", f32("T", 8), tp_size=2) == (f32("T", 8),)
    assert infer("all_gather", f32("T", 8), axis=-1, tp_size=4) == (f32("T", 32),)
    assert close(run("all_reduce", x, context=context, tp_size=2), 3 * x)
    residual, weight, bias = values(5, 8), values(8), values(8)
    for norm, alone in (("layer", "layer_norm"), ("rms", "rms_norm")):
        attrs = {"tp_size": 2, "norm": norm, "eps": 1e-5}
        assert infer("all_reduce_norm", f32("T", 8), None, f32(8), **attrs) == (f32("T", 8), f32("T", 8))
        total, normed = run("all_reduce_norm", x, residual, weight, bias, context=context, **attrs)
        assert close(total, 3 * x + residual)
        assert close(normed, run(alone, 3 * x + residual, weight, bias, eps=1e-5))
        # Three of the ranks' sum, one of the residual's, eight of the norm's.
        whole = f32("T", 8)
        assert cost("all_reduce_norm", whole, whole, **attrs | {"tp_size": 4}) == Cost(
            (3 + 1 + 8) * 40, 4 * 4 * 40
        )
        total, normed = run("all_reduce_norm", x, context=context, **attrs)
        assert close(total, 3 * x) and close(normed, run(alone, 3 * x, eps=1e-5))
    assert close(run("all_gather", x, context=context, axis=1, tp_size=2), np.concatenate([x, 2 * x], 1))
    with pytest.raises(AssertionError, match="all_reduce needs a communicator"):
        run("all_reduce", x, tp_size=2)


# ---- the table ---------------------------------------------------------------------------------------


def test_the_table_knows_the_ops_of_the_design() -> None:
    assert op_names() >= {
        "input", "weight", "embedding", "linear", "layer_norm", "add_layer_norm", "rms_norm", "add_rms_norm", "rotary",
        "attention", "activation", "add", "mul", "reshape", "concat", "split", "slice", "transpose", "cast",
        "select_rows", "all_reduce", "all_reduce_norm", "all_gather",
    }  # fmt: skip


def test_an_unknown_op_is_named() -> None:
    with pytest.raises(GraphError, match=r"op 'conv' is not registered; known ops: .*activation, add, "):
        get_op("conv")


def test_an_op_is_registered_once() -> None:
    linear = get_op("linear")
    assert register(linear) is linear
    with pytest.raises(GraphError, match="op 'linear' is registered twice"):
        register(Op("linear", linear.infer, linear.reference))
    assert get_op("linear") is linear


def test_an_op_whose_reference_cannot_be_called_is_refused() -> None:
    with pytest.raises(
        GraphError, match="op 'mine': its reference takes fewer arguments than context and attrs"
    ):
        register(Op("mine", get_op("add").infer, lambda x: x))
    assert "mine" not in op_names()
