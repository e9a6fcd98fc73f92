"""Oracle: the bookkeeping of `PagePool` itself, `check_integrity`, on hand-made sequences of calls."""

from __future__ import annotations

import pytest
from trtc.runtime.kv_cache import PagePool, pages_for


def test_a_page_is_free_again_when_its_last_owner_lets_go() -> None:
    pool = PagePool(4)
    pages = pool.allocate(3)
    assert len(set(pages)) == 3 and pool.num_free == 1 and pool.num_used == 3
    pool.retain(pages[:1])
    pool.release(pages)
    assert pool.num_free == 3 and pool.ref_count(pages[0]) == 1
    pool.check_integrity()
    pool.release(pages[:1])
    assert pool.num_free == 4
    pool.check_integrity()


def test_misuse_is_an_assertion() -> None:
    pool = PagePool(2)
    pages = pool.allocate(2)
    with pytest.raises(AssertionError, match="asked for 1 pages, 0 are free"):
        pool.allocate(1)
    pool.release(pages)
    with pytest.raises(AssertionError, match="released more often"):
        pool.release(pages)
    with pytest.raises(AssertionError, match="cannot be shared"):
        pool.retain(pages)


def test_check_integrity_sees_a_leaked_and_a_doubly_free_page() -> None:
    pool = PagePool(2)
    page = pool.allocate(1)[0]
    pool._ref_counts[page] = 0
    with pytest.raises(AssertionError, match=f"page {page} has 0 owners"):
        pool.check_integrity()
    pool._free += [page, page]
    with pytest.raises(AssertionError, match="free twice"):
        pool.check_integrity()


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2)])
def test_pages_for(tokens: int, pages: int) -> None:
    assert pages_for(tokens, 4) == pages
