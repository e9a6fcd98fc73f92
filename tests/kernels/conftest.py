"""Fixtures of the kernel tests."""

from __future__ import annotations

import pytest
from trtc.kernels.errors import DeviceError
from trtc.kernels.launch import driver
from trtc.kernels.library import KernelLibrary


@pytest.fixture(scope="session")
def library() -> KernelLibrary:
    """Kernels of the first GPU, compiled on first use; skips where there is none."""
    try:
        driver()
    except DeviceError as error:
        pytest.skip(str(error))
    return KernelLibrary()
