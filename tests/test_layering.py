"""The part of the layering contract that import-linter cannot see: no model name in core, kernels or runtime."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODEL_NAME = re.compile(
    r"(?<![a-z])(opt(?![ -](in|out)\b)|gpt-?2|llama|mistral|galactica|qwen)(?![a-z])", re.IGNORECASE
)
SOURCES = ("*.py", "*.cu", "*.cuh")
KNOWN_USES = {
    # The docstring of a transform names where its layout comes from; no code depends on it.
    ("core/weights.py", "GPT-2's Conv1D"),
}


def named_models(path: Path) -> list[str]:
    lines = path.read_text().splitlines()
    relative = path.relative_to(ROOT).as_posix()
    return [
        f"{relative}:{number}: {line.strip()}"
        for number, line in enumerate(lines, 1)
        if MODEL_NAME.search(line) and not any(relative == p and text in line for p, text in KNOWN_USES)
    ]


@pytest.mark.parametrize("room", ["core", "kernels", "runtime"])
def test_no_model_name(room: str) -> None:
    found = [
        hit
        for pattern in SOURCES
        for path in sorted((ROOT / room).rglob(pattern))
        for hit in named_models(path)
    ]
    assert not found, "a model is named outside its plugin:\n" + "\n".join(found)


def test_the_check_can_fail(tmp_path: Path) -> None:
    # `opt` as a word is found, `option` and `optimize` are not.
    assert MODEL_NAME.search('if family == "opt":') and not MODEL_NAME.search("options = optimize(opts)")
