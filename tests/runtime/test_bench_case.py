"""What `trtc bench --cases` takes. Oracle: the text."""

from __future__ import annotations

import pytest
from trtc.core.config import BuildConfig
from trtc.core.errors import ConfigError, RequestError
from trtc.runtime.bench_case import Case, Load


def test_a_case() -> None:
    assert Case.parse("64x512x128") == Case(64, 512, 128)


@pytest.mark.parametrize("text", ["", "8", "8x512", "8x512x0", "8xax1", "1x2x3x4", "-1x2x3", "1000001x2x3"])
def test_what_is_no_case(text: str) -> None:
    with pytest.raises(ConfigError, match="accepted: BxIxO, sequences, tokens in and tokens out"):
        Case.parse(text)


@pytest.mark.parametrize(
    "load",
    [Load(batches=(1,), input_len=48), Load(cases=(Case(1, 5, 4), Case(2, 8, 57))), Load((), mixed=1)],
)
def test_what_an_engine_cannot_hold_is_said_before_it_is_timed(load: Load) -> None:
    build = BuildConfig(max_seq_len=64, max_input_len=40)
    with pytest.raises(RequestError, match="takes max_input_len = 40 and max_seq_len = 64 together"):
        load.check_fits(build)
