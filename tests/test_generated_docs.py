"""Generated pages of docs/ say what the code says (oracle: the generator itself)."""

import importlib.util
import json
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"


def generator():
    spec = importlib.util.spec_from_file_location("generate_docs", DOCS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["cli.md", "opt-weights.md"])
def test_page_is_current(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "110")
    assert (DOCS / page).read_text() == generator().PAGES[page](), "run `make docs`"


def test_numbers_are_those_of_the_results_files() -> None:
    from trtc.bench import table

    for page, results, render in table.TABLES:
        assert table.current(page, results, render) == page.read_text(), f"{page.name}: run `make docs`"


def test_numbers_of_the_server_page_are_those_of_the_results_files() -> None:
    from trtc.bench import server_tables

    page = server_tables.PAGE.read_text()
    assert server_tables.with_tables(page) == page, "run `make docs`"


def test_numbers_of_the_page_on_ranks_are_those_of_the_results_file() -> None:
    from trtc.bench import rank_memory
    from trtc.bench.markdown import with_table

    page = rank_memory.PAGE.read_text()
    text = rank_memory.table(json.loads(rank_memory.RESULTS.read_text()))
    assert with_table(page, rank_memory.RESULTS.stem, text) == page, "run `make docs`"


def test_numbers_of_prompt_lookup_are_those_of_the_results_files() -> None:
    from trtc.bench import prompt_lookup

    page = prompt_lookup.PAGE.read_text()
    assert prompt_lookup.with_tables(page) == page, "run `make docs`"
