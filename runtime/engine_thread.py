"""One thread owns the engine core; everybody else talks to it through commands and streams.

The engine core is not thread-safe, and a step may take the device milliseconds: so one thread does nothing but take
commands and run steps, and event loops only ever wait for its outputs.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import Literal, Protocol, TypeAlias

from ..core.errors import one_line
from .desk import Desk
from .engine_core import EngineCore
from .output_stream import Cutter, OutputStream, Update
from .outputs import FinishReason, RequestOutput
from .request import Request
from .sampling_params import SamplingParams

_log = logging.getLogger(__name__)

Outcome: TypeAlias = FinishReason | Literal["error"]


@dataclass(frozen=True)
class EngineStats:
    """What the engine holds at one moment.

    num_running, num_waiting:            sequences
    num_used_pages, num_pages:           of the KV cache
    num_prompt_tokens, num_output_tokens: computed and chosen since the start, those of unfinished requests included
    num_cached_pages:                    of the pages that nobody uses those that the prefix cache still knows
    num_looked_up_pages, num_found_pages: full prompt pages of all requests so far that the prefix cache could have had, and
                                         those that it had
    num_guessed_tokens, num_accepted_tokens: by prompt lookup so far, and those of them that were right
    """

    num_running: int
    num_waiting: int
    num_used_pages: int
    num_pages: int
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_pages: int = 0
    num_looked_up_pages: int = 0
    num_found_pages: int = 0
    num_guessed_tokens: int = 0
    num_accepted_tokens: int = 0


@dataclass(frozen=True)
class RequestStats:
    """One request that has ended. Times are in seconds.

    outcome:           how its last completion ended; "abort": cancelled, "error": the engine failed or was shut down
    num_output_tokens: of all its completions
    ttft_s:            from submission to the first token; None when there was none
    tpot_s:            time per output token after the first, mean over its completions; None below two tokens
    e2e_s:             from submission to the end
    num_cached_tokens: prompt tokens that were not computed, because the prefix cache had them
    """

    request_id: str
    outcome: Outcome
    num_prompt_tokens: int
    num_output_tokens: int
    ttft_s: float | None
    tpot_s: float | None
    e2e_s: float
    num_cached_tokens: int = 0


OnFinished: TypeAlias = Callable[[RequestStats], None]


def report(on_finished: OnFinished | None, stats: RequestStats) -> None:
    """Tells of a request that has ended. What `on_finished` raises is logged: nobody may wait for ever because of it."""
    if on_finished is None:
        return
    try:
        on_finished(stats)
    except Exception:  # noqa: BLE001 - it is not ours
        _log.exception("on_finished failed for request %s", stats.request_id)


@dataclass(eq=False)
class Submission:
    """A request on its way through the engine thread, which alone fills the lower half.

    stream: of the reader; None where that is in another process
    priority, timeout_s: see `AsyncLLM.generate`
    """

    request_id: str
    prompt_token_ids: Sequence[int]
    params: SamplingParams
    prompt: str | None
    report_steps: bool
    stream: OutputStream | None
    priority: int = 0
    timeout_s: float | None = None
    submitted: float = field(default_factory=time.perf_counter)

    requests: list[Request] = field(default_factory=list)
    cutter: Cutter = field(init=False)
    first_token: float | None = None

    def __post_init__(self) -> None:
        self.cutter = Cutter(self.params.n)

    @property
    def has_token(self) -> bool:
        return any(request.output_token_ids for request in self.requests)

    def token_counts(self) -> tuple[int, int]:
        """Prompt tokens computed and output tokens chosen so far, over all its sequences."""
        prompt = sum(min(r.num_computed_tokens, r.num_prompt_tokens) for r in self.requests)
        return prompt, sum(len(request.output_token_ids) for request in self.requests)

    def stats(self, outcome: Outcome, update: Update | None = None) -> RequestStats:
        """update: the last one, where there is one; only it knows what became of beams."""
        now = time.perf_counter()
        counts = [len(request.output_token_ids) for request in self.requests]
        if isinstance(update, RequestOutput) and self.params.beam_width > 1:
            counts = [len(completion.token_ids) for completion in update.outputs]
        if self.first_token is None and any(counts):  # it ended in the step of its first token
            self.first_token = now
        tpot_s = None
        if self.first_token is not None and max(counts) > 1:
            tpot_s = (now - self.first_token) / (max(counts) - 1)
        return RequestStats(
            request_id=self.request_id,
            outcome=outcome,
            num_prompt_tokens=len(self.prompt_token_ids),
            num_cached_tokens=(self.requests[0].num_cached_tokens or 0) if self.requests else 0,
            num_output_tokens=sum(counts),
            ttft_s=None if self.first_token is None else self.first_token - self.submitted,
            tpot_s=tpot_s,
            e2e_s=now - self.submitted,
        )


class Outlet(Protocol):
    """The way from the engine's thread, which calls all methods, to the readers."""

    def deliver(self, updates: list[tuple[Submission, Update]]) -> list[Submission]:
        """Hands over what a step has brought, which may be nothing. Returns those that nobody can read any more."""

    def idle(self) -> None:
        """Nothing more comes before a command does."""

    def fail(self, submissions: list[Submission], reason: str) -> None:
        """Tells their readers that the engine has ended these."""


class Streams:
    """To event loops of this process: one call a step for each loop."""

    def deliver(self, updates: list[tuple[Submission, Update]]) -> list[Submission]:
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[OutputStream, Update]]] = {}
        for submission, update in updates:
            assert submission.stream is not None, "its reader is in another process"
            by_loop.setdefault(submission.stream.loop, []).append((submission.stream, update))
        closed = {loop for loop, changed in by_loop.items() if not _call(loop, partial(_put_all, changed))}
        if not closed:
            return []
        return [each for each, _ in updates if each.stream is not None and each.stream.loop in closed]

    def idle(self) -> None:
        """Nothing was kept back."""

    def fail(self, submissions: list[Submission], reason: str) -> None:
        for submission in submissions:
            assert submission.stream is not None, "its reader is in another process"
            _call(submission.stream.loop, partial(submission.stream.fail, reason))


class EngineThread:
    """Runs an engine core until `stop`, or until a step raises: then every request is told, and new ones are refused.

    After an error the state of a device is unknown, so the thread does not go on with it.
    on_finished: called in the engine thread for every request that ends, before its reader sees the end
    """

    def __init__(
        self,
        core: EngineCore,
        on_finished: OnFinished | None,
        outlet: Callable[[EngineThread], Outlet] | None = None,
    ) -> None:
        """outlet: makes what its outputs go through; None: `Streams`."""
        self._core = core
        self._on_finished = on_finished
        self._outlet: Outlet = Streams() if outlet is None else outlet(self)
        self._commands: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self.desk = Desk()
        self._counting = threading.Lock()
        self._awaiting_first_token: set[Submission] = set()
        self._ended_tokens = (0, 0)
        self._unprepared = True
        self._thread = threading.Thread(target=self._run, name="trtc-engine", daemon=True)
        self._thread.start()

    def submit(self, submission: Submission) -> None:
        """Hands a request to the engine. Raises as `Desk.register` does."""
        self.desk.register(submission)
        self._commands.put(partial(self._add, submission))

    def cancel(self, submission: Submission) -> None:
        """Ends a request and frees its pages after the step under way; nothing happens when it has ended."""
        if self.desk.holds(submission):
            self._commands.put(partial(self._cancel, submission))

    def check_request(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        """Raises RequestError, naming value and limit, when the engine cannot serve the request. For any thread."""
        self._core.check_request(prompt_token_ids, params)  # reads only what never changes

    def stats(self) -> EngineStats:
        """A snapshot that another thread may already have changed. For any thread."""
        scheduler, lookup = self._core.scheduler, self._core.lookup_stats
        num_prompt_tokens, num_output_tokens = self._token_counts()
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_used_pages=scheduler.pool.num_used,
            num_pages=scheduler.pool.num_pages,
            num_prompt_tokens=num_prompt_tokens,
            num_output_tokens=num_output_tokens,
            num_cached_pages=scheduler.pool.num_cached,
            num_looked_up_pages=scheduler.prefix_cache.num_looked_up,
            num_found_pages=scheduler.prefix_cache.num_found,
            num_guessed_tokens=lookup.proposed,
            num_accepted_tokens=lookup.accepted,
        )

    def _token_counts(self) -> tuple[int, int]:
        """Prompt tokens computed and output tokens chosen since the start."""
        with self._counting:
            counts = [self._ended_tokens, *(each.token_counts() for each in self.desk.unfinished())]
        prompt, output = zip(*counts, strict=True)
        return sum(prompt), sum(output)

    def stop(self) -> None:
        """Ends the thread after the step under way; requests that are left get an EngineError."""
        self._commands.put(None)
        self._thread.join()

    def _run(self) -> None:
        reason = "the engine was shut down"
        try:
            while self._take_commands():
                self._step()
        except Exception as error:  # noqa: BLE001 - whatever it is, nobody may wait for ever
            _log.exception("the engine thread ends")
            reason = one_line(f"the engine failed: {type(error).__name__}: {error}")
        self._fail_all(reason)

    def _take_commands(self) -> bool:
        """Runs what is in line, and prepares for later steps or waits when there is nothing else to do. False: stop."""
        while not self._core.has_unfinished or not self._commands.empty():
            if self._commands.empty():
                self._outlet.idle()
            while self._unprepared and self._commands.empty():
                self._unprepared = self._core.prepare()
            command = self._commands.get()
            if command is None:
                return False
            command()
        return True

    def _add(self, submission: Submission) -> None:
        group = self._core.add_request(
            submission.request_id,
            submission.prompt_token_ids,
            submission.params,
            prompt=submission.prompt,
            stream=submission.report_steps,
            priority=submission.priority,
            deadline=None if submission.timeout_s is None else submission.submitted + submission.timeout_s,
        )
        submission.requests = [sequence.request for sequence in group.sequences]
        self._awaiting_first_token.add(submission)

    def _cancel(self, submission: Submission) -> None:
        if self.desk.holds(submission):
            self._core.cancel(submission.request_id)
            self._end(submission, "abort")

    def _step(self) -> None:
        changed = self._core.advance()
        now = time.perf_counter()
        for submission in [s for s in self._awaiting_first_token if s.has_token]:
            submission.first_token = now
            self._awaiting_first_token.remove(submission)
        updates = []
        for group in changed:
            if not group.reports:
                continue
            submission = self.desk.known(group.request_id)
            update = submission.cutter.update(group, self._core.tokenizer)
            updates.append((submission, update))
            if update.finished:
                last = update.outputs if isinstance(update, RequestOutput) else update.pieces
                reason = last[-1].finish_reason
                assert reason is not None
                self._end(submission, reason, update)
        for submission in self._outlet.deliver(updates):
            self._cancel(submission)

    def _end(self, submission: Submission, outcome: Outcome, update: Update | None = None) -> None:
        self._awaiting_first_token.discard(submission)
        report(self._on_finished, submission.stats(outcome, update))
        prompt, chosen = submission.token_counts()
        with self._counting:
            self._ended_tokens = (self._ended_tokens[0] + prompt, self._ended_tokens[1] + chosen)
            self.desk.remove([submission])

    def _fail_all(self, reason: str) -> None:
        left = self.desk.fail(reason)
        for submission in left:
            self._core.cancel(submission.request_id)
            self._end(submission, "error")
        self._outlet.fail(left, reason)


def _put_all(updates: list[tuple[OutputStream, Update]]) -> None:
    for stream, update in updates:
        stream.put(update)


def _call(loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> bool:
    """Runs `callback` in the thread of `loop`. False when the loop is closed."""
    try:
        loop.call_soon_threadsafe(callback)
    except RuntimeError:
        if loop.is_closed():
            return False
        raise
    return True
