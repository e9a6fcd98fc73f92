"""`trtc new-plugin`: a working plugin package to start from."""

from __future__ import annotations

import argparse
from pathlib import Path

NAME = "new-plugin"
HELP = "write a working plugin package, with a passing test, to start a model family from"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="name of the model family")
    parser.add_argument(
        "--output-dir", type=Path, default=Path(), help="where to put the package (default: here)"
    )


def main(args: argparse.Namespace) -> int:
    from .new_plugin import create

    for path in create(args.name, args.output_dir):
        print(path)
    return 0
