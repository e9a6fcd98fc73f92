"""Which tokens of which requests run in the next engine step: in-flight batching with chunked prefill.

Plain Python, no tensor library. Requests stand in line by priority and arrival (`Request.place`). Every step gives each
running sequence that decodes one token, then continues the prefill under way, then admits waiting requests in the order of the
line as long as tokens, sequences and pages last. When a decode finds no free page, the running request that is last in line
gives its pages back and waits; its tokens are kept and computed again later (preemption by recompute), so the first in line
always goes forward and every request ends.

Prefix cache: a request starts behind those of its leading pages that are still in the cache, whoever computed them. Its last
token is always computed: its logits are wanted.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from operator import attrgetter

from ..core.errors import ConfigError, RequestError
from .batch import Batch, ScheduledRequest, count_tokens, next_part
from .kv_cache import PageKey, PagePool, extend_keys, pages_for
from .outputs import FinishReason
from .request import Request, RequestStatus


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Limits of one engine. Raises ConfigError when one is not a positive integer.

    max_batch_size: sequences in one step       max_num_tokens: tokens in one step
    max_seq_len:    prompt and output tokens    max_input_len:  prompt tokens
    page_size:      tokens per page             num_pages:      pages in the cache
    enable_prefix_cache: use pages that an earlier request with the same beginning has computed
    """

    max_batch_size: int
    max_num_tokens: int
    max_seq_len: int
    max_input_len: int
    page_size: int
    num_pages: int
    enable_prefix_cache: bool = True

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "bool":
                if not isinstance(value, bool):
                    raise ConfigError(f"{field.name} is {value!r}; accepted: True or False")
            elif not isinstance(value, int) or value < 1:
                raise ConfigError(f"{field.name} is {value!r}; accepted: an integer of at least 1")


_place = attrgetter("place")


class Scheduler:
    """Holds every unfinished request and all cache pages. waiting, running: each in the order of the line.

    num_looked_up, num_found: full prompt pages that new requests might have found in the cache, and those they have found
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.pool = PagePool(config.num_pages)
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.num_looked_up = 0
        self.num_found = 0
        self._num_arrived = 0

    @property
    def has_unfinished(self) -> bool:
        return bool(self.running or self.waiting)

    def check_lengths(self, num_prompt_tokens: int, max_tokens: int | None) -> None:
        """Raises RequestError, naming the limit, when this engine could never finish such a request."""
        config = self.config
        if num_prompt_tokens == 0:
            raise RequestError("the prompt is empty; accepted: at least 1 token")
        if num_prompt_tokens > config.max_input_len:
            raise RequestError(
                f"the prompt has {num_prompt_tokens} tokens, the engine takes max_input_len = "
                f"{config.max_input_len}; shorten it or build with a larger --max-input-len"
            )
        if num_prompt_tokens >= config.max_seq_len:
            raise RequestError(
                f"the prompt has {num_prompt_tokens} tokens and leaves no room for output within "
                f"max_seq_len = {config.max_seq_len}; shorten it or build with a larger --max-seq-len"
            )
        # the last token is chosen but never fed back
        needed = pages_for(self._max_total_tokens(num_prompt_tokens, max_tokens) - 1, config.page_size)
        if needed > config.num_pages:
            raise RequestError(
                f"a prompt of {num_prompt_tokens} tokens with max_tokens = {max_tokens} may need {needed} "
                f"cache pages of {config.page_size} tokens, the engine has num_pages = {config.num_pages}; "
                "lower max_tokens or give the cache more memory"
            )

    def add(self, request: Request) -> None:
        """Puts a new request in line. Raises RequestError as `check_lengths` does."""
        self.check_lengths(request.num_prompt_tokens, request.params.max_tokens)
        assert request.status is RequestStatus.WAITING, f"request {request.request_id} was added before"
        request.arrival = self._num_arrived
        self._num_arrived += 1
        insort(self.waiting, request, key=_place)

    def cancel(self, request: Request) -> None:
        """Ends a request wherever it is; its pages are free at once. A finished request is left as it is."""
        if not request.finished:
            self.finish(request, "abort")

    def finish(self, request: Request, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """Ends a request for a reason the caller has found, such as a stop string.

        A request that ended by its length in the same step takes the new reason.
        """
        if request.status is RequestStatus.RUNNING:
            self.running.remove(request)
        elif request.status is RequestStatus.WAITING:
            self.waiting.remove(request)
        self._release_pages(request)
        request.status = RequestStatus.FINISHED
        request.finish_reason = reason
        request.stop_reason = stop_reason

    def schedule(self) -> Batch:
        """Plans the next step and gives its tokens their pages. Returns an empty batch when nothing can run.

        Calling it again before `update` plans the same tokens again: a step that failed can be repeated.
        """
        scheduled = self._schedule_decodes()
        scheduled += self._schedule_prefills(self.config.max_num_tokens - count_tokens(scheduled))
        scheduled += self._admit(self.config.max_num_tokens - count_tokens(scheduled))
        return Batch(tuple(scheduled))

    def only_decodes(self) -> bool:
        """Whether `schedule` would give every running sequence one token and admit nobody."""
        return (
            bool(self.running)
            and all(map(self._is_decoding, self.running))
            and self._pages_to_start(set()) is None
        )

    def reserve(self, count: int) -> bool:
        """Gives every running sequence pages for `count` tokens beyond those it has, without preempting anyone.

        False, changing nothing, when there are not enough pages or a sequence would pass max_seq_len.
        """
        if any(request.num_tokens + count > self.config.max_seq_len for request in self.running):
            return False
        wanted = [
            (request, pages_for(request.num_tokens + count, self.config.page_size) - len(request.page_ids))
            for request in self.running
        ]
        if sum(max(0, pages) for _, pages in wanted) > self.pool.num_free:
            return False
        for request, pages in wanted:
            if pages > 0:
                request.page_ids += self.pool.allocate(pages)
        return True

    def tokens_left(self, request: Request) -> int:
        """Tokens until `request` ends by its length."""
        return (
            self._max_total_tokens(request.num_prompt_tokens, request.params.max_tokens) - request.num_tokens
        )

    def decode_batch(self, requests: Iterable[Request]) -> Batch:
        """The step that computes the last token of each of `requests`, all of them decoding."""
        return Batch(tuple(next_part(request, 1) for request in requests))

    def update(self, batch: Batch, token_ids: Sequence[int]) -> None:
        """Enters what a step has computed. Requests cancelled since `schedule` are passed over.

        token_ids: the tokens chosen for `batch.sampling`, in that order
        """
        assert len(token_ids) == len(batch.sampling), (
            f"{len(token_ids)} tokens for {len(batch.sampling)} requests"
        )
        tokens = iter(token_ids)
        for part in batch.scheduled:
            token_id = next(tokens) if part.samples else None
            if part.request.status is not RequestStatus.RUNNING:
                continue
            self._computed(part)
            if token_id is not None:
                part.request.append_output(token_id)
                self._finish_if_done(part.request)

    def check_integrity(self) -> None:
        """Raises AssertionError when an invariant of requests or pages is broken."""
        self.pool.check_integrity()
        owners = Counter(page for request in self.running for page in request.page_ids)
        for page in range(self.pool.num_pages):
            count = self.pool.ref_count(page)
            assert count == owners[page], (
                f"page {page} counts {count} owners, {owners[page]} requests hold it"
            )
        for request in self.running:
            name, held = request.request_id, len(request.page_ids)
            assert request.status is RequestStatus.RUNNING, f"running request {name} is {request.status}"
            assert len(set(request.page_ids)) == held, f"request {name} holds a page twice"
            assert request.num_computed_tokens <= held * self.config.page_size, f"request {name} lacks pages"
            assert request.num_computed_tokens < request.num_tokens, (
                f"request {name} has nothing left to compute"
            )
            self._check_content(request)
        for request in self.waiting:
            assert request.status is RequestStatus.WAITING, (
                f"waiting request {request.request_id} is {request.status}"
            )
            assert not request.page_ids and not request.num_computed_tokens, (
                f"{request.request_id} waits with pages"
            )
        for part in (self.running, self.waiting):
            line = [request.place for request in part]
            assert line == sorted(set(line)), f"requests are out of order: {line}"
        limit = min(self.config.max_batch_size, self.config.max_num_tokens)
        assert len(self.running) <= limit, f"{len(self.running)} requests run, a step takes {limit}"

    def _schedule_decodes(self) -> list[ScheduledRequest]:
        """One token for every sequence that decodes.

        They always fit into a step: a request is admitted only when all running ones leave a token over.
        """
        decoding = [request for request in self.running if self._is_decoding(request)]
        return [next_part(request, 1) for request in decoding if self._grow(request)]

    def _schedule_prefills(self, budget: int) -> list[ScheduledRequest]:
        """Continues the prompt under way, whose pages were given at admission."""
        scheduled = []
        for request in self.running:
            if not self._is_decoding(request):
                count = min(budget, request.num_tokens - request.num_computed_tokens)
                if count:
                    scheduled.append(next_part(request, count))
                    budget -= count
        return scheduled

    def _admit(self, budget: int) -> list[ScheduledRequest]:
        scheduled = []
        page_size = self.config.page_size
        coming = {key for request in self.running for key in self._keys_to_come(request)}
        while budget and (cached := self._pages_to_start(coming)) is not None:
            request = self.waiting.pop(0)
            insort(self.running, request, key=_place)
            request.status = RequestStatus.RUNNING
            self.pool.retain(cached)
            missing = pages_for(request.num_tokens, page_size) - len(cached)
            request.page_ids = cached + self.pool.allocate(missing)
            request.num_computed_tokens = len(cached) * page_size
            self._count_hits(request, len(cached))
            coming.update(self._keys_to_come(request))
            count = min(budget, request.num_tokens - request.num_computed_tokens)
            scheduled.append(next_part(request, count))
            budget -= count
        return scheduled

    def _pages_to_start(self, coming: set[PageKey]) -> list[int] | None:
        """The pages in the cache with which the first waiting request could be admitted; None when it cannot be.

        coming: what running requests are computing
        """
        if not self.waiting or len(self.running) >= self.config.max_batch_size:
            return None
        request, page_size = self.waiting[0], self.config.page_size
        cached = self._find_cached(request)
        needed = pages_for(request.num_tokens, page_size) - len(cached)
        needed += sum(self.pool.ref_count(page) == 0 for page in cached)
        # One page is left for each running sequence, or the newcomer would be preempted at their next page.
        if self.pool.num_free - needed < self._num_growing():
            return None
        # When somebody is computing at least half of what it lacks, waiting for that is better than computing it twice.
        hoped = self._cacheable_keys(request)[len(cached) :]
        shared = next((n for n, key in enumerate(hoped) if key not in coming), len(hoped))
        if shared and 2 * shared * page_size >= request.num_tokens - len(cached) * page_size:
            return None
        return cached

    def _num_growing(self) -> int:
        """Running sequences that may need another page; where a page holds a whole sequence, none does."""
        whole = pages_for(self.config.max_seq_len, self.config.page_size)
        return sum(len(request.page_ids) < whole for request in self.running)

    def _find_cached(self, request: Request) -> list[int]:
        pages: list[int] = []
        for key in self._cacheable_keys(request):
            page = self.pool.find(key)
            if page is None:
                break
            pages.append(page)
        return pages

    def _cacheable_keys(self, request: Request) -> list[PageKey]:
        """The keys of those leading pages that `request` need not compute itself."""
        if not self.config.enable_prefix_cache:
            return []
        tokens = request.num_tokens - 1
        if (
            request.params.prompt_logprobs is not None
            and len(request.prompt_logprobs) < request.num_prompt_tokens
        ):
            tokens = len(request.prompt_logprobs) - 1  # the logits that score the prompt are wanted, too
        count = tokens // self.config.page_size
        extend_keys(request.page_keys, request.token_ids, self.config.page_size, count)
        return request.page_keys[:count]

    def _keys_to_come(self, request: Request) -> list[PageKey]:
        """The keys of the full pages that a running request has yet to compute, before it decodes."""
        if not self.config.enable_prefix_cache or self._is_decoding(request):
            return []
        count = request.num_tokens // self.config.page_size
        extend_keys(request.page_keys, request.token_ids, self.config.page_size, count)
        return request.page_keys[request.num_computed_tokens // self.config.page_size : count]

    def _count_hits(self, request: Request, found: int) -> None:
        if request.num_cached_tokens is None:
            request.num_cached_tokens = found * self.config.page_size
            self.num_looked_up += len(self._cacheable_keys(request))
            self.num_found += found

    def _computed(self, part: ScheduledRequest) -> None:
        """Notes that a part is in the cache, and makes the pages that it has filled findable."""
        request, page_size = part.request, self.config.page_size
        first, end = request.num_computed_tokens // page_size, part.end // page_size
        request.num_computed_tokens = part.end
        if self.config.enable_prefix_cache and first < end:
            extend_keys(request.page_keys, request.token_ids, page_size, end)
            for index in range(first, end):
                self.pool.publish(request.page_ids[index], request.page_keys[index])

    def _check_content(self, request: Request) -> None:
        """Pages are shared, or findable, only where they are full, and with what this request has in them."""
        keys: list[PageKey] = []
        full = request.num_computed_tokens // self.config.page_size
        extend_keys(keys, request.token_ids, self.config.page_size, full)
        for index, page in enumerate(request.page_ids):
            name = f"page {page}, number {index} of request {request.request_id},"
            if index < full:
                assert self.pool.key_of(page) in (None, keys[index]), f"{name} is known by other content"
            else:
                assert self.pool.ref_count(page) == 1, f"{name} is shared and may still be written"
                assert self.pool.key_of(page) is None, f"{name} can be found and is not full"

    def _is_decoding(self, request: Request) -> bool:
        return bool(request.output_token_ids) and request.num_tokens - request.num_computed_tokens == 1

    def _grow(self, request: Request) -> bool:
        """Makes sure the next token has a page. False when the request itself had to give way."""
        if request.status is not RequestStatus.RUNNING:
            return False
        if len(request.page_ids) >= pages_for(request.num_tokens, self.config.page_size):
            return True
        while not self.pool.num_free:
            last = self.running[-1]
            self._preempt(last)
            if last is request:
                return False
        request.page_ids += self.pool.allocate(1)
        return True

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._release_pages(request)
        request.status = RequestStatus.WAITING
        request.num_computed_tokens = 0
        insort(self.waiting, request, key=_place)

    def _release_pages(self, request: Request) -> None:
        # The last page goes first: without those before it nobody finds it.
        self.pool.release(reversed(request.page_ids))
        request.page_ids = []

    def _max_total_tokens(self, num_prompt_tokens: int, max_tokens: int | None) -> int:
        if max_tokens is None:
            return self.config.max_seq_len
        return min(num_prompt_tokens + max_tokens, self.config.max_seq_len)

    def _finish_if_done(self, request: Request) -> None:
        token_id, params = request.output_token_ids[-1], request.params
        if token_id in request.eos_token_ids and not params.ignore_eos:
            self.finish(request, "stop")
        elif token_id in (params.stop_token_ids or ()):
            self.finish(request, "stop", token_id)
        elif request.num_tokens >= self._max_total_tokens(request.num_prompt_tokens, params.max_tokens):
            self.finish(request, "length")
