"""The trained tiny OPT of examples/, and engines of it."""

from __future__ import annotations

from pathlib import Path

from trtc.cli.main import main

EXAMPLES = Path(__file__).parent.parent / "examples"
TINY_OPT = EXAMPLES / "tiny-opt"
NEWS = EXAMPLES / "news.jsonl"
"""Articles that it has not seen in training."""


def build_tiny_opt(folder: Path, *options: str, model_dir: Path = TINY_OPT) -> Path:
    """What `trtc build`, with more `options`, makes of it in float32; returns `folder`."""
    command = ["build", "--model-dir", str(model_dir), "--output-dir", str(folder), "--dtype", "float32"]
    assert main([*command, *options]) == 0
    return folder
