"""embedding: reference and contract; on a GPU the kernel itself."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from trtc.kernels.embedding import Embedding, Positions
from trtc.kernels.embedding.reference import embedding
from trtc.kernels.errors import KernelContractError
from trtc.kernels.library import KernelLibrary


def test_reference_is_torch_embedding() -> None:
    """Oracle: torch's embedding, tokens plus positions."""
    table, places = torch.randn(10, 4, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64)
    ids, spots = torch.tensor([3, 9, 0]), torch.tensor([0, 1, 4])
    out = embedding(ids, table, position_ids=spots, position_table=places, position_offset=2)
    assert torch.equal(out, functional.embedding(ids, table) + functional.embedding(spots + 2, places))


def test_shards_of_the_vocabulary_add_up() -> None:
    """Oracle: the lookup in the whole table."""
    table, ids = torch.randn(10, 4, dtype=torch.float64), torch.tensor([3, 9, 0, 5])
    parts = (embedding(ids, table[first : first + 5], offset=-first, masked=True) for first in (0, 5))
    assert torch.equal(sum(parts), embedding(ids, table))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"ids": torch.zeros(3, dtype=torch.int64)},
            r"ids is \[3\] int64 on cpu; expected \[num_tokens=3\] int32",
        ),
        ({"table": torch.zeros(5, 12, dtype=torch.float16)}, "columns=12 is not a multiple of 8"),
        ({"out": torch.zeros(4, 16, dtype=torch.float16)}, r"expected \[num_tokens=3, columns=16\]"),
        (
            {
                "positions": Positions(
                    torch.zeros(2, dtype=torch.int32), torch.zeros(9, 16, dtype=torch.float16)
                )
            },
            r"positions.ids is \[2\]",
        ),
    ],
)
def test_contract_is_checked_before_anything_runs(change: dict[str, object], message: str) -> None:
    """Oracle: the text; no GPU is touched."""
    arguments = {
        "ids": torch.zeros(3, dtype=torch.int32),
        "table": torch.zeros(5, 16, dtype=torch.float16),
        "out": torch.zeros(3, 16, dtype=torch.float16),
        **change,
    }
    with pytest.raises(KernelContractError, match=message):
        Embedding(KernelLibrary())(**arguments)  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("tokens", "columns"), [(1, 768), (65, 2560), (7, 520)])
@pytest.mark.parametrize("sharded", [False, True])
def test_kernel(tokens: int, columns: int, dtype: torch.dtype, sharded: bool, library: KernelLibrary) -> None:
    """Oracle: the float64 reference, rounded once: equal bits."""
    generator = torch.Generator().manual_seed(tokens)
    table = torch.randn(1000, columns, generator=generator).to("cuda", dtype)
    places = torch.randn(64, columns, generator=generator).to("cuda", dtype)
    ids = torch.randint(0, 1000, (tokens,), generator=generator, dtype=torch.int32).cuda()
    spots = torch.randint(0, 62, (tokens,), generator=generator, dtype=torch.int32).cuda()
    out = torch.full((tokens, columns), float("nan"), dtype=dtype, device="cuda")
    lookup = Embedding(library)
    if sharded:
        lookup(ids, table[:500], out=out, offset=-250, masked=True)
        expected = embedding(ids, table[:500], offset=-250, masked=True)
    else:
        lookup(ids, table, out=out, positions=Positions(spots, places, 2))
        expected = embedding(ids, table, position_ids=spots, position_table=places, position_offset=2)
    assert torch.equal(out, expected.to(dtype))
