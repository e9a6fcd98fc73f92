"""Products by cuBLASLt against float64."""

from __future__ import annotations

import pytest
import torch
from trtc.core.targets.cuda import cublaslt
from trtc.core.targets.cuda.cublaslt import CublasLt
from trtc.tests.fp8_products import linear

TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Of the norm of the difference: results are rounded to 10 or 7 bits after the leading one."""


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 100, 8192])
def test_products(rows: int, dtype: torch.dtype) -> None:
    """Oracle: float64. Rows that lie apart, a weight that is a slice, and everything that an epilogue can have."""
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda").to(dtype)

    library = CublasLt()
    wide, tall, residual, bias = random(rows, 384), random(600, 256), random(rows, 520), random(520)
    x, weight = wide[:, 64:320], tall[40:560]
    for activation in ("none", "relu", "gelu"):
        for more in ((None, None), (bias, None), (None, residual), (bias, residual)):
            found = library.linear(x, weight, *more, activation)
            wanted = linear(
                x.double(), weight.double(), *(None if t is None else t.double() for t in more), activation
            )
            error = float((found.double() - wanted).norm() / wanted.norm())
            assert found.dtype == dtype and found.shape == wanted.shape
            assert error < TOLERANCE[dtype], (activation, [t is not None for t in more])
    assert torch.equal(
        library.linear(x, weight, bias, residual, "none"), library.linear(x, weight, bias, residual, "none")
    )


@pytest.mark.gpu
def test_many_row_counts_forget_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: float64, for a shape that was forgotten too."""
    monkeypatch.setattr(cublaslt, "_MOST_PLANS", 3)
    library, weight = CublasLt(), torch.randn(64, 64, device="cuda").half()
    for rows in (1, 2, 3, 4, 5, 1):
        x = torch.randn(rows, 64, device="cuda").half()
        found = library.linear(x, weight, None, None, "none")
        wanted = x.double() @ weight.double().t()
        assert float((found.double() - wanted).norm() / wanted.norm()) < TOLERANCE[torch.float16]
    assert len(library._plans) == 3
