"""Files that commands write beside what they print."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError


def check_output_file(path: Path | None, flag: str) -> None:
    """Raises ConfigError where `flag` names no file that can be written: before the work, not after it."""
    if path is None:
        return
    if path.is_dir():
        raise ConfigError(f"{flag}: {path} is a folder; expected a file to write")
    if _is_device(path):
        return
    whole = Path(os.path.realpath(path))
    if not whole.parent.is_dir():
        raise ConfigError(f"{flag}: {whole.parent} is not a folder")
    if not os.access(whole.parent, os.W_OK):
        raise ConfigError(f"{flag}: {whole.parent} may not be written to")


def write_json(path: Path, value: Any) -> None:
    """Writes `value` to `path`, whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes `text` to `path`, whole or not at all."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Writes `content` to `path`: whole or not at all, unless that is a device. Raises ConfigError where it fails."""
    whole = Path(os.path.realpath(path))
    scratch = whole.with_name(f".{whole.name}.tmp-{os.getpid()}")
    try:
        if _is_device(path):
            path.write_bytes(content)
            return
        scratch.write_bytes(content)
        os.replace(scratch, whole)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None


def _is_device(path: Path) -> bool:
    """Whether `path` is a device or a pipe, as /dev/null and /dev/stdout: nothing to be replaced by a file."""
    return path.exists() and not path.is_file()
