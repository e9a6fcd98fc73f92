"""What TensorRT says while it builds, and errors that carry it.

TensorRT keeps one logger a process, the first that any builder was given, so there is one BuildLog for each
flavour. When several networks are built at the same time in one process, an error may carry the reasons of another.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

from ...errors import BuildError

_LEVELS = {
    "INTERNAL_ERROR": logging.ERROR,
    "ERROR": logging.ERROR,
    "WARNING": logging.WARNING,
    "INFO": logging.INFO,
}
_NO_DRIVER = "cudaError 35"
"""Follows every error on a machine without a GPU, and explains none of them."""


class BuildLog:
    """Collects TensorRT's errors; all its messages also go to the Python logger of this module.

    trt: the TensorRT module; `logger` is what its Builder wants.
    """

    def __init__(self, trt: Any) -> None:
        self._errors: list[str] = []
        self.logger = _logger(trt, self)

    def take(self, severity: str, message: str) -> None:
        logging.getLogger(__name__).log(_LEVELS.get(severity, logging.DEBUG), "%s", message)
        if _LEVELS.get(severity) == logging.ERROR and _NO_DRIVER not in message:
            self._errors.append(message)

    def error(self, what: str) -> BuildError:
        """A BuildError about `what`, with the reasons TensorRT gave since the last one."""
        return BuildError(f"{what}: {self.reasons()}")

    def reasons(self) -> str:
        """The errors that TensorRT logged since this was last asked."""
        reasons, self._errors = self._errors, []
        return " | ".join(reasons) or "TensorRT gave no reason"


@cache
def build_log(trt: Any) -> BuildLog:
    """The log of a TensorRT module, alive as long as the process: TensorRT keeps a pointer to its logger."""
    return BuildLog(trt)


def _logger(trt: Any, sink: BuildLog) -> Any:
    """An ILogger of the module at hand."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            sink.take(severity.name, message)

    return Logger()
