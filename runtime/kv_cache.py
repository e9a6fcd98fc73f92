"""Which page of the KV cache belongs to whom. Plain Python: the pages themselves live in the executor."""

from __future__ import annotations

from collections.abc import Iterable


class PagePool:
    """The pages 0 .. num_pages - 1, each free or held by one or more owners (reference count)."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._ref_counts = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))  # a stack: the page freed last is used first

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_pages - len(self._free)

    def ref_count(self, page: int) -> int:
        return self._ref_counts[page]

    def allocate(self, count: int) -> list[int]:
        """Takes `count` free pages, each with one owner. The caller has made sure that there are enough."""
        assert 0 <= count <= self.num_free, f"asked for {count} pages, {self.num_free} are free"
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._ref_counts[page] = 1
        return pages

    def retain(self, pages: Iterable[int]) -> None:
        """Adds an owner to pages in use."""
        for page in pages:
            assert self._ref_counts[page] > 0, f"page {page} is free and cannot be shared"
            self._ref_counts[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Takes one owner from each page; a page without owner is free."""
        for page in pages:
            assert self._ref_counts[page] > 0, f"page {page} is released more often than it was taken"
            self._ref_counts[page] -= 1
            if self._ref_counts[page] == 0:
                self._free.append(page)

    def check_integrity(self) -> None:
        """Raises AssertionError unless every page is either free once or counted."""
        free = set(self._free)
        assert len(free) == len(self._free), "a page is free twice"
        for page, count in enumerate(self._ref_counts):
            assert (count == 0) == (page in free), f"page {page} has {count} owners, free: {page in free}"


def pages_for(num_tokens: int, page_size: int) -> int:
    """Pages that `num_tokens` tokens of one sequence fill or begin."""
    return -(-num_tokens // page_size)
