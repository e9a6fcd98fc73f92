"""The chain of decoder layers over a stand-in for a GPU, on which a launch may begin before the one before it has ended."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from trtc.bench.kernels import decoder_layer_chain
from trtc.bench.kernels.decoder_layer_chain import Chain
from trtc.bench.kernels.decoder_layer_plans import NAMES, SIZES, Gpu, Layer, LayerPlans, choose_plans
from trtc.kernels.layer_norm.reference import norm as reference_norm
from trtc.kernels.linear.reference import linear as reference_linear
from trtc.kernels.paged_decode_attention.reference import paged_decode_attention as reference_attention


@dataclass
class Device:
    """A GPU: what the last launch has overwritten is what one that does not wait still sees, until the stream is waited for.

    hasty: the plan of a kernel that does not wait; None for a norm. captured: launches of the graph that is being captured.
    """

    hasty: Any = ()
    captured: list[Callable[[], None]] | None = None
    launches: int = 0
    before: tuple[torch.Tensor, torch.Tensor] | None = None

    def synchronize(self) -> None:
        self.before = None

    def launch(
        self, plan: Any, out: torch.Tensor, compute: Callable[[Callable[..., Any]], torch.Tensor]
    ) -> None:
        if self.captured is not None:
            self.captured.append(lambda: self._run(plan, out, compute))
        else:
            self._run(plan, out, compute)

    def _run(
        self, plan: Any, out: torch.Tensor, compute: Callable[[Callable[..., Any]], torch.Tensor]
    ) -> None:
        self.launches += 1
        result = compute(self._stale if plan == self.hasty else lambda tensor: tensor)
        self.before = out, out.clone()
        out.copy_(result)

    def _stale(self, tensor: torch.Tensor) -> torch.Tensor:
        """What a part of a tensor was before the last launch."""
        if (
            self.before is None
            or tensor.untyped_storage().data_ptr() != self.before[0].untyped_storage().data_ptr()
        ):
            return tensor
        return self.before[1].as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


class Graph:
    def __init__(self, device: Device) -> None:
        self.device = device
        self.launches: list[Callable[[], None]] = []

    def replay(self) -> None:
        self.device.synchronize()  # the start of a graph
        for launch in self.launches:
            launch()


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()

    class Linear:
        def __init__(self, library: None) -> None: ...

        def __call__(
            self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, out: torch.Tensor, residual: Any,
            norm: Any, plan: Any, activation: str,
        ) -> None:  # fmt: skip
            kind = "layer" if norm else "none"
            device.launch(
                plan, out,
                lambda seen: reference_linear(
                    seen(x), weight, bias, residual=residual, activation=activation, norm=kind
                ),
            )  # fmt: skip

    class LayerNorm:
        def __init__(self, library: None) -> None: ...

        def __call__(self, x: torch.Tensor, *, out: torch.Tensor) -> None:
            device.launch(None, out, lambda seen: reference_norm(seen(x)))

    class Attention:
        def __init__(self, library: None) -> None: ...

        def __call__(
            self, q: Any, k: Any, v: Any, *cache: Any, out: Any, plan: Any, scale: float, **_: Any
        ) -> None:
            device.launch(
                plan, out,
                lambda seen: reference_attention(seen(q), seen(k), seen(v), *cache, scale=scale),
            )  # fmt: skip

    @contextlib.contextmanager
    def capture(graph: Graph, stream: Device) -> Iterator[None]:
        stream.captured = graph.launches
        yield
        stream.captured = None

    for name, stand_in in (("Linear", Linear), ("LayerNorm", LayerNorm), ("PagedDecodeAttention", Attention)):
        monkeypatch.setattr(decoder_layer_chain, name, stand_in)
    monkeypatch.setattr(decoder_layer_chain, "DEVICE", "cpu")
    monkeypatch.setattr(decoder_layer_chain, "ROTATION_BYTES", 1)
    monkeypatch.setattr(decoder_layer_chain, "LEAST_LAYERS", 4)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: device)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "synchronize", device.synchronize)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Graph(device))
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setitem(SIZES, "tiny", {"hidden_size": 64, "num_attention_heads": 1})  # type: ignore[arg-type]
    return device


def chain_of(rows: int) -> tuple[Chain, LayerPlans]:
    layer = Layer("tiny", rows, 20)
    return Chain(None, layer), choose_plans(layer, Gpu())  # type: ignore[arg-type]


@pytest.mark.parametrize("rows", [2, 17])
def test_right_layers_pass_and_are_run_once(rows: int, device: Device) -> None:
    """Oracle: float64 for each kernel; the layers' launches, counted by hand: 5 kernels, 7 with norms of their own."""
    chain, plans = chain_of(rows)
    assert 0 < chain.check(plans) < 1e-3
    kernels = 5 if rows == 2 else 7
    checked = 2 * kernels
    loaded, layers = kernels, 4 * kernels
    assert device.launches == checked + loaded + layers * (1 + decoder_layer_chain.CHECKED_REPLAYS)
    chain.check(plans)
    assert device.launches == checked + loaded + layers * (1 + decoder_layer_chain.CHECKED_REPLAYS)


@pytest.mark.parametrize("name", [*NAMES, "norm"])
def test_a_kernel_that_does_not_wait_is_found(name: str, device: Device) -> None:
    """Oracle: its input, written by the launch before it. Alone each kernel is right."""
    chain, plans = chain_of(17 if name == "norm" else 2)
    device.hasty = None if name == "norm" else plans[name]
    chain.check_kernels(plans)
    with pytest.raises(AssertionError, match=r"layer tiny rows .*: captured layers do not give the bits"):
        chain.check(plans)
