"""What all tests on a GPU need."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def needs_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
