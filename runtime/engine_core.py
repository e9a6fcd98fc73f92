"""The loop of the runtime: schedule, execute, sample, update, detokenize."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ..core.errors import ConfigError, EngineError, RequestError
from .bad_words import bad_words
from .batch import Batch, ScheduledRequest
from .beam_search import BeamSearch, candidates
from .decode_ahead import DecodeAhead
from .detokenizer import Detokenizer
from .drafting import Drafting
from .executor import DecodeLoop, Executor, GreedyChooser, PageCopier, Preparer, StepStarter, token_list
from .groups import Completion, Group, request_output
from .outputs import Logprob, RequestOutput
from .prompt_lookup import LookupStats, PromptLookup
from .request import Request
from .request_check import check_params, check_token_ids
from .sampler import SampledToken, sample, top_logprobs
from .sampling_params import SamplingParams
from .scheduler import Scheduler
from .scheduler_config import SchedulerConfig
from .step_input import StepInput
from .step_queue import StepQueue
from .token_ids import packed
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch


Verdict = tuple[ScheduledRequest, list[int]]
"""A part with a draft, and the tokens that the model chooses behind each token of that."""


class EngineCore:
    """Serves requests on one executor. Not thread-safe: one thread calls all its methods.

    tokenizer: None: requests are token ids and outputs have no text
    lookup_stats: what prompt lookup has brought so far
    num_steps: of prompts, or planned one by one, so far
    seed:      of the stream from which requests without a seed draw theirs, in order of arrival
    enable_prefix_cache: use what earlier requests with the same beginning have left in the KV cache
    prompt_lookup: for requests that it can serve and that do not say what they want
    clock:     the seconds that deadlines are given in and steps are timed by
    """

    def __init__(
        self,
        executor: Executor,
        tokenizer: Tokenizer | None = None,
        *,
        seed: int = 0,
        enable_prefix_cache: bool = True,
        prompt_lookup: PromptLookup | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Raises ConfigError for an option of another kind."""
        if not isinstance(seed, int | np.integer) or isinstance(seed, bool) or seed < 0:
            raise ConfigError(f"seed is {seed!r}; accepted: an integer of at least 0")
        if not isinstance(prompt_lookup, PromptLookup | None):
            raise ConfigError(f"prompt_lookup is {prompt_lookup!r}; accepted: PromptLookup(N, K), or None")
        self._process = os.getpid()
        self.executor = executor
        self.tokenizer = tokenizer
        self.scheduler = Scheduler(
            SchedulerConfig(
                max_batch_size=executor.max_batch_size,
                max_num_tokens=executor.max_num_tokens,
                max_seq_len=executor.max_seq_len,
                max_input_len=executor.max_input_len,
                page_size=executor.page_size,
                num_pages=executor.num_pages,
                enable_prefix_cache=enable_prefix_cache,
            ),
            Drafting(executor.max_draft_tokens if isinstance(executor, GreedyChooser) else None),
        )
        self._chooser = executor if isinstance(executor, GreedyChooser) else None
        self._queue = StepQueue(executor, self.scheduler) if isinstance(executor, StepStarter) else None
        self._ahead = None
        if isinstance(executor, DecodeLoop):
            self._ahead = DecodeAhead(executor, self.scheduler, clock, step_by_step=self._queue is not None)
        self._eos_token_ids = frozenset(executor.eos_token_ids)
        self._seeds = np.random.Generator(np.random.Philox(int(seed)))
        self._clock = clock
        self._groups: dict[str, Group] = {}
        self._deadlines: dict[str, float] = {}
        self._sequences: dict[Request, Completion] = {}
        self.lookup_stats = LookupStats()
        self.num_steps = 0
        self._prompt_lookup = prompt_lookup

    @property
    def has_unfinished(self) -> bool:
        return bool(self._groups)

    def check_request(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        """Raises RequestError, naming value and limit, when this engine cannot serve the request; EngineError in a process
        that was forked after the engine was loaded: its threads, and a GPU, stayed behind."""
        if os.getpid() != self._process:
            raise EngineError(
                "this engine was loaded before the process forked; load it in the process that generates"
            )
        self.scheduler.check_lengths(len(prompt_token_ids), params.max_tokens, params.beam_width)
        if params.beam_width > 1 and not isinstance(self.executor, PageCopier):
            raise RequestError(
                f"beam_width is {params.beam_width}; accepted: 1, this target has no beam search",
                "beam_width",
            )
        widest = min(self.executor.max_beam_width, self.executor.max_num_tokens)
        if params.beam_width > widest:
            raise RequestError(
                f"beam_width is {params.beam_width}; accepted: 1 to {widest}, or build with a larger --max-beam-width",
                "beam_width",
            )
        check_token_ids(prompt_token_ids, self.executor.vocab_size)
        check_params(params, self.executor.vocab_size, self.tokenizer, self._eos_token_ids)

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        prompt: str | None = None,
        stream: bool = True,
        priority: int = 0,
        deadline: float | None = None,
    ) -> Group:
        """Puts a request in line, and returns what is known of it.

        prompt:   the text the ids come from, given back in the outputs
        stream:   report every new token, unless only the best completions are wanted; otherwise only the finished request
        priority: lower goes first; see `PRIORITY_STEP`
        deadline: on the engine core's clock; then it ends with what it has, for the reason "timeout"
        Raises RequestError as `check_request` does, or when an unfinished request has the same id.
        """
        self.check_request(prompt_token_ids, params)
        if request_id in self._groups:
            raise RequestError(f"request id {request_id!r} is in use by an unfinished request")
        if self._prompt_lookup is not None and params.prompt_lookup is None and params.plain_greedy:
            params = replace(params, prompt_lookup=self._prompt_lookup)
        seed = params.seed
        if seed is None:
            seed = int(self._seeds.integers(0, 2**64, dtype=np.uint64))
        stream = stream and params.num_sequences == params.n and params.beam_width == 1
        watched = stream or params.beam_width > 1
        token_ids = packed(prompt_token_ids)
        sequences = [
            self._sequence(request_id, token_ids, params, seed, index, priority, watched)
            for index in range(1 if params.beam_width > 1 else params.num_sequences)
        ]
        first = sequences[0].request
        search = None
        if params.beam_width > 1:
            search = BeamSearch(first, first.num_tokens + self.scheduler.tokens_left(first))
        group = Group(request_id, prompt, params, stream, first, sequences, search)
        self._groups[request_id] = group
        for sequence in sequences:
            self._sequences[sequence.request] = sequence
            self.scheduler.add(sequence.request)
        if deadline is not None:
            self._deadlines[request_id] = deadline
        return group

    def cancel(self, request_id: str) -> bool:
        """Ends a request and frees its pages; no output follows. False when it is not in the engine."""
        group = self._groups.get(request_id)
        if group is None:
            return False
        for sequence in group.sequences:
            self.scheduler.cancel(sequence.request)
        self._forget(group)
        return True

    def begin(self) -> None:
        """Starts a step of the requests in line, if none is under way and the device can compute it while the host adds others.

        What it brings is for `step` to return.
        """
        queue = self._queue
        if queue is None or not queue.is_empty or not (self._ahead is None or self._ahead.is_idle):
            return
        self._queue_next(queue)

    def step(self) -> list[RequestOutput]:
        """As `advance`, but returns outputs: of requests with a new token (`stream`) and of finished ones."""
        changed = self.advance()
        return [request_output(group, self.tokenizer) for group in changed if group.reports]

    def advance(self) -> list[Group]:
        """Runs one engine step. Returns what changed: requests with a new token or finished ones, each once; nothing yet, where
        the device has just begun.

        Where a deadline has passed, no step runs and those requests are what changed.
        When it raises, no token was taken: the step can be repeated, or its requests cancelled.
        """
        late = self._end_late()
        if late:
            return self._settled(self._groups_of(late))
        if self._queue is not None and not self._queue.is_empty:
            return self._step_queued(self._queue)
        if self._ahead is not None and self._ahead.ready():
            return self._step_ahead(self._ahead)
        began = self._clock()
        batch = self.scheduler.schedule()
        if not batch.scheduled:
            assert not self.has_unfinished, "requests are left and none can run"
            return []
        self.num_steps += 1
        if self._queue is not None and self._queue.takes(batch):
            self._queue.start(batch)
            return []
        sampled, verdicts = self._run(batch)
        self.scheduler.update(batch, [None if token is None else token.token_id for token in sampled])
        self._detokenize(batch, sampled)
        for part, token_ids in verdicts:
            self._take_draft(part, token_ids)
        touched = self._touched(batch.sampling)
        for group in touched:
            if group.search is not None and group.search.ready:
                self._advance(group, group.search)
        self._settled(touched)
        if all(part.num_tokens == 1 for part in batch.scheduled):
            drafted = batch.num_tokens - len(batch.scheduled)
            self.scheduler.drafting.costs.measured(len(batch.scheduled), drafted, self._clock() - began)
        return touched

    def _run(self, batch: Batch) -> tuple[list[SampledToken | None], list[Verdict]]:
        """Runs a step. Returns the next tokens, None for a beam: its search has got the candidates; and what the drafts are
        worth."""
        step = StepInput.from_batch(batch)
        if self._chooser is None or not all(part.wants_token_alone for part in batch.scheduled):
            logits = self.executor.execute(step)
            return self._sample(batch, logits), self._judge_drafts(batch, logits)
        chosen = token_list(self._chooser.choose(step))
        sampled: list[SampledToken | None] = []
        verdicts: list[Verdict] = []
        end = 0
        for part in batch.scheduled:
            start, end = end, end + part.num_rows
            if part.samples:
                sampled.append(SampledToken(chosen[start]))
            if part.draft:
                verdicts.append((part, chosen[start + 1 : end]))
        return sampled, verdicts

    def _advance(self, group: Group, search: BeamSearch) -> None:
        """Puts the next beams of a search in the place of those before them."""
        copies = search.advance(self.scheduler)
        if search.done:  # the last beams stay until the group is forgotten
            return
        for sequence in group.sequences:
            del self._sequences[sequence.request]
        group.sequences[:] = [Completion(group.request_id, beam, None, True) for beam in search.beams]
        self._sequences |= {sequence.request: sequence for sequence in group.sequences}
        if copies:
            assert isinstance(self.executor, PageCopier), "`check_request` lets no beams in"
            try:
                self.executor.copy_pages(*zip(*copies, strict=True))
            except BaseException:  # what was not copied is computed
                for beam in search.beams:
                    self.scheduler.give_way(beam)
                raise

    def _judge_drafts(self, batch: Batch, logits: torch.Tensor) -> list[Verdict]:
        rows: list[int] = []
        drafted: list[ScheduledRequest] = []
        end = 0
        for part in batch.scheduled:
            end += part.num_rows
            if part.draft:
                rows += range(end - len(part.draft), end)
                drafted.append(part)
        if not drafted:
            return []
        chosen = iter(sample(logits[rows], [part.request for part in drafted for _ in part.draft]))
        return [(part, [next(chosen).token_id for _ in part.draft]) for part in drafted]

    def _take_draft(self, part: ScheduledRequest, token_ids: list[int]) -> None:
        """Goes on with a request as far as its draft has come true: decode steps that are computed already."""
        request = part.request
        self.lookup_stats.steps += 1
        self.lookup_stats.proposed += len(part.draft)
        for guessed, token_id in zip(part.draft, token_ids, strict=True):
            if request.finished or request.token_ids[-1] != guessed:
                return
            self.lookup_stats.accepted += 1
            step = self.scheduler.decode_batch([request])
            self.scheduler.update(step, [token_id])
            self._detokenize(step, [SampledToken(token_id)])

    def _step_ahead(self, ahead: DecodeAhead) -> list[Group]:
        """Takes the tokens of steps that the device has finished while later ones run."""
        changed: dict[str, Group] = {}
        for requests, token_ids in ahead.steps():
            self.scheduler.advance(requests, token_ids)
            if self.tokenizer is not None:
                for request, token_id in zip(requests, token_ids, strict=True):
                    self._extend_text(request, token_id)
            for group in self._settled(self._touched(requests)):
                changed[group.request_id] = group
        return list(changed.values())

    def _step_queued(self, queue: StepQueue) -> list[Group]:
        """Takes the tokens of the step that is under way, once what comes next is too, if that can be planned already."""
        ahead = self._ahead if self._ahead is not None and self._ahead.suits() else None
        if ahead is not None:
            ahead.start_behind(queue)
        elif self.scheduler.can_plan_ahead():
            self._queue_next(queue)
        try:
            entered = queue.finish()
        except BaseException:
            if ahead is not None:
                ahead.drop()
            raise
        if ahead is not None:
            ahead.followed()
        if self.tokenizer is not None:
            for request, token_id in entered:
                self._extend_text(request, token_id)
        return self._settled(self._touched(request for request, _ in entered))

    def _queue_next(self, queue: StepQueue) -> None:
        """Plans a step, and starts it if `queue` takes it; else the next call plans it again."""
        batch = self.scheduler.schedule()
        if queue.takes(batch):
            queue.start(batch)
            self.num_steps += 1

    def _end_late(self) -> list[Request]:
        """Ends the completions whose deadline has passed; their text is what could be made of their tokens."""
        if not self._deadlines:
            return []
        now = self._clock()
        ended = []
        for request_id in [name for name, deadline in self._deadlines.items() if deadline <= now]:
            del self._deadlines[request_id]
            group = self._groups[request_id]
            if group.search is not None:
                group.search.end(self.scheduler, "timeout")
                ended.append(group.sequences[0].request)
                continue
            for sequence in group.sequences:
                if not sequence.request.finished:
                    self.scheduler.finish(sequence.request, "timeout")
                    if sequence.detokenizer is not None:
                        sequence.detokenizer.finish()
                    ended.append(sequence.request)
            if group.params.prompt_logprobs is not None:
                unscored = group.first.num_prompt_tokens - len(group.first.prompt_logprobs)
                group.first.prompt_logprobs += [None] * unscored
        return ended

    def prepare(self) -> bool:
        """For an idle moment: does a piece of what a later step would wait for; False: nothing was left. See `Preparer`."""
        return isinstance(self.executor, Preparer) and self.executor.prepare()

    def check_integrity(self) -> None:
        """Raises AssertionError when requests, pages or groups have come out of step."""
        self.scheduler.check_integrity()
        held = {*self.scheduler.running, *self.scheduler.waiting}
        known = {request for request in self._sequences if not request.finished}
        assert held == known, "the scheduler and the engine core hold different requests"
        assert self._deadlines.keys() <= self._groups.keys(), "a deadline of a request that is gone"

    def _sequence(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        seed: int,
        index: int,
        priority: int,
        watched: bool,
    ) -> Completion:
        several = params.num_sequences > 1 and params.beam_width == 1
        name = f"{request_id}/{index}" if several else request_id
        words = bad_words(params, self.tokenizer)
        if index > 0:  # the prompt is scored once
            params = replace(params, prompt_logprobs=None)
        if several and params.num_sequences > params.n:  # which are the best, their log probabilities tell
            params = replace(params, logprobs=params.logprobs or 0)
        request = Request(name, prompt_token_ids, params, self._eos_token_ids, seed, index, words, priority)
        detokenizer = Detokenizer(self.tokenizer, prompt_token_ids, params) if self.tokenizer else None
        return Completion(request_id, request, detokenizer, watched)

    def _sample(self, batch: Batch, logits: torch.Tensor) -> list[SampledToken | None]:
        """Chooses the next tokens, and scores the prompt tokens whose logprobs were asked for.

        None stands for a beam: its search gets the candidates.
        """
        expected = (sum(part.num_rows for part in batch.scheduled), self.executor.vocab_size)
        assert tuple(logits.shape) == expected, (
            f"the executor returned logits {tuple(logits.shape)}, not {expected}"
        )
        sampling_rows = []
        end = 0
        for part in batch.scheduled:
            start, end = end, end + part.num_rows
            if part.samples:
                sampling_rows.append(end - len(part.draft) - 1)
            if part.num_prompt_rows:
                self._score_prompt(part.request, logits[start : start + part.num_prompt_rows])
        if len(sampling_rows) < end:
            logits = logits[sampling_rows]
        requests = batch.sampling
        if not any(request.is_beam for request in requests):
            return list(sample(logits, requests))
        beams = [row for row, request in enumerate(requests) if request.is_beam]
        self._offer(logits[beams], [requests[row] for row in beams])
        others = [row for row, request in enumerate(requests) if not request.is_beam]
        tokens = iter(sample(logits[others], [requests[row] for row in others]))
        return [None if request.is_beam else next(tokens) for request in requests]

    def _offer(self, logits: torch.Tensor, beams: list[Request]) -> None:
        searches = [self._groups[self._sequences[beam].group_id].search for beam in beams]
        pairs = [(beam, search) for beam, search in zip(beams, searches, strict=True) if search is not None]
        for (beam, search), offered in zip(pairs, candidates(logits, pairs), strict=True):
            search.offer(beam, offered)

    def _score_prompt(self, request: Request, logits: torch.Tensor) -> None:
        """Row i of logits scores the i-th prompt token that has no logprobs yet."""
        first = len(request.prompt_logprobs)
        token_ids = list(request.prompt_token_ids[first : first + len(logits)])
        count = request.params.prompt_logprobs or 0
        request.prompt_logprobs += map(self._named, top_logprobs(logits, token_ids, [count] * len(token_ids)))

    def _detokenize(self, batch: Batch, sampled: Sequence[SampledToken | None]) -> None:
        for request, token in zip(batch.sampling, sampled, strict=True):
            if token is None:
                continue
            if token.logprobs is not None:
                request.logprobs.append(self._named(token.logprobs))
            if self.tokenizer is not None:
                self._extend_text(request, token.token_id)

    def _extend_text(self, request: Request, token_id: int) -> None:
        """Ends a request whose text gets to one of its stop strings."""
        detokenizer = self._sequences[request].detokenizer
        assert detokenizer is not None, "a completion without text in an engine with a tokenizer"
        # The token that ends a request is no part of its text.
        if request.finish_reason != "stop" or request.params.include_stop_str_in_output:
            stop = detokenizer.append(token_id)
            if stop is not None:
                self.scheduler.finish(request, "stop", stop)
        if request.finished:
            detokenizer.finish()

    def _touched(self, requests: Iterable[Request]) -> list[Group]:
        """The groups for which something is to be done now that `requests` have a new token."""
        sequences = self._sequences
        return self._groups_of(
            request for request in requests if sequences[request].watched or request.finished
        )

    def _groups_of(self, requests: Iterable[Request]) -> list[Group]:
        """Each group once, in order."""
        touched = dict.fromkeys(self._sequences[request].group_id for request in requests)
        return [self._groups[group_id] for group_id in touched]

    def _settled(self, groups: list[Group]) -> list[Group]:
        """The same groups; those that have ended are forgotten."""
        for group in groups:
            if group.finished:
                self._forget(group)
        return groups

    def _forget(self, group: Group) -> None:
        del self._groups[group.request_id]
        self._deadlines.pop(group.request_id, None)
        for sequence in group.sequences:
            del self._sequences[sequence.request]

    def _named(self, logprobs: dict[int, Logprob]) -> dict[int, Logprob]:
        """Adds the text of each token."""
        if self.tokenizer is None:
            return logprobs
        return {
            token_id: replace(
                entry, decoded_token=self.tokenizer.decode([token_id], skip_special_tokens=False)
            )
            for token_id, entry in logprobs.items()
        }
