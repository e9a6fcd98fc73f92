"""Decoder layers one after another on a GPU, with the plans they are given: checked, and timed in a CUDA graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ...kernels.layer_norm import LayerNorm
from ...kernels.library import KernelLibrary
from ...kernels.linear import Linear, Norm, Plan, weight_sums
from ...kernels.linear.reference import linear as reference_linear
from ...kernels.paged_decode_attention import DecodePlan, PagedDecodeAttention
from ...kernels.paged_decode_attention.reference import paged_decode_attention as reference_attention
from .attention_cases import Model, paged_batch, row_error
from .attention_checks import TOLERANCE as ATTENTION_TOLERANCE
from .decoder_layer_plans import NAMES, Layer, LayerPlans
from .dense import TOLERANCE
from .harness import ROTATION_BYTES, relative_error

LEAST_LAYERS = 24
"""Layers of a graph, at least: what its launch takes is then little beside them."""
CHECKED_REPLAYS = 3
"""Of a graph whose result is compared: more than one, since a kernel that does not wait is not always too early."""
DEVICE = "cuda"

Launch = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """A kernel with inputs of its own. launches: for a plan and the tensor for the result."""

    launches: Callable[[Any, torch.Tensor], Iterator[Launch]]
    expected: torch.Tensor
    error: Callable[[torch.Tensor, torch.Tensor], float]
    tolerance: float


class Weights:
    """Random weights of a layer's products, by name."""

    def __init__(self, layer: Layer) -> None:
        products = layer.products.items()
        self.matrix = {name: _normal(one.features, one.columns, std=0.02) for name, one in products}
        self.bias = {name: _normal(one.features, std=0.02) for name, one in products}
        self.norm = {name: Norm(weight_sums(self.matrix[name])) for name, one in products if one.norm}


class Chain:
    """Layers on the GPU, what flows through them, and the launches that make it."""

    def __init__(self, library: KernelLibrary, layer: Layer) -> None:
        torch.manual_seed(0)
        self.library, self.layer = library, layer
        self._linear, self._norm = Linear(library), LayerNorm(library)
        self._attention = PagedDecodeAttention(library)
        count = max(2, ROTATION_BYTES // layer.moved_bytes)
        self._graph_layers = -(-LEAST_LAYERS // count) * count
        self._weights = [Weights(layer) for _ in range(count)]
        model = Model(layer.heads, layer.heads, layer.head_dim)
        self._batch = paged_batch(model, [1] * layer.rows, [layer.tokens - 1] * layer.rows, device=DEVICE)
        first = self._batch.k_cache, self._batch.v_cache
        others = ((torch.randn_like(first[0]), torch.randn_like(first[1])) for _ in range(count - 1))
        self._caches = [first, *others]
        self._start = _normal(layer.rows, layer.hidden)
        self._hidden, self._normed, self._mixed = (self._start.clone() for _ in range(3))
        self._fused = _normal(layer.rows, 3 * layer.hidden)
        self._wide = _normal(layer.rows, 4 * layer.hidden)
        self._workspaces: dict[DecodePlan, torch.Tensor] = {}
        self._cases: dict[str, Case] = {}
        self._errors: dict[tuple[str, Plan | DecodePlan], float] = {}
        self._right: set[LayerPlans] = set()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()

    def check(self, plans: LayerPlans) -> float:
        """`check_kernels`, then the layers of a replayed graph against the same launches one by one.

        Raises AssertionError where these do not end with the same bits: a kernel does not wait for one that it must wait for.
        """
        error = self.check_kernels(plans)
        if plans not in self._right:
            self._check_layers(plans)
            self._right.add(plans)
        return error

    def check_kernels(self, plans: LayerPlans) -> float:
        """The largest relative error of a kernel. Raises AssertionError for a wrong result, or one that changes."""
        return max(self._check_kernel(name, plans[name]) for name in NAMES)

    def time(self, contenders: Sequence[LayerPlans], replays: int) -> list[list[float]]:
        """Microseconds a layer: `replays` samples of each of `contenders`, whose graphs take turns."""
        graphs = [self._capture(plans) for plans in contenders]
        spans = []
        with torch.cuda.stream(self._stream):
            for graph in graphs * (replays + 1):
                begin, end = (
                    torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
                    for _ in range(2)
                )
                self._hidden.copy_(self._start)  # it grows from layer to layer
                begin.record()
                graph.replay()
                end.record()
                spans.append((begin, end))
        self._stream.synchronize()
        us = [1000 * begin.elapsed_time(end) / self._graph_layers for begin, end in spans]
        warm = us[len(graphs) :]
        return [warm[index :: len(graphs)] for index in range(len(graphs))]

    def _capture(self, plans: LayerPlans) -> torch.cuda.CUDAGraph:
        with torch.cuda.stream(self._stream):
            _run(self._layer(0, plans))  # loads the kernels
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            _run(self._layers(plans))
        return graph

    def _layers(self, plans: LayerPlans) -> Iterator[Launch]:
        for index in range(self._graph_layers):
            yield from self._layer(index % len(self._weights), plans)

    def _layer(self, index: int, plans: LayerPlans) -> Iterator[Launch]:
        hidden, heads = self._hidden, (self.layer.rows, self.layer.heads, self.layer.head_dim)
        yield from self._product("qkv", index, plans.qkv, hidden, self._fused)
        q, k, v = (part.view(heads) for part in torch.split(self._fused, self.layer.hidden, dim=1))
        yield from self._attend(index, plans.attention, (q, k, v), self._mixed.view(heads))
        yield from self._product("out", index, plans.out, self._mixed, hidden, hidden)
        yield from self._product("fc1", index, plans.fc1, hidden, self._wide)
        yield from self._product("fc2", index, plans.fc2, self._wide, hidden, hidden)

    def _product(
        self, name: str, index: int, plan: Plan, x: torch.Tensor, out: torch.Tensor,
        residual: torch.Tensor | None = None,
    ) -> Iterator[Launch]:  # fmt: skip
        weights = self._weights[index]
        norm = weights.norm.get(name)
        if norm is not None and not self.layer.fuses_norms:
            yield partial(self._norm, x, out=self._normed)
            x, norm = self._normed, None
        yield partial(
            self._linear, x, weights.matrix[name], weights.bias[name], out=out, residual=residual, norm=norm,
            plan=plan, activation=self.layer.products[name].activation,
        )  # fmt: skip

    def _attend(
        self, index: int, plan: DecodePlan, qkv: tuple[torch.Tensor, ...], out: torch.Tensor
    ) -> Iterator[Launch]:
        if plan not in self._workspaces:
            size = max(16, plan.workspace_bytes)
            self._workspaces[plan] = torch.zeros(size, dtype=torch.uint8, device=DEVICE)
        q, k, v = qkv
        yield partial(
            self._attention, q, k, v, *self._caches[index], self._batch.page_table, self._batch.kv_length,
            out=out, plan=plan, scale=self.layer.head_dim**-0.5, workspace=self._workspaces[plan], early=True,
        )  # fmt: skip

    def _check_layers(self, plans: LayerPlans) -> None:
        graph = self._capture(plans)
        with torch.cuda.stream(self._stream):
            self._hidden.copy_(self._start)
            for launch in self._layers(plans):
                self._stream.synchronize()
                launch()
            expected = self._hidden.clone()
            for _ in range(CHECKED_REPLAYS):
                self._hidden.copy_(self._start)
                graph.replay()
                same = torch.equal(self._hidden, expected)
                assert same, (
                    f"{self.layer.case}: captured layers do not give the bits of launches one by one: {plans}"
                )

    def _check_kernel(self, name: str, plan: Plan | DecodePlan) -> float:
        if (name, plan) in self._errors:
            return self._errors[name, plan]
        if name not in self._cases:
            self._cases[name] = self._attention_case() if name == "attention" else self._product_case(name)
        case = self._cases[name]
        outs = []
        for _ in range(2):  # what fills a tensor lies between the launches, which must not overlap
            outs.append(torch.full_like(case.expected, math.nan, dtype=torch.float16))
            _run(case.launches(plan, outs[-1]))
        error = case.error(outs[0], case.expected)
        assert error < case.tolerance, f"{self.layer.case} {name}: error {error:.1e} with {plan}"
        assert torch.equal(*outs), f"{self.layer.case} {name}: a second launch differs with {plan}"
        self._errors[name, plan] = error
        return error

    def _product_case(self, name: str) -> Case:
        one, weights = self.layer.products[name], self._weights[0]
        x = _normal(self.layer.rows, one.columns)
        residual = _normal(self.layer.rows, one.features) if one.residual else None
        expected = reference_linear(
            x, weights.matrix[name], weights.bias[name], residual=residual, activation=one.activation,
            norm="layer" if one.norm else "none",
        )  # fmt: skip

        def launches(plan: Plan, out: torch.Tensor) -> Iterator[Launch]:
            return self._product(name, 0, plan, x, out, residual)

        return Case(launches, expected, relative_error, TOLERANCE)

    def _attention_case(self) -> Case:
        b = self._batch
        scale = self.layer.head_dim**-0.5
        expected = reference_attention(
            b.q, b.k, b.v, b.k_cache, b.v_cache, b.page_table, b.kv_length, scale=scale
        )

        def launches(plan: DecodePlan, out: torch.Tensor) -> Iterator[Launch]:
            return self._attend(0, plan, (b.q, b.k, b.v), out)

        return Case(launches, expected, row_error, ATTENTION_TOLERANCE[torch.float16])


def _run(launches: Iterator[Launch]) -> None:
    for launch in launches:
        launch()


def _normal(*shape: int, std: float = 1.0) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.float16, device=DEVICE).normal_(std=std)
