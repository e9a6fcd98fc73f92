"""The op table. Oracle of every reference: a formula in numpy float64, written from the op's definition alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from trtc.core.dtypes import DType
from trtc.core.errors import GraphError, ShapeError
from trtc.core.ops import Cost, Op, ReferenceContext, Signature, get_op, op_names, register
from trtc.core.spec import Dim, TensorSpec
from trtc.tests.tolerances import OP_FLOAT64_ABS, max_error

Array = npt.NDArray[np.float64]
F32, I32 = DType.FLOAT32, DType.INT32
SIZES = {"T": 5, "B": 2, "B+1": 3, "P": 4, "R": 2, "C": 7}


def f32(*shape: Dim) -> TensorSpec:
    return TensorSpec(F32, shape)


def i32(*shape: Dim) -> TensorSpec:
    return TensorSpec(I32, shape)


def infer(op: str, *inputs: TensorSpec | None, **attrs: Any) -> tuple[TensorSpec, ...]:
    return get_op(op).infer(Signature(op, "n", inputs, attrs))


def cost(op: str, *inputs: TensorSpec | None, **attrs: Any) -> Cost:
    signature = Signature(op, "n", inputs, attrs)
    return get_op(op).cost(signature, get_op(op).infer(signature), SIZES)


def run(op: str, *inputs: Array | npt.NDArray[Any] | None, context: Any = None, **attrs: Any) -> Any:
    tensors = [None if x is None else torch.from_numpy(np.ascontiguousarray(x)) for x in inputs]
    return get_op(op).reference(context or ReferenceContext(), attrs, *tensors)


def values(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape)


def close(result: Any, expected: Any) -> bool:
    return max_error(result, expected) <= OP_FLOAT64_ABS


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


def np_rotary(x: Array, positions: npt.NDArray[np.int32], theta: float) -> Array:
    """Pairs (i, i + half) as complex numbers, turned by position * theta^(-i / half)."""
    half = x.shape[-1] // 2
    turn = np.exp(1j * positions[:, None, None] * theta ** (-np.arange(half) / half))
    z = (x[..., :half] + 1j * x[..., half:]) * turn
    return np.concatenate([z.real, z.imag], -1)


def np_causal(q: Array, k: Array, v: Array, scale: float) -> Array:
    """The last len(q) tokens of one sequence attend to all before them. q: [n, H, D]; k, v: [length, KV, D]."""
    out = np.empty_like(q)
    for i in range(len(q)):
        end = len(k) - len(q) + i + 1
        for h in range(q.shape[1]):
            kv = h * k.shape[1] // q.shape[1]
            score = np.exp(scale * k[:end, kv] @ q[i, h])
            out[i, h] = score @ v[:end, kv] / score.sum()
    return out


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


def int8(*shape: int) -> TensorSpec:
    return TensorSpec(DType.INT8, shape)


def uint8(*shape: int) -> TensorSpec:
    return TensorSpec(DType.UINT8, shape)


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


# ---- attention, rotary -------------------------------------------------------------------------------


def test_rotary() -> None:
    x, positions = values(5, 3, 8), np.array([0, 1, 2, 50, 7], np.int32)
    assert infer("rotary", f32("T", 3, 8), i32("T"), theta=1e4) == (f32("T", 3, 8),)
    assert close(run("rotary", x, positions, theta=1e4), np_rotary(x, positions, 1e4))


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_attention_over_pages(kv_heads: int) -> None:
    """Oracle: dense causal attention over each sequence on its own. Two sequences with pages in any order, fed in two
    steps; the pages hold NaN where nothing was written."""
    heads, dim, page = 4, 6, 4
    lengths, pages = {0: (5, 3), 1: (1, 9)}, {0: [6, 1], 1: [0, 5, 3]}
    cache = [tuple(torch.full((8, page, kv_heads, dim), math.nan, dtype=torch.float64) for _ in range(2))]
    context = ReferenceContext(cache)  # type: ignore[arg-type]
    q, k, v = ({b: values(sum(n), h, dim, seed=10 * i + b) for b, n in lengths.items()}
               for i, h in enumerate((heads, kv_heads, kv_heads)))  # fmt: skip
    table = np.full((2, 3), -1, np.int32)
    for b, owned in pages.items():
        table[b, : len(owned)] = owned
    done = {0: 0, 1: 0}
    for step in range(2):
        parts = {b: slice(done[b], done[b] + n[step]) for b, n in lengths.items()}
        done = {b: part.stop for b, part in parts.items()}
        result = run(
            "attention",
            *(np.concatenate([x[b][part] for b, part in parts.items()]) for x in (q, k, v)),
            np.cumsum([0, *(n[step] for n in lengths.values())]).astype(np.int32),
            np.array(list(done.values()), np.int32),
            table,
            context=context, layer=0, scale=0.3,
        )  # fmt: skip
        expected = [np_causal(q[b][part], k[b][: done[b]], v[b][: done[b]], 0.3) for b, part in parts.items()]
        assert close(result, np.concatenate(expected))
    written = ~torch.isnan(cache[0][0]).all(-1).all(-1)
    assert int(written.sum()) == 8 + 10, "one slot for each token, and no other"


@pytest.mark.parametrize("held", [torch.float64, torch.float8_e4m3fn])
def test_attention_over_an_fp8_cache(held: torch.dtype) -> None:
    """Oracle: attention over k and v that torch has rounded, of a prompt in two chunks and then a token; whatever steps they
    came in, tokens see the same of each other. What is too large for e4m3 is cut off."""
    rows, dim, page = 10, 6, 4
    q, k, v = (values(rows, 2, dim, seed=i) for i in range(3))
    k[1, 0, 0], v[2, 1, 3] = 1000.0, -1000.0
    rounded = [torch.from_numpy(x).clamp(-448, 448).to(torch.float8_e4m3fn).double().numpy() for x in (k, v)]
    assert not close(rounded[0], k)
    table = np.array([[2, 0, 1]], np.int32)
    for chunks in ((rows,), (4, 5, 1)):
        cache = [tuple(torch.full((3, page, 2, dim), math.nan).to(held) for _ in range(2))]
        stop, parts = 0, []
        for size in chunks:
            start, stop = stop, stop + size
            place = (np.array([0, size], np.int32), np.array([stop], np.int32), table)
            new = (x[start:stop] for x in (q, k, v))
            attrs = {"layer": 0, "scale": 0.3, "cache_dtype": "float8_e4m3fn"}
            parts.append(run("attention", *new, *place, context=ReferenceContext(cache), **attrs))
        assert close(np.concatenate(parts), np_causal(q, *rounded, 0.3))


def test_cost_of_attention() -> None:
    """Oracle: by hand. 5 queries of 4 heads of 6 see 7 keys: 2 flops for q.k and 2 for the sum of v. Two sequences read
    k and v of 7 tokens; q, k, v come in and the result goes out."""
    q, k = f32("T", 4, 6), f32("T", 2, 6)
    tables = (i32("B+1"), i32("B"), i32("B", "P"))
    moved = 2 * 7 * 2 * (2 * 6 * 4) + 4 * (2 * 5 * 4 * 6 + 2 * 5 * 2 * 6)
    assert cost("attention", q, k, k, *tables, layer=0, scale=1.0) == Cost(4 * 5 * 4 * 6 * 7, moved)
    small = moved - 2 * 7 * 2 * (2 * 6 * 3)  # a byte instead of four
    fp8 = cost("attention", q, k, k, *tables, layer=0, scale=1.0, cache_dtype="float8_e4m3fn")
    assert fp8 == Cost(4 * 5 * 4 * 6 * 7, small)


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


# ---- shape rules -------------------------------------------------------------------------------------

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
        ("linear", (X, f32(3, 8)), {"activation": "tanh"}, "attribute activation is 'tanh'; accepted: ('relu'"),
        ("linear", (X, f32(3, 8), None, X), {}, "residual float32[T, 8] does not fit output float32[T, 3]"),
        ("linear", (X, f32(3, 8)), {"norm": "batch"}, "attribute norm is 'batch'"),
        ("linear", (X, f32(3, 8)), {"norm": "rms"}, "attribute 'eps' is missing"),
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
        ("embedding", (i32("T"), f32(6, 4), i32("R"), f32(6, 4)), {"offset": 0}, "positions int32[R] and ids int32[T]"),
        ("embedding", (i32("T"), f32(6, 4), i32("T"), f32(6, 5)), {"offset": 0}, "position table float32[6, 5] does"),
        ("activation", (X,), {"kind": "tanh"}, "attribute kind is 'tanh'; accepted: ('relu', 'gelu',"),
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
        ("concat", (X, X), {"axis": 2}, "axis 2 is outside of float32[T, 8]"),
        ("split", (X,), {"axis": 1, "sizes": (4, 5)}, "sizes (4, 5) do not add up to axis 1"),
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
        ("attention", (*QKV, *TABLES), {"scale": 1.0}, "attribute 'layer' is missing"),
        ("attention", (*QKV, *TABLES), {"layer": 0}, "attribute 'scale' is missing"),
        ("rotary", (X, i32("T")), {"theta": 1e4}, "input float32[T, 8] is not [tokens, heads, head_dim]"),
        ("rotary", (QKV[0], i32("R")), {"theta": 1e4}, "positions int32[R] do not fit"),
        ("rotary", (f32("T", 4, 5), i32("T")), {"theta": 1e4}, "head_dim of float32[T, 4, 5] is not even"),
        ("all_gather", (X,), {"axis": 0, "tp_size": 2}, "axis 0 of float32[T, 8] is not a known size"),
        ("all_gather", (X,), {"axis": 2, "tp_size": 2}, "axis 2 is outside of float32[T, 8]"),
        ("all_reduce", (X,), {}, "attribute 'tp_size' is missing"),
        ("all_reduce_norm", (X, f32("R", 8)), SUM_NORM, "input float32[T, 8] and residual float32[R, 8] differ"),
        ("all_reduce_norm", (X, None, f32(4)), SUM_NORM, "weight float32[4] does not fit input float32[T, 8]"),
        ("all_reduce_norm", (X,), SUM_NORM | {"norm": "none"}, "attribute norm is 'none'; accepted: ('layer', 'rms'"),
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
