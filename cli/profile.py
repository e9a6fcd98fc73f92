"""`trtc profile`: where the time of a step goes."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ..runtime.early_start import begin_loading
from ..runtime.heap import without_collection
from .output_files import check_output_file, write_json

if TYPE_CHECKING:
    from ..runtime.profiling import StepProfile

NAME = "profile"
HELP = "show where the time of a prefill and of a decode step goes, kernel by kernel"
_WIDTH = 72
"""Columns for a kernel's name: those of templates go on for lines."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--engine-dir", type=Path, required=True, help="folder written by `trtc build`")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="sequences (default: %(default)s)")
    parser.add_argument(
        "--input-len", type=int, default=128, metavar="N", help="tokens (default: %(default)s)"
    )
    parser.add_argument(
        "--steps", type=int, default=32, metavar="N", help="decode steps (default: %(default)s)"
    )
    parser.add_argument(
        "--top", type=int, default=15, metavar="N", help="kernels to print (default: %(default)s)"
    )
    parser.add_argument("--no-verify", action="store_true", help="do not compare the files' sha256 first")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every kernel here")


def main(args: argparse.Namespace) -> int:
    check_output_file(args.json, "--json")
    engine_dir = begin_loading(args.engine_dir, verify=not args.no_verify)
    with without_collection():
        from ..runtime.llm import LLM
        from ..runtime.profiling import profile_engine

    profiles = []
    with LLM(engine_dir) as llm:
        for found in profile_engine(llm, batch=args.batch, input_len=args.input_len, steps=args.steps):
            profiles.append(asdict(found))
            show(found, args.top)
    if args.json is not None:
        write_json(args.json, profiles)
    return 0


def show(found: StepProfile, top: int) -> None:
    what = "kernels" if found.device == "cuda" else "operators"
    print(
        f"{found.phase}, batch {found.batch}: {found.wall_us:.1f} us a step, {found.steps} step(s); {what} sum up to "
        f"{found.kernels_us:.1f} us while they are watched"
    )
    print(f"{'us/step':>10}  {'share':>6}  {'calls':>7}  {what[:-1]}")
    for kernel in found.kernels[:top]:
        share = 100 * kernel.time_us / found.kernels_us
        print(f"{kernel.time_us:>10.2f}  {share:>5.1f}%  {kernel.calls:>7.1f}  {kernel.name[:_WIDTH]}")
    left = found.kernels[top:]
    if left:
        rest = sum(kernel.time_us for kernel in left)
        print(f"{rest:>10.2f}  {100 * rest / found.kernels_us:>5.1f}%  {'':>7}  {len(left)} others")
    print()
