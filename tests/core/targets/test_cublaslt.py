"""Products by cuBLASLt: which of its proposals is taken, what follows a product, and which products do not ask for sums."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch
from trtc.core.dtypes import DType
from trtc.core.ops.elementwise import ACTIVATIONS
from trtc.core.targets.cuda import cublaslt
from trtc.core.targets.cuda.cublaslt import PREFERRED, PREFERRED_ROWS, CublasLt, Proposal, common_alignment
from trtc.core.targets.cuda.variants import decode_graph, prefill_graph
from trtc.kernels.errors import DeviceError
from trtc.tests.fp8_products import linear, planned


class Library:
    """Stands for cuBLASLt: knows the tile and cluster of every proposal."""

    def __init__(self, shapes: list[tuple[int, int]]) -> None:
        self._shapes = shapes

    def cublasLtMatmulAlgoConfigGetAttribute(
        self, proposal: Any, attribute: int, value: Any, size: int, written: Any
    ) -> int:
        tile, cluster = self._shapes[proposal._obj.algorithm[0]]
        value._obj.value = tile if attribute == 1 else cluster
        assert size == ctypes.sizeof(value._obj) == (4 if attribute == 1 else 2)
        return 0


def proposals(count: int) -> list[Proposal]:
    made = [Proposal() for _ in range(count)]
    for index, proposal in enumerate(made):
        proposal.algorithm[0] = index
    return made


@pytest.mark.parametrize(
    ("capability", "rows", "shapes", "chosen"),
    [
        ((9, 0), PREFERRED_ROWS, [(209, 3), PREFERRED, (23, 3)], 1),
        ((9, 0), PREFERRED_ROWS - 1, [(209, 3), PREFERRED], 0),
        ((9, 0), PREFERRED_ROWS, [(209, 3), (PREFERRED[0], 3)], 0),
        ((8, 0), PREFERRED_ROWS, [(209, 3), PREFERRED], 0),
    ],
)
def test_the_preferred_proposal_is_taken_where_it_was_measured(
    capability: tuple[int, int],
    rows: int,
    shapes: list[tuple[int, int]],
    chosen: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(cublaslt, "loaded_library", lambda: Library(shapes))
    found = CublasLt()._chosen(proposals(len(shapes)), rows)
    assert found.algorithm[0] == chosen


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("activation", ["none", *ACTIVATIONS])
def test_what_no_epilogue_has_follows_the_product(
    activation: str, adds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: torch in float64. Stands for the library: a product with the epilogue that it is told."""

    def product(
        _: CublasLt,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        relu: bool,
    ) -> torch.Tensor:
        assert residual is None or not relu, "cuBLASLt would apply ReLU to the sum"
        return linear(x, weight, bias, residual, "relu" if relu else "none")

    monkeypatch.setattr(CublasLt, "_product", product)
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, residual = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((5, 8), (6, 8), (6,), (5, 6))
    )
    given = (x, weight, bias, residual if adds else None, activation)
    assert torch.equal(CublasLt().linear(*given), linear(*given))


def test_alignment_is_that_of_the_worst_matrix() -> None:
    assert common_alignment([512, 1024]) == 256
    assert common_alignment([512, 1024 + 16, 64]) == 16


def test_a_torch_without_cuda_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "0.1")
    cublaslt.loaded_library.cache_clear()
    with pytest.raises(DeviceError, match=r"libcublasLt\.so\.0 is not loaded .* CUDA build of torch"):
        cublaslt.loaded_library()
    cublaslt.loaded_library.cache_clear()


@pytest.mark.parametrize("variant", ["cuda_pre_norm", "cuda_post_norm_projected"])
def test_products_of_integers_leave_sums_to_norms(variant: str, tmp_path: Path) -> None:
    """They round their rows or dequantize first, and what adds for nothing is the norm. Oracle: the graph has no product with a
    residual. Those of floats have, see test_cuda.py."""
    graph, _ = planned(variant, DType.FLOAT16, tmp_path)
    for many in (prefill_graph(graph), decode_graph(graph, rows=512, capability=90, fuse_residuals=False)):
        quantized = [node for node in many.nodes if node.op == "quantized_linear"]
        assert quantized and all(len(node.used) <= 4 for node in quantized)
