"""The requests that an engine has been given and that have not ended, for whoever asks from any thread."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..core.errors import EngineError, RequestError

if TYPE_CHECKING:
    from .engine_thread import Submission


class Desk:
    """Takes requests until it is told to refuse them, or until the engine has failed."""

    def __init__(self) -> None:
        self._idle = threading.Condition()
        self._submissions: dict[str, Submission] = {}
        self._refusal: str | None = None
        self.failure: str | None = None
        """Why the engine cannot run any more; None while it can."""

    def register(self, submission: Submission) -> None:
        """Raises RequestError for an id in use or while requests are refused, EngineError when the engine has failed."""
        with self._idle:
            if self.failure is not None:
                raise EngineError(self.failure)
            if self._refusal is not None:
                raise RequestError(self._refusal)
            if submission.request_id in self._submissions:
                raise RequestError(f"request id {submission.request_id!r} is in use by an unfinished request")
            self._submissions[submission.request_id] = submission

    def remove(self, submissions: Iterable[Submission]) -> None:
        """They have ended."""
        with self._idle:
            for submission in submissions:
                del self._submissions[submission.request_id]
            self._idle.notify_all()

    def holds(self, submission: Submission) -> bool:
        return self._submissions.get(submission.request_id) is submission

    def find(self, request_id: str) -> Submission | None:
        """The request of that id; None where it has ended."""
        return self._submissions.get(request_id)

    def known(self, request_id: str) -> Submission:
        """The request of that id, which has not ended."""
        return self._submissions[request_id]

    def unfinished(self) -> list[Submission]:
        with self._idle:
            return list(self._submissions.values())

    @property
    def is_idle(self) -> bool:
        return not self._submissions

    def refuse(self, reason: str) -> None:
        """From now on no request is taken; those that were go on."""
        with self._idle:
            self._refusal = reason

    def fail(self, reason: str) -> list[Submission]:
        """From now on `register` raises; the first reason stays. Returns what is left."""
        with self._idle:
            self.failure = self.failure or reason
            return list(self._submissions.values())

    def wait_idle(self, timeout_s: float | None = None) -> bool:
        """Blocks until no request is left. False when that took longer than `timeout_s`."""
        with self._idle:
            return self._idle.wait_for(lambda: not self._submissions, timeout_s)
