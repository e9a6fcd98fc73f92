"""`trtc new-plugin` writes a package that works."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from trtc.cli.new_plugin import create
from trtc.core.errors import ConfigError, PluginError
from trtc.tests.fake_install import environment, install


def test_the_new_package_has_a_test_that_passes_as_it_is(tmp_path: Path) -> None:
    """Oracle: the package's own test, a direct implementation in torch, run where the package is installed."""
    created = create("my-model2", tmp_path)
    project = tmp_path / "trtc-my-model2"
    assert created == [
        project / "pyproject.toml",
        project / "README.md",
        project / "trtc_my_model2" / "__init__.py",
        project / "tests" / "test_my_model2.py",
    ]
    install(project, tmp_path / "site")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    env = environment(tmp_path / "site")
    result = subprocess.run(command, env=env, cwd=project, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "4 passed" in result.stdout


def test_no_placeholder_is_left(tmp_path: Path) -> None:
    """Oracle: by hand. `$` stands in no generated file."""
    assert not [path for path in create("toy", tmp_path) if "$" in path.read_text()]


@pytest.mark.parametrize(
    "name", ["", "2fast", "my model", "My-Model", "a--b", "a-", "-a", "../a", "größe", "a.b"]
)
def test_a_name_that_no_module_can_have_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(PluginError, match="cannot be the name of a plugin; accepted: lower-case letters"):
        create(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_a_plugin_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PluginError, match=r"plugin 'opt' exists already \(trtc .*\); choose another name"):
        create("opt", tmp_path)


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "trtc-toy").mkdir()
    (tmp_path / "trtc-toy" / "mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match="trtc-toy: exists"):
        create("toy", tmp_path)
    assert [path.name for path in (tmp_path / "trtc-toy").iterdir()] == ["mine.txt"]
