"""The plugin packages of examples/ work when installed, use the public API only, and are small."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from trtc.tests.fake_install import environment, install

EXAMPLES = Path(__file__).parents[2] / "examples"
PACKAGES = ("trtc-gpt2", "trtc-llama")
MAX_LINES = 119


def test_the_packages_own_tests_pass_where_they_are_installed(tmp_path: Path) -> None:
    """Oracle: the packages' tests, which compare with transformers, found through real entry points."""
    for package in PACKAGES:
        install(EXAMPLES / package, tmp_path)
    tests = [str(EXAMPLES / package / "tests") for package in PACKAGES]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--import-mode=importlib",
        *tests,
    ]
    result = subprocess.run(command, env=environment(tmp_path), cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("package", PACKAGES)
def test_a_family_is_small_and_imports_nothing_but_the_core(package: str) -> None:
    """Oracle: the syntax tree. The whole plugin, comments and blank lines included, has under 120 lines."""
    sources = list((EXAMPLES / package / package.replace("-", "_")).glob("*.py"))
    assert sum(len(path.read_text().splitlines()) for path in sources) <= MAX_LINES
    for path in sources:
        imports = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        ours = {f"{node.module}.{name.name}" for node in imports for name in node.names if node.module}
        ours = {name for name in ours if name.startswith("trtc.")}
        assert ours
        assert all(name.startswith("trtc.core.") and "._" not in name for name in ours), ours
