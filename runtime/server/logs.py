"""Logs for machines: one JSON object a line on stderr."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Any

_PACKAGE = "trtc"

logger = logging.getLogger(f"{_PACKAGE}.server")


class JsonFormatter(logging.Formatter):
    """ts (UTC), level, event, the fields given, and the traceback of an exception."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        entry |= getattr(record, "fields", {})
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def log(event: str, **fields: Any) -> None:
    logger.info(event, extra={"fields": fields})


def set_up() -> None:
    """Sends everything that is logged in this process to stderr; of other libraries only warnings and errors."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger(_PACKAGE).setLevel(logging.INFO)
    logging.captureWarnings(True)
