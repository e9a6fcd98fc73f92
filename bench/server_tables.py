"""Tables of docs/server.md from the files in bench/results/ that server_load.py wrote.

python -m trtc.bench.server_tables     # writes them between their markers
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .markdown import table_of, with_table

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "server.md"
RESULTS = ROOT / "bench" / "results"


def checks(data: dict[str, Any]) -> str:
    """What a server was put through, and what was found."""
    lines = [(row["case"], row["value"], row["wanted"] or "") for row in data["rows"]]
    return table_of(("case", "found", "wanted"), lines) + _setup(data)


def rates(data: dict[str, Any]) -> str:
    """Latency and throughput at rates of arrival."""
    lines = [
        (
            each["rate"],
            f"{each['ttft_p50_ms']}, {each['ttft_p99_ms']}",
            f"{each['tpot_p50_ms']}, {each['tpot_p99_ms']}",
            each["output_tok_s"],
            f"{100 * each['of_offline']:.0f} %",
        )
        for each in data["rates"]
    ]
    header = (
        "requests/s",
        "TTFT ms: p50, p99",
        "TPOT ms: p50, p99",
        "output tokens/s",
        "of `LLM`, all at once",
    )
    return table_of(header, lines) + _setup(data)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "cpu-server-load": checks,
    "cpu-server-rates": rates,
    "gpu-server": rates,
}
ON_A_GPU = "gpu-server"
"""Measured when there is a GPU; its place in the page is empty until then."""


def with_tables(page: str) -> str:
    """`page` with every table whose markers it has, `<!-- bench: NAME -->` and `<!-- /bench -->`, made anew."""
    for name, table in TABLES.items():
        results = RESULTS / f"{name}.json"
        if name == ON_A_GPU and not results.exists():
            continue
        page = with_table(page, name, table(json.loads(results.read_text())))
    return page


def _setup(data: dict[str, Any]) -> str:
    found = data["environment"]
    dirty = " with local changes" if found["dirty"] else ""
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    what = ", ".join(f"{name} {value}" for name, value in data["setup"].items())
    return (
        f"\n{_model(found)}, target {found['target']}, {found['dtype']}, {found['device']}, at most {found['max_batch_size']} "
        f"sequences a step; {what}; commit {found['commit']}{dirty}, {found['date']}; torch {found['torch']}, {versions}.\n"
    )


def _model(found: dict[str, Any]) -> str:
    layers, hidden = found["layers"], found["hidden"]
    known = {(4, 128): "The tiny OPT", (12, 768): "OPT-125M", (32, 4096): "OPT-6.7B"}
    return known.get((layers, hidden), f"An engine of {layers} layers, hidden {hidden}")


def main() -> None:
    PAGE.write_text(with_tables(PAGE.read_text()))


if __name__ == "__main__":
    main()
