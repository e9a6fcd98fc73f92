"""When the garbage collector looks, and at what."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import suppress

import pytest
from trtc.runtime.heap import keep_heap, without_collection


class Cycle:
    def __init__(self) -> None:
        self.own = self


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    gc.unfreeze()
    gc.enable()


@pytest.mark.parametrize("enabled", [True, False])
def test_collection_goes_on_as_before(enabled: bool) -> None:
    if not enabled:
        gc.disable()
    with suppress(ImportError), without_collection():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled() == enabled


@pytest.mark.parametrize("collect", [True, False])
def test_what_is_kept_is_looked_through_no_more(collect: bool) -> None:
    garbage, kept = Cycle(), Cycle()
    gone, held = weakref.ref(garbage), weakref.ref(kept)
    with without_collection():
        del garbage
        keep_heap(collect=collect)
    assert (gone() is None) == collect
    del kept
    gc.collect()
    assert held() is not None, "it was frozen"
    gc.unfreeze()
    gc.collect()
    assert held() is None and gone() is None
