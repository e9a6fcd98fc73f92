"""Fusions, each where it applies and where it must not.

Oracle of every rewrite: the interpreter in float64 gives the same value before and after.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from trtc.core.graph import Graph
from trtc.core.passes import fuse
from trtc.core.passes.fold import partition

from .small_graphs import check, linear, ops_of, small, unchanged


class ThreeTimesAsMuch:
    """The other ranks have twice what this one has."""

    def all_reduce(self, x: torch.Tensor, *, overwrite: bool = False) -> torch.Tensor:
        return 3 * x


def _activation(kind: str, present: bool) -> dict[str, Any]:
    return {"activation": kind} if present else {}


@pytest.mark.parametrize("bias", [False, True])
def test_linear_siblings_become_one_product(bias: bool) -> None:
    shapes: dict[str, tuple[int, ...]] = {"q_w": (8, 8), "k_w": (4, 8), "v_w": (4, 8)}
    g, x = small(**shapes, **({"q_b": (8,), "k_b": (4,), "v_b": (4,)} if bias else {}))
    q, k, v = (linear(g, x, name, bias=bias) for name in "qkv")
    both = g.add("concat", k, v, name="kv", axis=1)
    after = check(g.finish(g.add("mul", q, both, name="product")), fuse.linear_siblings)
    assert ops_of(after) == [
        "embedding",
        "concat",
        *(["concat"] if bias else []),
        "linear",
        "split",
        "concat",
        "mul",
    ]
    assert after.producers["qkv"].op == "linear"


@pytest.mark.parametrize("case", ["other input", "one without bias", "one with activation", "alone"])
def test_linears_that_are_no_siblings_stay(case: str) -> None:
    shapes: dict[str, tuple[int, ...]] = {"a_w": (8, 8), "b_w": (8, 8)}
    g, x = small(**shapes, **({"a_b": (8,)} if case == "one without bias" else {}))
    first = linear(g, x, "a", bias=case == "one without bias")
    other = g.add("activation", x, name="act", kind="relu") if case == "other input" else x
    other = first if case == "alone" else other
    second = linear(g, other, "b", **_activation("relu", case == "one with activation"))
    assert unchanged(g.finish(g.add("mul", first, second, name="product")), fuse.linear_siblings)


def test_an_activation_goes_into_the_linear_before_it() -> None:
    g, x = small(a_w=(8, 8), a_b=(8,))
    out = g.add("activation", linear(g, x, "a", bias=True), name="act", kind="gelu_tanh")
    after = check(g.finish(out), fuse.linear_activation)
    assert ops_of(after) == ["embedding", "linear"]
    assert after.producers["a"].attrs == {"activation": "gelu_tanh"}


@pytest.mark.parametrize("case", ["other reader", "two activations", "no linear"])
def test_an_activation_stays_where_the_linear_alone_is_needed(case: str) -> None:
    g, x = small() if case == "no linear" else small(a_w=(8, 8))
    if case == "no linear":
        out = g.add("activation", x, name="act", kind="relu")
    else:
        y = linear(g, x, "a", **_activation("silu", case == "two activations"))
        out = g.add("activation", y, name="act", kind="relu")
        out = g.add("add", y, out, name="sum") if case == "other reader" else out
    assert unchanged(g.finish(out), fuse.linear_activation)


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_a_norm_takes_the_sum_before_it_along(norm: str) -> None:
    """Other readers of the sum, another norm among them, get it from the fused op."""
    g, x = small(t2=(11, 8), n_w=(8,), m_w=(8,))
    y = g.add("embedding", "token_ids", g.weight("t2"), name="y", offset=0)
    total = g.add("add", x, y, name="sum")
    first = g.add(norm, total, g.weight("n_w"), name="n", eps=1e-5)
    second = g.add(norm, total, g.weight("m_w"), name="m", eps=1e-5)
    out = g.add("add", g.add("mul", first, second, name="product"), total, name="out")
    after = check(g.finish(out), fuse.add_norm)
    assert ops_of(after) == ["embedding", "embedding", f"add_{norm}", norm, "mul", "add"]


def test_a_norm_of_no_sum_or_of_a_sum_with_a_vector_stays() -> None:
    g, x = small(vector=(8,))
    assert unchanged(g.finish(g.add("layer_norm", g.add("add", x, g.weight("vector"), name="sum"), name="n", eps=1e-5)),
                     fuse.add_norm)  # fmt: skip
    g, x = small()
    assert unchanged(g.finish(g.add("layer_norm", x, name="n", eps=1e-5)), fuse.add_norm)


@pytest.mark.parametrize("affine", [False, True], ids=["bare", "scale and shift"])
@pytest.mark.parametrize("adds", ["no", "x", "residual"])
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_a_sum_over_ranks_takes_the_norm_after_it_along(norm: str, adds: str, affine: bool) -> None:
    """The sum is either input of an add_norm; other readers get it from the fused op, with what was added."""
    g, x = small(**({"n_w": (8,), "n_b": (8,)} if affine else {}))
    total = g.add("all_reduce", x, name="sum", tp_size=2)
    weights = [g.weight("n_w"), g.weight("n_b")] if affine else []
    if adds == "no":
        stream, normed = total, g.add(norm, total, *weights, name="n", eps=1e-5)
    else:
        inputs = (total, x) if adds == "x" else (x, total)
        stream, normed = g.add_many(f"add_{norm}", *inputs, *weights, name="n", eps=1e-5)
    graph = g.finish(g.add("mul", stream, normed, name="out"))
    after = check(graph, fuse.all_reduce_norm, communicator=ThreeTimesAsMuch())
    assert ops_of(after) == ["embedding", "all_reduce_norm", "mul"]
    (node,) = (node for node in after.nodes if node.op == "all_reduce_norm")
    given = [x, *([None] if adds == "no" and affine else [] if adds == "no" else [x]), *weights]
    assert node.inputs == tuple(given)
    assert node.attrs == {"tp_size": 2, "norm": norm.removesuffix("_norm"), "eps": 1e-5}


def test_a_sum_over_ranks_that_is_read_before_something_is_added_stays() -> None:
    g, x = small()
    total = g.add("all_reduce", x, name="sum", tp_size=2)
    stream, normed = g.add_many("add_layer_norm", x, total, name="n", eps=1e-5)
    out = g.add("add", g.add("mul", stream, normed, name="product"), total, name="out")
    assert unchanged(g.finish(out), fuse.all_reduce_norm)
    g, x = small()
    assert unchanged(g.finish(g.add("layer_norm", x, name="n", eps=1e-5)), fuse.all_reduce_norm)


@pytest.mark.parametrize("activation", [{}, {"activation": "gelu"}], ids=["plain", "with activation"])
@pytest.mark.parametrize("first", [True, False], ids=["residual first", "residual second"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_takes_the_residual_added_to_it(bias: bool, first: bool, activation: dict[str, Any]) -> None:
    g, x = small(a_w=(8, 8), **({"a_b": (8,)} if bias else {}))
    y = linear(g, x, "a", bias=bias, **activation)
    after = check(g.finish(g.add("add", *((x, y) if first else (y, x)), name="sum")), fuse.linear_residual)
    assert ops_of(after) == ["embedding", "linear"]


@pytest.mark.parametrize("case", ["other reader", "vector", "second sum"])
def test_a_sum_stays_where_the_linear_cannot_take_it(case: str) -> None:
    g, x = small(a_w=(8, 8), **({"v": (8,)} if case == "vector" else {}))
    y = linear(g, x, "a")
    total = g.add("add", y, g.weight("v") if case == "vector" else x, name="sum")
    if case == "other reader":
        assert unchanged(g.finish(g.add("mul", total, y, name="product")), fuse.linear_residual)
    elif case == "vector":
        assert unchanged(g.finish(total), fuse.linear_residual)
    else:
        again = g.add("add", total, x, name="again")
        assert ops_of(check(g.finish(again), fuse.linear_residual)) == ["embedding", "linear", "add"]


def test_positions_go_into_the_lookup_of_tokens() -> None:
    g, x = small(p=(30, 8))
    positions = g.add("embedding", "positions", g.weight("p"), name="positions_embedded", offset=2)
    after = check(g.finish(g.add("add", x, positions, name="sum")), fuse.embedding_positions)
    assert ops_of(after) == ["embedding"]


@pytest.mark.parametrize("case", ["other reader", "no lookup", "masked positions"])
def test_positions_stay_where_the_lookups_are_needed_apart(case: str) -> None:
    g, x = small(p=(30, 8))
    attrs: dict[str, Any] = {"masked": True} if case == "masked positions" else {}
    y = g.add("embedding", "positions", g.weight("p"), name="y", offset=2, **attrs)
    if case == "no lookup":
        y = g.add("activation", y, name="act", kind="relu")
    out = g.add("add", x, y, name="sum")
    if case == "other reader":
        out = g.add("mul", out, x, name="product")
    assert unchanged(g.finish(out), fuse.embedding_positions)


def norm_and_linear(norm: str, extra: str, weights: tuple[str, ...] = ()) -> Graph:
    """linear(norm(x)), with what `extra` names besides the product, and the norm's own `weights`."""
    vectors: dict[str, tuple[int, ...]] = dict.fromkeys(weights, (8,))
    g, x = small(a_w=(8, 8), **({"a_b": (8,)} if "bias" in extra else {}), **vectors)
    normed = g.add(
        norm, x, *(g.optional_weight(name) for name in ("scale", "shift")), name="normed", eps=1e-3
    )
    bias = g.optional_weight("a_b")
    residual = x if "residual" in extra else None
    return g.finish(g.add("linear", normed, g.weight("a_w"), bias, residual, name="a", activation="gelu"))


EXTRAS = ["plain", "bias", "residual", "bias and residual"]


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_a_linear_takes_the_norm_before_it(norm: str, extra: str) -> None:
    assert ops_of(check(norm_and_linear(norm, extra), fuse.norm_linear)) == ["embedding", "linear"]
    assert unchanged(norm_and_linear(norm, extra, ("scale",)), fuse.norm_linear)


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize(
    ("norm", "weights"),
    [("layer_norm", ("scale", "shift")), ("layer_norm", ("scale",)), ("rms_norm", ("scale",))],
)
def test_the_weights_of_a_norm_go_into_the_linear_after_it(
    norm: str, weights: tuple[str, ...], extra: str
) -> None:
    """What is computed of weights alone is left to the build; then the norm itself goes in too."""
    after = check(norm_and_linear(norm, extra, weights), fuse.affine_into_linear)
    assert ops_of(partition(after).graph) == ["embedding", norm, "linear"]
    assert ops_of(partition(check(after, fuse.norm_linear)).graph) == ["embedding", "linear"]


def test_the_weights_of_a_norm_stay_where_it_has_none_or_others_read_it() -> None:
    assert unchanged(norm_and_linear("layer_norm", "bias"), fuse.affine_into_linear)
    g, x = small(a_w=(8, 8), scale=(8,))
    normed = g.add("layer_norm", x, g.weight("scale"), name="normed", eps=1e-5)
    assert unchanged(
        g.finish(g.add("mul", linear(g, normed, "a"), normed, name="m")), fuse.affine_into_linear
    )


@pytest.mark.parametrize("masked", [False, True])
def test_the_weights_of_a_norm_stay_before_a_table_that_is_split(masked: bool) -> None:
    """It is there once, for a lookup in a part of the vocabulary and as the head."""
    g, _ = small(scale=(8,))
    x = g.add("embedding", "token_ids", g.weight("table"), name="part", offset=0, masked=masked)
    normed = g.add("layer_norm", x, g.weight("scale"), name="normed", eps=1e-5)
    graph = g.finish(g.add("linear", normed, g.weight("table"), name="head"))
    assert unchanged(graph, fuse.affine_into_linear) == masked


def test_a_norm_with_another_reader_stays() -> None:
    g, x = small(a_w=(8, 8))
    normed = g.add("layer_norm", x, name="normed", eps=1e-5)
    assert unchanged(g.finish(g.add("mul", linear(g, normed, "a"), normed, name="product")), fuse.norm_linear)
