"""JSON without the leniency of Python's parser: no duplicate keys, no NaN or Infinity, no half of a surrogate pair, an object
at the top.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from .errors import TrtcError


def parse_object(text: str | bytes, where: str, error: type[TrtcError]) -> dict[str, Any]:
    """The JSON object in `text`. Raises `error`, naming `where` and the line, on anything else."""
    try:
        if isinstance(text, bytes):
            text = text.decode(json.detect_encoding(text))
        value = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
        if re.search(r"\\u[dD][89a-fA-F]", text):
            # Half a pair could be in no name of a file, and be sent nowhere: to encode it is an error.
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as problem:
        raise error(f"{where}: not valid JSON: {problem.msg}, line {problem.lineno}") from None
    except (ValueError, RecursionError) as problem:
        raise error(f"{where}: not valid JSON: {problem}") from None
    if not isinstance(value, dict):
        raise error(f"{where}: must be a JSON object, is {type(value).__name__}")
    return value


def read_object(path: Path, error: type[TrtcError]) -> dict[str, Any]:
    """The JSON object in the file `path`. Raises `error`, naming the file, when it cannot be read or is not
    one.
    """
    try:
        text = path.read_bytes()
    except OSError as problem:
        raise error(f"{path}: cannot be read: {problem.strerror}") from None
    return parse_object(text, str(path), error)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        duplicate = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {duplicate!r} occurs twice in one object")
    return result


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")
