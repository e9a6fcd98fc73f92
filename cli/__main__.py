"""Where a process of the command line starts: `trtc`, and `python -m trtc.cli`."""

import sys


def run() -> int:
    """The exit code of the command in `sys.argv`. Ctrl-C while modules are imported ends it in one line too."""
    try:
        from .main import main

        return main()
    except KeyboardInterrupt:
        print("trtc: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(run())
