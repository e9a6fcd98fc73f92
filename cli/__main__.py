"""Where a process of the command line starts: `trtc`, and `python -m trtc.cli`."""

import os
import signal
import sys


def run() -> int:
    """The exit code of the command in `sys.argv`. Ctrl-C while modules are imported ends it in one line too."""
    _open_streams()
    try:
        from .main import main

        return main()
    except KeyboardInterrupt:
        print("trtc: interrupted", file=sys.stderr)
        return 130
    finally:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # nobody is left to catch what Python would raise


def _open_streams() -> None:
    """Stands in for streams that were closed when trtc was started, as by `2>&-`: Python has None for them, which libraries
    write to, and the next file that is opened would get their number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - open as long as the process


if __name__ == "__main__":
    sys.exit(run())
