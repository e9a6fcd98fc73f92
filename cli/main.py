"""`trtc`: the command line. Parsing and printing only; every command is a few calls of the library.

Options are accepted with dashes and with underscores, as scripts for TensorRT-LLM have them. A user's mistake is one line
on stderr and exit code 1 (2 for a command line that does not parse), never a traceback.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from .. import __version__
from ..core.errors import ConfigError, TrtcError, one_line
from . import (
    bench,
    build,
    convert,
    eval,
    inspect,
    lm_eval_command,
    new_plugin_command,
    plugins,
    profile,
    run,
    serve,
    summarize,
)

COMMANDS = (
    convert,
    build,
    run,
    serve,
    summarize,
    eval,
    lm_eval_command,
    bench,
    profile,
    inspect,
    plugins,
    new_plugin_command,
)
"""Modules with NAME, HELP, `add_arguments(parser)` and `main(args) -> int`."""

_OUTPUT_ERRORS = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""Of writing; those of files, which have names, are told by who writes them."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, and where to read more."""
        self.exit(2, f"{self.prog}: error: {one_line(message)}; see `{self.prog} --help`\n")


def parser() -> argparse.ArgumentParser:
    top = _Parser(
        prog="trtc", description="Compiles Hugging Face transformer checkpoints into engines and runs them."
    )
    top.add_argument("--version", action="version", version=f"trtc {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        sub = commands.add_parser(
            command.NAME, help=command.HELP, description=command.HELP, allow_abbrev=False
        )
        command.add_arguments(sub)
        sub.set_defaults(main=command.main, parser=sub)
    return top


def with_dashes(argv: Sequence[str]) -> list[str]:
    """`--max_batch_size=8` -> `--max-batch-size=8`; values and what follows `--` stay as they are."""
    result: list[str] = []
    for i, word in enumerate(argv):
        if word == "--":
            return result + list(argv[i:])
        name, equals, value = word.partition("=")
        result.append(name.replace("_", "-") + equals + value if name.startswith("--") else word)
    return result


def unknown_arguments(words: Sequence[str], command: argparse.ArgumentParser) -> str:
    """What to say of arguments that `command` does not know, with the nearest option that it does."""
    known = [option for action in command._actions for option in action.option_strings]
    near = difflib.get_close_matches(words[0].partition("=")[0], known, n=1)
    return f"unrecognized arguments: {' '.join(words)}" + (f"; did you mean {near[0]}?" if near else "")


def _check_folder() -> None:
    """Raises ConfigError where the current folder has been removed: torch's libraries end the process then."""
    try:
        os.getcwd()
    except OSError as error:
        raise ConfigError(
            f"the current folder cannot be used: {error.strerror}; change to another one"
        ) from None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    words = with_dashes(sys.argv[1:] if argv is None else argv)
    args, unknown = parser().parse_known_args(words)
    args.words = words  # for commands that start themselves again
    if unknown:
        args.parser.error(unknown_arguments(unknown, args.parser))
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        # as stderr: a model may write what a terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        _check_folder()
        code: int = args.main(args)
        sys.stdout.flush()
        return code
    except TrtcError as error:
        print(f"trtc {args.command}: error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        # What no command says more about: a folder that may not be entered, a full disk behind `>`.
        where = error.filename
        if where is None and error.errno in _OUTPUT_ERRORS:
            where = "standard output"
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, sys.stdout.fileno())  # Python would try again at its end
        if isinstance(error, BrokenPipeError):  # the reader of our output went away, as `head` does
            return 0
        reason = one_line(f"{where or type(error).__name__}: {error.strerror or error}")
        print(f"trtc {args.command}: error: {reason}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"trtc {args.command}: interrupted", file=sys.stderr)
        return 130
