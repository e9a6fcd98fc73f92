"""What `trtc bench --cases` takes. Oracle: the text."""

from __future__ import annotations

import pytest
from trtc.core.errors import ConfigError
from trtc.runtime.bench_case import Case


def test_a_case() -> None:
    assert Case.parse("64x512x128") == Case(64, 512, 128)


@pytest.mark.parametrize("text", ["", "8", "8x512", "8x512x0", "8xax1", "1x2x3x4", "-1x2x3"])
def test_what_is_no_case(text: str) -> None:
    with pytest.raises(ConfigError, match="accepted: BxIxO, sequences, tokens in and tokens out"):
        Case.parse(text)
