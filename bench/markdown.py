"""Tables in Markdown, and the pages that hold them between markers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

END = "<!-- /bench -->\n"


def table_of(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A line a row, `| a | b |`, below the header and its rule."""
    return "".join(
        f"| {' | '.join(map(str, cells))} |\n" for cells in (header, ("---",) * len(header), *rows)
    )


def with_table(page: str, name: str, text: str) -> str:
    """`page` with `text` between `<!-- bench: NAME -->` and the next `<!-- /bench -->`, which must be there."""
    start = f"<!-- bench: {name} -->\n"
    before, found, rest = page.partition(start)
    assert found, f"no marker {start.strip()}"
    _, end, after = rest.partition(END)
    assert end, f"no {END.strip()} after {start.strip()}"
    return f"{before}{start}\n{text}\n{END}{after}"
