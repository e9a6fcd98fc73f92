"""The errors a user of trtc can meet.

Every one is a `TrtcError`: a one-line message that says what was wrong, where, and what is accepted. The command line
prints it without a traceback. A broken invariant of our own is an `AssertionError` and is a bug.
"""

from __future__ import annotations

MAX_MESSAGE = 20_000
"""Characters: room for the names of a model's tensors; a value that a message quotes may be as long as its file."""


def one_line(text: str, limit: int = MAX_MESSAGE) -> str:
    """`text` without line breaks, and with escapes for what else is not printable: a message quotes names and values of
    files, whose escape sequences a terminal would obey. Of more than `limit` characters, both ends: what it is about stands
    at the beginning, what is accepted at the end.
    """
    text = " ".join(text.split())
    if len(text) > limit:
        text = f"{text[: limit // 2]} ... {text[-(limit // 2) :]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class TrtcError(Exception):
    """Base of all errors caused by an input, a file, a request or the machine."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class ConfigError(TrtcError):
    """A configuration (Hugging Face config.json, build option, command line) has a bad value."""


class CheckpointError(TrtcError):
    """A checkpoint is missing, truncated, of the wrong layout, or does not fit its configuration."""


class GraphError(TrtcError):
    """A graph breaks a rule; the message names the node."""


class ShapeError(GraphError):
    """Shapes or dtypes of an op's inputs do not fit each other."""


class BuildError(TrtcError):
    """An engine cannot be built from this graph, these weights or these options."""


class EngineError(TrtcError):
    """An engine directory is missing, damaged, foreign, or of another version."""


class PluginError(TrtcError):
    """A plugin is unknown, broken, or breaks the hook contract."""


class RequestError(TrtcError):
    """A generation request asks for something this engine cannot do. `field`: of `SamplingParams`, where it is one."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class TargetError(TrtcError):
    """A target or feature cannot run on this machine; the message says what to do."""
