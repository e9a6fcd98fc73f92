"""quantize_rows: reference, contract, machine code; on a GPU the kernels themselves."""

from __future__ import annotations

import pytest
import torch
from trtc.kernels.errors import KernelContractError
from trtc.kernels.library import KernelLibrary
from trtc.kernels.nvrtc import CI_ARCHITECTURES, compile_kernel
from trtc.kernels.quantize_rows import MAX_COLUMNS, QuantizeRows, check, sources
from trtc.kernels.quantize_rows.reference import quantize_rows


def test_reference_rounds_each_row_by_its_largest() -> None:
    """Oracle: by hand; and that no number is further away than half a step of e4m3 of its scale."""
    x = torch.tensor([[1.0, -2.0, 0.5, 0.0], [0.0] * 4, [6e4, 3.0, -6e4, 1.0]]).half()
    numbers, scale = quantize_rows(x)
    assert numbers.dtype is torch.float8_e4m3fn and scale.dtype is torch.float32
    assert numbers[0].float().tolist() == [224.0, -448.0, 112.0, 0.0] and scale[1] == 1.0
    assert numbers[2].float().tolist() == [448.0, 0.021484375, -448.0, 0.0078125]
    assert quantize_rows(x, relu=True)[0][2].float().tolist() == [448.0, 0.021484375, 0.0, 0.0078125]
    random = torch.randn(20, 64, generator=torch.Generator().manual_seed(2)).half() * 10
    numbers, scale = quantize_rows(random)
    exact = random.float() / scale[:, None]
    assert bool(((numbers.float() - exact).abs() <= (exact.abs() / 16).clamp(min=2.0**-10)).all())
    assert bool((numbers.float().abs().amax(1) == 448).all())
    assert 0.02 < float((numbers.float() - exact).norm() / exact.norm()) < 0.03


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"x": torch.zeros(2, 12, dtype=torch.float16)},
            "columns=12 and padded_columns=16 are not multiples of 8",
        ),
        ({"x": torch.zeros(2, 24, dtype=torch.float16)}, "columns=24 and padded_columns=16"),
        ({"x": torch.zeros(2, 16)}, "dtype float32 is not supported; accepted: float16, bfloat16"),
        ({"out": torch.zeros(2, 16, dtype=torch.int8)}, "expected [rows=2, padded_columns=16] float8_e4m3fn"),
        ({"scale": torch.zeros(2, dtype=torch.float16)}, "expected [rows=2] float32"),
        ({"out": torch.zeros(2, MAX_COLUMNS + 8).to(torch.float8_e4m3fn)}, f"at most {MAX_COLUMNS}"),
    ],
)
def test_contract_names_what_does_not_fit(changes: dict[str, torch.Tensor], message: str) -> None:
    """Oracle: the contract in `QuantizeRows.__call__`."""
    sound = {
        "x": torch.zeros(2, 16, dtype=torch.float16),
        "out": torch.zeros(2, 16).to(torch.float8_e4m3fn),
        "scale": torch.zeros(2),
    }
    check(**sound)
    with pytest.raises(KernelContractError) as caught:
        check(**{**sound, **changes})
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("arch", CI_ARCHITECTURES)
def test_compiles_without_spills(arch: str) -> None:
    """Oracle: NVRTC and the resource report of ptxas."""
    for name, usage in compile_kernel(sources("__half")[0], {}, arch).resources.items():
        assert usage.spill_store_bytes == usage.spill_load_bytes == usage.stack_bytes == 0, name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("columns", [64, 72, 768, 4096, 10240, 16384, 36864])
@pytest.mark.parametrize("relu", [False, True])
def test_kernel(columns: int, relu: bool, dtype: torch.dtype, library: KernelLibrary) -> None:
    """Oracle: the reference, bit for bit, for rows of all sizes; columns beyond are zeros."""
    padded = -(-columns // 16) * 16
    rows = torch.randn(37, columns, device="cuda", generator=torch.Generator(device="cuda").manual_seed(1))
    x = (rows * torch.logspace(-4, 3, 37, device="cuda")[:, None]).to(dtype)
    x[5] = 0
    out = torch.full((37, padded), torch.nan, device="cuda").to(torch.float8_e4m3fn)
    scale = torch.full((37,), torch.nan, device="cuda")
    QuantizeRows(library)(x, out=out, scale=scale, relu=relu)
    wanted, wanted_scale = quantize_rows(x, relu=relu)
    assert torch.equal(scale, wanted_scale)
    # The sign of zero is not a number's.
    assert torch.equal(out[:, :columns].float(), wanted.float())
    assert not out[:, columns:].float().any()


@pytest.mark.gpu
def test_kernel_lets_no_overflow_go_unnoticed(library: KernelLibrary) -> None:
    """Oracle: the contract: a row with an infinity or NaN has NaN in it, another has not."""
    x = torch.ones(4, 256, dtype=torch.float16, device="cuda")
    x[1, 7], x[2, 9] = torch.inf, torch.nan
    out = torch.empty(4, 256, dtype=torch.float8_e4m3fn, device="cuda")
    for relu in (False, True):
        QuantizeRows(library)(x, out=out, scale=torch.empty(4, device="cuda"), relu=relu)
        assert out.float().isnan().any(1).tolist() == [False, True, True, False]
