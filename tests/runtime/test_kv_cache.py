"""Oracle: the bookkeeping of `PagePool` itself, `check_integrity`, on hand-made sequences of calls."""

from __future__ import annotations

import pytest
from trtc.runtime.kv_cache import PagePool, extend_keys, pages_for


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
    pool._blank += [page, page]
    with pytest.raises(AssertionError, match="free twice"):
        pool.check_integrity()


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2)])
def test_pages_for(tokens: int, pages: int) -> None:
    assert pages_for(tokens, 4) == pages


def test_a_published_page_is_found_until_its_place_is_needed() -> None:
    pool = PagePool(3)
    first, second = pool.allocate(2)
    pool.publish(first, b"first")
    pool.publish(second, b"second")
    pool.release([second])
    pool.release([first])  # used last
    assert pool.num_free == 3 and pool.num_cached == 2
    assert (pool.find(b"first"), pool.find(b"second")) == (first, second)
    blank, evicted = pool.allocate(2)
    assert blank not in (first, second) and evicted == second, "the page without content goes first"
    assert pool.find(b"second") is None and pool.find(b"first") == first
    pool.retain([first])
    assert pool.ref_count(first) == 1 and pool.num_free == 0
    pool.check_integrity()
    pool.release([first, blank, evicted])
    assert pool.num_cached == 1 and pool.find(b"first") == first
    pool.check_integrity()


def test_equal_content_in_two_pages_is_published_once() -> None:
    pool = PagePool(2)
    first, second = pool.allocate(2)
    pool.publish(first, b"same")
    pool.publish(second, b"same")
    pool.release([first, second])
    assert pool.find(b"same") == first and pool.num_cached == 1
    pool.check_integrity()


def test_check_integrity_sees_a_page_that_is_found_by_the_wrong_key() -> None:
    pool = PagePool(2)
    page, other = pool.allocate(2)
    pool.publish(page, b"key")
    with pytest.raises(AssertionError, match="other content"):
        pool.publish(page, b"another")
    pool._page_of[b"key"] = other
    with pytest.raises(AssertionError, match="keys and pages disagree"):
        pool.check_integrity()


def test_a_key_names_the_tokens_of_its_page_and_all_before_it() -> None:
    def keys(tokens: list[int], page_size: int = 2) -> list[bytes]:
        result: list[bytes] = []
        extend_keys(result, tokens, page_size, len(tokens) // page_size)
        return result

    base = keys([1, 2, 3, 4])
    assert keys([1, 2, 3, 4, 5]) == base
    assert keys([1, 2, 9, 4])[0] == base[0] and keys([1, 2, 9, 4])[1] != base[1]
    assert keys([9, 2, 3, 4])[1] != base[1], "the same page behind other tokens"
    assert keys([3, 4])[0] not in base
    assert keys([1, 2, 3, 4], page_size=4)[0] not in base
    longer = keys([1, 2])
    extend_keys(longer, [1, 2, 3, 4], 2, 2)
    assert longer == base, "one page at a time gives the same"
    with pytest.raises(AssertionError, match="page 1 of 3 tokens is not full"):
        extend_keys(longer[:1], [1, 2, 3], 2, 2)
