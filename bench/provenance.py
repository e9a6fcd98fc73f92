"""What results are of: the commit, and the processor."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def commit_of_tree(named: str | None = None) -> dict[str, Any]:
    """`commit`, and whether the tree is `dirty`: files that git tracks differ from it, those of bench/results aside.

    named: the commit, where git cannot tell: on a machine that has a copy of the files alone
    """
    if named:
        return {"commit": named[:12], "dirty": False}
    changes = ("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
    return {
        "commit": output_of("git", "rev-parse", "--short=12", "HEAD"),
        "dirty": bool(output_of("git", *changes)),
    }


def processor() -> str:
    """Its name as Linux gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def output_of(*command: str) -> str:
    """What `command` prints, run in the checkout; "unknown" when it fails or is not there."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
