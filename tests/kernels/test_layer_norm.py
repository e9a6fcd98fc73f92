"""layer_norm: reference and contract; on a GPU the kernels themselves."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from trtc.kernels.errors import KernelContractError
from trtc.kernels.layer_norm import LayerNorm
from trtc.kernels.layer_norm.reference import add_norm, norm
from trtc.kernels.library import KernelLibrary

RELATIVE_ERROR = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-6}


def test_reference_is_torch() -> None:
    """Oracle: torch's layer_norm and rms_norm in float64."""
    generator = torch.Generator().manual_seed(0)
    x, scale, shift = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((3, 16), (16,), (16,))
    )
    expected = functional.layer_norm(x, (16,), scale, shift)
    torch.testing.assert_close(norm(x, scale, shift), expected, rtol=1e-12, atol=1e-12)
    expected = functional.rms_norm(x, (16,), scale, eps=1e-5)
    torch.testing.assert_close(norm(x, scale, kind="rms"), expected, rtol=1e-12, atol=1e-12)


def test_reference_norms_the_rounded_sum() -> None:
    """Oracle: arithmetic: in float16, 2048 + 1 is 2048."""
    x = torch.tensor([[2048.0, 0.0]], dtype=torch.float16)
    total, normed = add_norm(x, torch.tensor([[1.0, 0.0]], dtype=torch.float16))
    assert total.tolist() == [[2048.0, 0.0]]
    torch.testing.assert_close(normed, norm(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 12, dtype=torch.float16)}, "columns=12 is not a multiple of 8 up to 12288"),
        (
            {"scale": torch.zeros(8, dtype=torch.float16)},
            r"scale is \[8\] float16 on cpu; expected \[columns=16\]",
        ),
        ({"kind": "batch"}, "kind 'batch' is unknown; accepted: layer, rms"),
        ({"residual": torch.zeros(2, 16, dtype=torch.float16)}, "residual and total are given together"),
    ],
)
def test_contract_is_checked_before_anything_runs(change: dict[str, object], message: str) -> None:
    """Oracle: the text; no GPU is touched."""
    arguments = {
        "x": torch.zeros(2, 16, dtype=torch.float16),
        "out": torch.zeros(2, 16, dtype=torch.float16),
        **change,
    }
    with pytest.raises(KernelContractError, match=message):
        LayerNorm(KernelLibrary())(**arguments)  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", RELATIVE_ERROR, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(1, 768), (3, 520), (65, 4096), (2, 6144), (1024, 2048)])
@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("adds", [False, True])
def test_kernels(
    kind: str, rows: int, columns: int, dtype: torch.dtype, adds: bool, library: KernelLibrary
) -> None:
    """Oracle: the float64 reference, on poisoned outputs; the mean is ten deviations."""
    generator = torch.Generator().manual_seed(columns)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to("cuda", dtype)

    x, scale, shift = random(rows, columns) + 10, random(columns), random(columns)
    residual = random(rows, columns) if adds else None
    out = torch.full_like(x, float("nan"))
    total = torch.full_like(x, float("nan")) if adds else None
    LayerNorm(library)(x, scale, shift, out=out, residual=residual, total=total, kind=kind)
    expected_total, expected = add_norm(
        x, torch.zeros_like(x) if residual is None else residual, scale, shift, kind=kind
    )
    assert float((out.double() - expected).norm() / expected.norm()) < RELATIVE_ERROR[dtype]
    if total is not None:
        torch.testing.assert_close(total, expected_total, rtol=float(torch.finfo(dtype).eps), atol=0)


@pytest.mark.gpu
def test_sum_in_place(library: KernelLibrary) -> None:
    """Oracle: the float64 reference; `total` may be the residual."""
    x, residual = (torch.randn(4, 768, device="cuda", dtype=torch.float16) for _ in range(2))
    expected_total, expected = add_norm(x, residual)
    out = LayerNorm(library)(x, out=torch.empty_like(x), residual=residual, total=residual)
    assert torch.equal(residual, expected_total)
    assert float((out.double() - expected).norm() / expected.norm()) < RELATIVE_ERROR[torch.float16]
