"""The ops `attention` and `rotary`. Oracle: formulas in numpy float64, written from the ops' definitions alone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from trtc.core import layers
from trtc.core.dtypes import DType
from trtc.core.graph import Graph, GraphBuilder
from trtc.core.ops import Cost, ReferenceContext, get_op
from trtc.tests.tolerances import FLOAT64_ABS, max_error
from trtc.tests.toy_decoder import random_weights, weight_rows

from .graph_values import evaluate, three_rows
from .op_calls import Array, close, cost, f32, i32, infer, run, values


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


def test_rotary() -> None:
    x, positions = values(5, 3, 8), np.array([0, 1, 2, 50, 7], np.int32)
    assert infer("rotary", f32("T", 3, 8), i32("T"), theta=1e4) == (f32("T", 3, 8),)
    assert close(run("rotary", x, positions, theta=1e4), np_rotary(x, positions, 1e4))


def test_rotary_computes_where_its_inputs_are() -> None:
    """Target cuda runs the reference, on the GPU. Oracle: torch's device meta, which refuses a tensor of the CPU beside it."""
    x, positions = torch.empty(5, 3, 8, device="meta"), torch.empty(5, dtype=torch.int32, device="meta")
    result = get_op("rotary").reference(ReferenceContext(), {"theta": 1e4}, x, positions)
    assert result.device.type == "meta" and result.shape == x.shape


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


def test_self_attention_asks_what_becomes_of_heads_of_q_and_k_before_they_are_rotated() -> None:
    """Oracle: queries that are doubled, and keys that are trebled, give scores six times as large."""
    names: list[str] = []

    def scaled(g: GraphBuilder, heads: str, name: str) -> str:
        names.append(f"{name} of {g.shape(heads)[1]}")
        total = heads
        for i in range({"q_heads": 1, "k_heads": 2}[name]):
            total = g.add("add", total, heads, name=f"{name}.{i}")
        return total

    def graph(**how: Any) -> Graph:
        shapes = {"a.q.weight": (12, 8), "a.k.weight": (6, 8), "a.v.weight": (6, 8), "a.out.weight": (8, 12)}
        g = GraphBuilder(DType.FLOAT32, weight_rows(**shapes, embed__weight=(11, 8)))
        x = layers.embedding(g, "token_ids", "embed")
        heads = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 6}
        return g.finish(layers.self_attention(g, x, "a", layer=0, rotary_theta=10.0, **heads, **how))

    plain, inputs = graph(scale=0.6), three_rows(11)
    weights = random_weights(plain)
    assert (
        max_error(
            evaluate(graph(scale=0.1, on_heads=scaled), weights, inputs), evaluate(plain, weights, inputs)
        )
        <= FLOAT64_ABS
    )
    assert names == ["q_heads of 2", "k_heads of 1"]


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
