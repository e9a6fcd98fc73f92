"""`trtc plugins`: what was found, from which distribution, and what failed to load and why."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

NAME = "plugins"
HELP = "list plugins: name, distribution, architectures; and why one did not load"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(args: argparse.Namespace) -> int:
    from ..core.plugin_registry import plugins

    found = plugins().plugins
    if args.json:
        print(json.dumps([asdict(info) for info in found], indent=2))
        return 0
    rows = [
        (
            info.name,
            info.distribution,
            info.module,
            f"error: {info.error}" if info.error else ", ".join(info.architectures),
        )
        for info in found
    ]
    header = ("name", "distribution", "module", "architectures")
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(3)]
    for row in [header, *rows]:
        print(
            "  ".join(
                [*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]
            ).rstrip()
        )
    return 0
