"""Which pages of the KV cache a request need not compute, because somebody has, or is about to."""

from __future__ import annotations

from collections.abc import Iterable

from .kv_cache import PageKey, PagePool, extend_keys
from .request import Request


class PrefixCache:
    """Finds leading pages of requests by content, and makes full pages findable. Disabled, it finds nothing.

    num_looked_up, num_found: full prompt pages that new requests might have found, and those they have found
    """

    def __init__(self, pool: PagePool, page_size: int, *, enabled: bool) -> None:
        self._pool, self._page_size, self._enabled = pool, page_size, enabled
        self.num_looked_up = 0
        self.num_found = 0

    def find(self, request: Request) -> list[int]:
        """The pages behind which `request` may start, used or free."""
        pages: list[int] = []
        for index in range(self._num_cacheable(request)):
            page = self._pool.find(self.key(request, index))
            if page is None:
                break
            pages.append(page)
        return pages

    def should_wait(self, request: Request, num_found: int, coming: ComingPages) -> bool:
        """Whether running requests are computing at least half of what `request` lacks behind the pages it has found.

        Then waiting for that is better than computing it twice.
        """
        hoped = range(num_found, self._num_cacheable(request))
        shared = next(
            (n for n, i in enumerate(hoped) if not coming.holds(i, self.key(request, i))), len(hoped)
        )
        lacking = request.num_tokens - num_found * self._page_size
        return shared > 0 and 2 * shared * self._page_size >= lacking

    def to_come(self, request: Request) -> range:
        """Which full pages a running request has yet to compute."""
        return range(request.num_computed_tokens // self._page_size, self._num_full(request))

    def started(self, request: Request, num_found: int) -> None:
        """Counts what a request has found when it first got its pages."""
        request.num_computed_tokens = num_found * self._page_size
        if request.num_cached_tokens is None:
            request.num_cached_tokens = request.num_computed_tokens
            self.num_looked_up += self._num_cacheable(request)
            self.num_found += num_found

    def computed(self, request: Request, end: int) -> None:
        """Notes that the tokens before `end` are in the cache, and makes the pages that they have filled findable."""
        first, request.num_computed_tokens = request.num_computed_tokens, end
        self.filled(request, first, end)

    def filled(self, request: Request, first_token: int, end: int) -> None:
        """Makes the pages findable that are full since the tokens from `first_token` up to `end` are in them."""
        first, full = first_token // self._page_size, end // self._page_size
        if self._enabled and first < full:
            self._make_keys(request, full)
            for index in range(first, full):
                self._pool.publish(request.page_ids[index], request.page_keys[index])

    def expect(self, request: Request, end: int) -> None:
        """Makes now, while a device computes them, the keys that `filled` will want for the tokens before `end`."""
        self._make_keys(request, min(end // self._page_size, self._num_full(request)))

    def check_content(self, request: Request) -> None:
        """Pages are shared, or findable, only where they are full, and with what this request has in them."""
        keys: list[PageKey] = []
        full = request.num_computed_tokens // self._page_size
        extend_keys(keys, request.token_ids, self._page_size, full)
        for index, page in enumerate(request.page_ids):
            name = f"page {page}, number {index} of request {request.request_id},"
            if index < full:
                assert self._pool.key_of(page) in (None, keys[index]), f"{name} is known by other content"
            else:
                assert self._pool.ref_count(page) == 1, f"{name} is shared and may still be written"
                assert self._pool.key_of(page) is None, f"{name} can be found and is not full"

    def _num_cacheable(self, request: Request) -> int:
        """How many leading pages `request` need not compute itself."""
        if not self._enabled:
            return 0
        tokens = request.num_tokens - 1
        scored = len(request.prompt_logprobs)
        if request.params.prompt_logprobs is not None and scored < request.num_prompt_tokens:
            tokens = scored - 1  # the logits that score the prompt are wanted, too
        return tokens // self._page_size

    def _num_full(self, request: Request) -> int:
        """How many pages the known tokens of `request` fill."""
        return (request.num_tokens - request.num_pending) // self._page_size if self._enabled else 0

    def key(self, request: Request, index: int) -> PageKey:
        """The content of a full page of `request`."""
        self._make_keys(request, index + 1)
        return request.page_keys[index]

    def _make_keys(self, request: Request, count: int) -> None:
        if len(request.page_keys) < count:
            extend_keys(request.page_keys, request.token_ids, self._page_size, count)


class ComingPages:
    """The full pages that running requests have yet to compute, by place and content.

    Keys are made for places that are asked for: prompts that differ mostly do so in their first page.
    """

    def __init__(self, cache: PrefixCache, running: Iterable[Request]) -> None:
        self._cache = cache
        self._parts = [(request, cache.to_come(request)) for request in running]
        self._keys: dict[int, set[PageKey]] = {}

    def add(self, request: Request) -> None:
        """Takes in a request that runs from now on."""
        pages = self._cache.to_come(request)
        self._parts.append((request, pages))
        for index, keys in self._keys.items():
            if index in pages:
                keys.add(self._cache.key(request, index))

    def holds(self, index: int, key: PageKey) -> bool:
        """Whether one of the requests has yet to compute, as its page `index`, that with this content."""
        if index not in self._keys:
            parts = [request for request, pages in self._parts if index in pages]
            self._keys[index] = {self._cache.key(request, index) for request in parts}
        return key in self._keys[index]
