"""Runs the Python blocks of a Markdown file: `python doc_blocks.py FILE`, in an empty working folder.

Blocks run in order, in one namespace. What stands after the language of a fenced block says what happens to it:

    ```python                        runs
    ```python no-run                 is only shown: needs a GPU, the network, ...
    ```python title="toy.py"         becomes a file in the working folder, which later blocks can import
    ```toml title="pyproject.toml"   becomes a file too, and the project it describes is installed

Errors point at the line of the Markdown file.
"""

from __future__ import annotations

import importlib
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w+)(?P<options>[^\n`]*)\n(?P<text>.*?)^(?P=indent)```", re.M | re.S
)
_TITLE = re.compile(r'title="([^"]+)"')
NO_RUN = "no-run"


@dataclass(frozen=True)
class Block:
    """A fenced block. `line` is the number of its first line of code in the file."""

    language: str
    options: str
    text: str
    line: int

    @property
    def title(self) -> str | None:
        found = _TITLE.search(self.options)
        return found[1] if found else None

    @property
    def runs(self) -> bool:
        return self.language == "python" and self.title is None and NO_RUN not in self.options.split()


def blocks(markdown: str) -> Iterator[Block]:
    """The fenced blocks that name a language, in order."""
    for match in _FENCE.finditer(markdown):
        indent = match["indent"]
        lines = [line.removeprefix(indent) for line in match["text"].splitlines()]
        line = markdown.count("\n", 0, match.start("text")) + 1
        yield Block(match["language"], match["options"], "\n".join(lines) + "\n", line)


def run(file: Path) -> None:
    """Runs the blocks of `file` in the current folder."""
    folder = Path.cwd()
    sys.path[:0] = [str(folder), str(folder / "site")]
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(file.read_text(encoding="utf-8")):
        if block.title is not None:
            (folder / block.title).write_text(block.text, encoding="utf-8")
            if block.title == "pyproject.toml":
                _reinstall(folder)
            importlib.invalidate_caches()
        elif block.runs:
            code = compile("\n" * (block.line - 1) + block.text, str(file), "exec")
            exec(code, namespace)


def _reinstall(project: Path) -> None:
    from trtc.tests.fake_install import install

    shutil.rmtree(project / "site", ignore_errors=True)
    install(project, project / "site")


if __name__ == "__main__":
    run(Path(sys.argv[1]))
