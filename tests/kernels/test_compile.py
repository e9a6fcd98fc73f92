"""Every kernel of an OPT engine compiles on every architecture, without spills, and grows only on purpose."""

from __future__ import annotations

import json

import pytest
from trtc.bench.kernels.resources import RESOURCES_FILE, UPDATE_COMMAND, growth, measure, spills
from trtc.kernels.errors import DeviceError
from trtc.kernels.nvrtc import CI_ARCHITECTURES, compiler_version


@pytest.mark.parametrize("arch", CI_ARCHITECTURES)
def test_compiles_without_spills_and_without_growth(arch: str) -> None:
    """Oracle: ptxas, and the committed numbers."""
    try:
        compiler_version()
    except DeviceError as error:
        pytest.skip(str(error))
    measured = measure(arch)
    recorded = json.loads(RESOURCES_FILE.read_text())[arch]
    assert spills(measured) == []
    assert growth(measured, recorded) == [], f"if that is wanted, refresh the numbers with: {UPDATE_COMMAND}"


def test_growth_is_noticed() -> None:
    """Oracle: hand-made numbers."""
    small, large = {"registers": 40, "shared_bytes": 0}, {"registers": 41, "shared_bytes": 0}
    assert growth({"k": small}, {"k": large}) == []
    assert growth({"k": large}, {"k": small}) == ["k: registers 40 -> 41"]
    assert growth({"new": small}, {"old": small}) == [
        "new is not recorded",
        "old is recorded but no longer compiled",
    ]
    assert spills({"k": {"spill_store_bytes": 0, "spill_load_bytes": 4}}) == ["k"]
