"""How many sequences the server takes on at once."""

from __future__ import annotations

from .errors import ApiError, bad_field

_RETRY_AFTER_S = 1


class Admission:
    """Places for sequences: those the engine runs at once, and a bounded queue behind them. Used by one event loop."""

    def __init__(self, max_batch_size: int, max_queue: int) -> None:
        self._limit = max_batch_size + max_queue
        self._taken = 0

    def take(self, count: int) -> Places:
        """Raises ApiError 429 while there is no room for `count` sequences, 400 when there never is."""
        if count > self._limit:
            raise bad_field("n", f"the request asks for {count} completions; accepted: at most {self._limit}")
        if self._taken + count > self._limit:
            raise ApiError(
                429,
                f"the queue is full: {self._taken} of {self._limit} places are taken, the request needs {count}; "
                f"try again after {_RETRY_AFTER_S} s",
                code="queue_full",
                headers={"Retry-After": str(_RETRY_AFTER_S)},
            )
        self._taken += count
        return Places(self, count)

    def give_back(self, count: int) -> None:
        self._taken -= count


class Places:
    """Places of one request, given back once."""

    def __init__(self, admission: Admission, count: int) -> None:
        self._admission, self._count = admission, count

    def release(self) -> None:
        """Calling it twice is harmless."""
        self._admission.give_back(self._count)
        self._count = 0
