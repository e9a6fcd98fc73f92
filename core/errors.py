"""The errors a user of trtc can meet.

Every one is a `TrtcError`: a one-line message that says what was wrong, where, and what is accepted. The command line
prints it without a traceback. A broken invariant of our own is an `AssertionError` and is a bug.
"""

from __future__ import annotations


class TrtcError(Exception):
    """Base of all errors caused by an input, a file, a request or the machine."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


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
