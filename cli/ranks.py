"""`--nproc`, and what a process does that is one rank of several."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from typing import TYPE_CHECKING, Unpack

from ..core.errors import ConfigError

if TYPE_CHECKING:
    from ..runtime.load_core import LoadOptions


def add_nproc(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nproc", type=int, metavar="N",
                        help="start N ranks on this machine, for an engine of --tp-size N (default: the ranks of mpirun, "
                        "else one)")  # fmt: skip


def enter_job(
    args: argparse.Namespace, *, drain_s: float | None = None, **load_options: Unpack[LoadOptions]
) -> int | None:
    """What comes before a command that loads an engine: the exit code where that is all this process has to do.

    `--nproc` starts the ranks, which run the same command line, and waits for them. A rank other than 0 follows rank 0 to
    its end. On rank 0, and in a process that is alone, the result is None: the command goes on.
    drain_s: rank 0 may take so long to finish after SIGTERM or SIGINT, and the others wait for it; None: all end at once.
    load_options: what the command gives `LLM` or `load_executor`; the same on every rank.
    """
    from ..runtime.placement import placement, require_interface, require_runnable

    place = placement()
    if args.nproc is not None:
        if args.nproc < 1:
            raise ConfigError(f"--nproc is {args.nproc}; accepted: 1 or more")
        if place.size == 1 and args.nproc > 1:
            from ..core.engine_files import EngineFiles
            from ..runtime.launcher import launch_ranks

            # Here, before there are ranks of which each would find it out for itself.
            engine = EngineFiles(args.engine_dir, verify=False)
            require_interface()
            require_runnable(engine.folder, engine.num_ranks, args.nproc)
            command = [sys.executable, "-P", "-m", "trtc.cli", *args.words]
            return launch_ranks(command, args.nproc, drain_s=drain_s)
        if place.size != args.nproc:
            raise ConfigError(
                f"--nproc {args.nproc} in a job of {place.size} ranks; leave it out under mpirun"
            )
    if place.size > 1:  # what torch says, with a stack of C++, when a rank is lost, we say in one line
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if place.rank > 0:
        if drain_s is not None:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
        from ..runtime.load import load_executor

        load_executor(args.engine_dir, **load_options)
    return None
