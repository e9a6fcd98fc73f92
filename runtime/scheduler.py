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
from operator import attrgetter

from ..core.errors import RequestError
from .batch import Batch, ScheduledRequest, count_tokens, next_part
from .drafting import Drafting
from .kv_cache import PagePool, pages_for
from .outputs import FinishReason
from .prefix_cache import ComingPages, PrefixCache
from .request import Request, RequestStatus
from .scheduler_config import SchedulerConfig

_place = attrgetter("place")


class Scheduler:
    """Holds every unfinished request and all cache pages.

    waiting, running: each in the order of the line
    num_stopped:      how often a running request has stopped running
    """

    def __init__(self, config: SchedulerConfig, drafting: Drafting | None = None) -> None:
        self.config = config
        self.pool = PagePool(config.num_pages)
        self.prefix_cache = PrefixCache(self.pool, config.page_size, enabled=config.enable_prefix_cache)
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.drafting = drafting or Drafting()
        self.num_stopped = 0
        self._num_arrived = 0

    @property
    def has_unfinished(self) -> bool:
        return bool(self.running or self.waiting)

    def check_lengths(self, num_prompt_tokens: int, max_tokens: int | None, beam_width: int = 1) -> None:
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
        needed *= beam_width
        beams = f" and beam_width = {beam_width}" if beam_width > 1 else ""
        if needed > config.num_pages:
            raise RequestError(
                f"a prompt of {num_prompt_tokens} tokens with max_tokens = {max_tokens}{beams} may need {needed} "
                f"cache pages of {config.page_size} tokens, the engine has num_pages = {config.num_pages}; "
                "lower max_tokens or give the cache more memory"
            )

    def add(self, request: Request) -> None:
        """Puts a new request in line. Raises RequestError as `check_lengths` does."""
        params = request.params
        self.check_lengths(request.num_prompt_tokens, params.max_tokens, params.beam_width)
        assert request.status is RequestStatus.WAITING, f"request {request.request_id} was added before"
        request.arrival = self._num_arrived
        request.max_total_tokens = self._max_total_tokens(request.num_prompt_tokens, params.max_tokens)
        self._num_arrived += 1
        if params.prompt_lookup is not None:
            request.lookup = self.drafting.lookup(params.prompt_lookup)
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
            self._stop_running(request)
        elif request.status is RequestStatus.WAITING:
            self.waiting.remove(request)
        self._release_pages(request)
        request.drop_pending(request.num_pending)
        request.status = RequestStatus.FINISHED
        request.finish_reason = reason
        request.stop_reason = stop_reason

    def schedule(self) -> Batch:
        """Plans the next step and gives its tokens their pages. Returns an empty batch when nothing can run.

        Calling it again before `update` plans the same tokens again: a step that failed can be repeated.
        """
        scheduled = self._schedule()
        # Where all that run are beams whose siblings wait, the last in line give way until the first of these can run.
        while (
            not scheduled and self.running and self.waiting and not any(r.num_pending for r in self.running)
        ):
            self._preempt(self.running[-1])
            scheduled = self._schedule()
        return Batch(tuple(self._with_drafts(scheduled)))

    def fork(self, parent: Request, child: Request) -> list[tuple[int, int]]:
        """Lets a new beam go on from all that `parent`, which has computed all of its tokens, has got.

        Full pages are shared. Returns the page begun and its copy, which the caller has to fill before the next step. Where
        there is no place in a step or no page, the child waits, and computes again what it does not find in the cache.
        """
        full = parent.num_computed_tokens // self.config.page_size
        assert parent.num_computed_tokens == parent.num_tokens, (
            f"{parent.request_id} is no beam that can fork"
        )
        child.arrival = parent.arrival
        child.max_total_tokens = parent.max_total_tokens
        child.token_ids = parent.token_ids[:]
        child.output_token_ids = list(parent.output_token_ids)
        child.page_keys = parent.page_keys[:full]
        begun = parent.page_ids[full:]
        if len(self.running) >= self._most_running or len(begun) > self.pool.num_free:
            insort(self.waiting, child, key=_place)
            return []
        self.pool.retain(parent.page_ids[:full])
        child.page_ids = parent.page_ids[:full] + self.pool.allocate(len(begun))
        child.num_computed_tokens = parent.num_computed_tokens
        child.status = RequestStatus.RUNNING
        insort(self.running, child, key=_place)
        return list(zip(begun, child.page_ids[full:], strict=True))

    def give_way(self, request: Request) -> None:
        """Takes the pages of a running request, which computes again what was in them."""
        if request.status is RequestStatus.RUNNING:
            self._preempt(request)

    def only_decodes(self) -> bool:
        """Whether `schedule` would give every running sequence one token and admit nobody."""
        return (
            bool(self.running)
            and all(map(self._is_decoding, self.running))
            and self._pages_to_start(ComingPages(self.prefix_cache, ())) is None
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

    def update(self, batch: Batch, token_ids: Sequence[int | None]) -> None:
        """Enters what a step has computed. Requests cancelled since `schedule` are passed over.

        token_ids: the tokens chosen for `batch.sampling`, in that order; None for a beam, which waits for its siblings
        """
        assert len(token_ids) == len(batch.sampling), (
            f"{len(token_ids)} tokens for {len(batch.sampling)} requests"
        )
        tokens = iter(token_ids)
        for part in batch.scheduled:
            token_id = next(tokens) if part.samples else None
            if part.request.status is not RequestStatus.RUNNING:
                continue
            self.prefix_cache.computed(part.request, part.end)
            if token_id is not None:
                part.request.append_output(token_id)
                self._finish_if_done(part.request, part.end + 1)

    def advance(self, requests: Sequence[Request], token_ids: Sequence[int]) -> None:
        """Enters a step that computed the last token of each of `requests`, all of them running: as `update` does, for what
        happens most often at the least cost for each token."""
        page_size, computed = self.config.page_size, self.prefix_cache.computed
        for request, token_id in zip(requests, token_ids, strict=True):
            end = request.num_computed_tokens + 1
            if end % page_size:
                request.num_computed_tokens = end
            else:
                computed(request, end)
            request.append_output(token_id)
            if len(request.token_ids) >= request.max_total_tokens or token_id in request.ending_token_ids:
                self._finish_if_done(request, end + 1)

    def can_plan_ahead(self) -> bool:
        """Whether the step after one that is under way takes no page from anybody: what ends with the step under way may set
        the pages free that another would have to give."""
        page_size = self.config.page_size
        growing = sum(len(request.page_ids) * page_size < request.num_tokens for request in self.running)
        return growing <= self.pool.num_free

    def expect(self, batch: Batch) -> None:
        """Counts the tokens of a step that was started as computed, with `PENDING` for those that it chooses."""
        for part in batch.scheduled:
            part.request.num_computed_tokens = part.end
            self.prefix_cache.expect(part.request, part.end)
            if part.samples:
                part.request.append_pending()

    def settle(self, batch: Batch, token_ids: Sequence[int]) -> list[tuple[Request, int]]:
        """Enters the tokens of a step that was expected, before those of a later one. Returns who got which: requests that have
        ended since are passed over."""
        entered = []
        tokens = iter(token_ids)
        for part in batch.scheduled:
            request = part.request
            token_id = next(tokens) if part.samples else None
            if request.finished:
                continue
            self.prefix_cache.filled(request, part.first, part.end)
            if token_id is not None:
                request.token_ids[part.end] = token_id
                request.output_token_ids.append(token_id)
                request.num_pending -= 1
                self._finish_if_done(request, part.end + 1)
                entered.append((request, token_id))
        return entered

    def forget(self, batch: Batch) -> None:
        """Takes back what was expected of a step, the last one first."""
        for part in batch.scheduled:
            if not part.request.finished:
                part.request.num_computed_tokens = part.first
                if part.samples:
                    part.request.drop_pending(1)

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
            left = request.num_tokens - request.num_computed_tokens
            assert left > 0 or request.is_beam, f"request {name} has nothing left to compute"
            self.prefix_cache.check_content(request)
        for request in self.waiting:
            assert request.status is RequestStatus.WAITING, (
                f"waiting request {request.request_id} is {request.status}"
            )
            assert not request.page_ids and not request.num_computed_tokens, (
                f"{request.request_id} waits with pages"
            )
            assert not request.num_pending, f"{request.request_id} waits while its token is chosen"
        for part in (self.running, self.waiting):
            line = [request.place for request in part]
            assert line == sorted(set(line)), f"requests are out of order: {line}"
        limit = self._most_running
        assert len(self.running) <= limit, f"{len(self.running)} requests run, a step takes {limit}"

    @property
    def _most_running(self) -> int:
        return min(self.config.max_batch_size, self.config.max_num_tokens)

    def _schedule(self) -> list[ScheduledRequest]:
        scheduled = self._schedule_decodes()
        scheduled += self._schedule_prefills(self.config.max_num_tokens - len(scheduled))
        scheduled += self._admit(self.config.max_num_tokens - count_tokens(scheduled))
        return scheduled

    def _schedule_decodes(self) -> list[ScheduledRequest]:
        """One token for every sequence that decodes.

        They always fit into a step: a request is admitted only when all running ones leave a token over.
        """
        decoding = [
            request
            for request in self.running
            if self._is_decoding(request) and request.num_tokens < request.max_total_tokens
        ]
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
        scheduled: list[ScheduledRequest] = []
        if not self.waiting:
            return scheduled
        coming = ComingPages(self.prefix_cache, self.running)
        while budget and (cached := self._pages_to_start(coming)) is not None:
            request = self.waiting.pop(0)
            insort(self.running, request, key=_place)
            request.status = RequestStatus.RUNNING
            self.pool.retain(cached)
            missing = pages_for(request.num_tokens, self.config.page_size) - len(cached)
            request.page_ids = cached + self.pool.allocate(missing)
            self.prefix_cache.started(request, len(cached))
            coming.add(request)
            count = min(budget, request.num_tokens - request.num_computed_tokens)
            scheduled.append(next_part(request, count))
            budget -= count
        return scheduled

    def _pages_to_start(self, coming: ComingPages) -> list[int] | None:
        """The pages in the cache with which the first waiting request could be admitted; None when it cannot be.

        coming: what running requests are computing
        """
        if not self.waiting or len(self.running) >= self._most_running:
            return None
        request = self.waiting[0]
        cached = self.prefix_cache.find(request)
        needed = pages_for(request.num_tokens, self.config.page_size) - len(cached)
        needed += sum(self.pool.ref_count(page) == 0 for page in cached)
        # One page is left for each running sequence, or the newcomer would be preempted at their next page.
        left = self.pool.num_free - needed
        if left < len(self.running) and left < self._num_growing():
            return None
        return None if self.prefix_cache.should_wait(request, len(cached), coming) else cached

    def _num_growing(self) -> int:
        """Running sequences that may need another page: none where a page holds a whole sequence, and no beams that have
        computed all they know, which grow only with their siblings: the newcomer may be one of these."""
        whole = pages_for(self.config.max_seq_len, self.config.page_size)
        return sum(
            request.num_computed_tokens < request.num_tokens and len(request.page_ids) < whole
            for request in self.running
        )

    def _with_drafts(self, scheduled: list[ScheduledRequest]) -> list[ScheduledRequest]:
        """Gives the guesses of prompt lookup what tokens and pages the step has left; nobody else gets less for them.

        Those with a draft go last: targets run one-token sequences at the front by kernels of their own.
        """
        looking = [
            (row, part.request, lookup)
            for row, part in enumerate(scheduled)
            if (lookup := part.request.lookup) is not None and part.samples and part.num_tokens == 1
        ]
        if not looking:
            return scheduled
        most = min(self.config.max_num_tokens, self.drafting.max_tokens or self.config.max_num_tokens)
        budget = most - count_tokens(scheduled)
        guesses = [
            lookup.propose(request.token_ids, min(budget, self.tokens_left(request) - 1, self._room(request)))
            for _, request, lookup in looking
        ]
        chances = [lookup.chances(len(guess)) for (_, _, lookup), guess in zip(looking, guesses, strict=True)]
        lengths = self.drafting.lengths(chances, len(scheduled))
        for (row, request, _), guess, length in zip(looking, guesses, lengths, strict=True):
            draft = guess[: max(0, min(length, budget, self._room(request)))]
            missing = pages_for(request.num_tokens + len(draft), self.config.page_size) - len(
                request.page_ids
            )
            request.page_ids += self.pool.allocate(max(0, missing))
            budget -= len(draft)
            scheduled[row] = scheduled[row]._replace(draft=draft)
        return sorted(scheduled, key=lambda part: len(part.draft) > 0)

    def _room(self, request: Request) -> int:
        """Tokens for which `request` has pages, or could get them with one left for each running sequence."""
        pages = len(request.page_ids) + max(0, self.pool.num_free - len(self.running))
        return pages * self.config.page_size - request.num_tokens

    def _is_decoding(self, request: Request) -> bool:
        begun = bool(request.output_token_ids or request.num_pending)
        return begun and request.num_tokens - request.num_computed_tokens == 1

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
        self._stop_running(request)
        self._release_pages(request)
        request.status = RequestStatus.WAITING
        request.num_computed_tokens = 0
        insort(self.waiting, request, key=_place)

    def _stop_running(self, request: Request) -> None:
        self.running.remove(request)
        self.num_stopped += 1

    def _release_pages(self, request: Request) -> None:
        # The last page goes first: without those before it nobody finds it.
        self.pool.release(reversed(request.page_ids))
        request.page_ids = []

    def _max_total_tokens(self, num_prompt_tokens: int, max_tokens: int | None) -> int:
        if max_tokens is None:
            return self.config.max_seq_len
        return min(num_prompt_tokens + max_tokens, self.config.max_seq_len)

    def _finish_if_done(self, request: Request, num_tokens: int) -> None:
        """num_tokens: those that are known; others of its last step may be pending behind them."""
        token_id, params = request.token_ids[num_tokens - 1], request.params
        if token_id in request.ending_token_ids:
            ended_by_model = token_id in request.eos_token_ids and not params.ignore_eos
            self.finish(request, "stop", None if ended_by_model else token_id)
        elif num_tokens >= request.max_total_tokens:
            self.finish(request, "length")
