"""Which page of the KV cache belongs to whom, and what free pages still hold. Plain Python: the pages themselves live in the
executor."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

PageKey = bytes
"""Names the content of a full page: its tokens and all tokens before them, on which keys and values depend."""


class PagePool:
    """The pages 0 .. num_pages - 1, each free or held by one or more owners (reference count).

    A full page may be published under the key of its content. It stays findable when its last owner has let go, until the
    page is needed for something else: of the free pages those without content go first, then the least recently used.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._ref_counts = [0] * num_pages
        self._blank = list(range(num_pages - 1, -1, -1))  # a stack: the page freed last is used first
        self._cached: OrderedDict[int, None] = OrderedDict()  # free, with content, least recently used first
        self._page_of: dict[PageKey, int] = {}
        self._key_of: dict[int, PageKey] = {}

    @property
    def num_free(self) -> int:
        return len(self._blank) + len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_pages - self.num_free

    @property
    def num_cached(self) -> int:
        """Free pages whose content can still be found."""
        return len(self._cached)

    def ref_count(self, page: int) -> int:
        return self._ref_counts[page]

    def allocate(self, count: int) -> list[int]:
        """Takes `count` free pages, each with one owner. The caller has made sure that there are enough."""
        assert 0 <= count <= self.num_free, f"asked for {count} pages, {self.num_free} are free"
        pages = [self._blank.pop() if self._blank else self._evict() for _ in range(count)]
        for page in pages:
            self._ref_counts[page] = 1
        return pages

    def publish(self, page: int, key: PageKey) -> None:
        """Makes a full page in use findable. Where another page has the same content already, that one stays."""
        assert self._ref_counts[page] > 0, f"page {page} is free and cannot be published"
        assert self._key_of.get(page, key) == key, f"page {page} is published with other content"
        if key not in self._page_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def find(self, key: PageKey) -> int | None:
        """The page with this content, in use or free; None when there is none any more."""
        return self._page_of.get(key)

    def key_of(self, page: int) -> PageKey | None:
        return self._key_of.get(page)

    def retain(self, pages: Iterable[int]) -> None:
        """Adds an owner to pages that are in use or found."""
        for page in pages:
            assert self._ref_counts[page] > 0 or page in self._cached, (
                f"page {page} is free and cannot be shared"
            )
            self._cached.pop(page, None)
            self._ref_counts[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Takes one owner from each page; a page without owner is free."""
        for page in pages:
            assert self._ref_counts[page] > 0, f"page {page} is released more often than it was taken"
            self._ref_counts[page] -= 1
            if self._ref_counts[page] == 0:
                if page in self._key_of:
                    self._cached[page] = None
                else:
                    self._blank.append(page)

    def check_integrity(self) -> None:
        """Raises AssertionError unless every page is either free once or counted, and found by its own key alone."""
        free = {*self._blank, *self._cached}
        assert len(free) == self.num_free, "a page is free twice"
        for page, count in enumerate(self._ref_counts):
            assert (count == 0) == (page in free), f"page {page} has {count} owners, free: {page in free}"
        assert {page: key for key, page in self._page_of.items()} == self._key_of, "keys and pages disagree"
        for page in free:
            assert (page in self._cached) == (page in self._key_of), f"free page {page} is in the wrong place"

    def _evict(self) -> int:
        page, _ = self._cached.popitem(last=False)
        del self._page_of[self._key_of.pop(page)]
        return page


def pages_for(num_tokens: int, page_size: int) -> int:
    """Pages that `num_tokens` tokens of one sequence fill or begin."""
    return -(-num_tokens // page_size)


def extend_keys(keys: list[PageKey], token_ids: Sequence[int], page_size: int, count: int) -> None:
    """Makes `keys` name at least the first `count` pages of a sequence, all of them full.

    Each key is a cryptographic hash over the one before it and the tokens of its page, so that equal keys mean equal tokens
    from the first on; no request can be made to find the pages of another text.
    """
    first, missing = len(keys) * page_size, max(0, count - len(keys)) * page_size
    tokens = array("i", token_ids[first : first + missing])
    assert len(tokens) == missing, f"page {count - 1} of {len(token_ids)} tokens is not full"
    pages, size = tokens.tobytes(), page_size * tokens.itemsize
    for start in range(0, len(pages), size):
        keys.append(
            blake2b((keys[-1] if keys else b"") + pages[start : start + size], digest_size=32).digest()
        )
