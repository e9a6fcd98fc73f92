"""Oracle: the code itself. docs/structures.md names files and functions; they must be there."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import trtc

PAGE = Path(trtc.__path__[0]) / "docs" / "structures.md"
STATIONS = re.findall(
    r"^\| \d+\. [^|]+\| `([^`]+)` \| `([^`]+)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE
)


def test_the_page_has_its_table() -> None:
    assert len(STATIONS) == 11


@pytest.mark.parametrize(("file", "function"), STATIONS)
def test_every_station_is_where_the_page_says(file: str, function: str) -> None:
    found = importlib.import_module("trtc." + file.removesuffix(".py").replace("/", "."))
    for name in function.split("."):
        found = getattr(found, name)
