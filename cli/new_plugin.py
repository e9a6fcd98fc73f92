"""Writes the package that a plugin author starts from."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from string import Template

from ..core.atomic import atomic_directory
from ..core.errors import PluginError
from ..core.plugin_registry import plugins

TEMPLATES = files(__package__) / "templates" / "plugin"
FILES = {
    "pyproject.toml.in": "pyproject.toml",
    "README.md.in": "README.md",
    "plugin.py.in": "${module}/__init__.py",
    "test.py.in": "tests/test_${stem}.py",
}
"""Template -> file in the package; contents and names are `string.Template`s over `_words`."""
NAME = re.compile(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*")


def create(name: str, directory: Path) -> list[Path]:
    """Writes the package `trtc-<name>` into `directory`: complete, or not at all. Returns its files.

    The package has a model family that works and a test that passes once the package is installed.
    Raises PluginError for a name that cannot be a module's or that a plugin has, ConfigError when the folder
    exists and is not empty, or cannot be written.
    """
    _check_name(name)
    words = _words(name)
    folder = directory / words["distribution"]
    paths = {template: Path(Template(path).substitute(words)) for template, path in FILES.items()}
    with atomic_directory(folder, is_ours=lambda _: False) as temporary:
        for template, path in paths.items():
            text = Template((TEMPLATES / template).read_text(encoding="utf-8")).substitute(words)
            (temporary / path).parent.mkdir(exist_ok=True)
            (temporary / path).write_text(text, encoding="utf-8")
    return [folder / path for path in paths.values()]


def _words(name: str) -> dict[str, str]:
    """What stands for the placeholders of the templates."""
    stem = name.replace("-", "_")
    title = "".join(part.capitalize() for part in stem.split("_"))
    return {
        "name": name,
        "stem": stem,
        "module": f"trtc_{stem}",
        "title": title,
        "distribution": f"trtc-{name}",
    }


def _check_name(name: str) -> None:
    if not NAME.fullmatch(name):
        accepted = "lower-case letters and digits, a letter first, parts joined by '-' or '_', as in my-model"
        raise PluginError(f"{name!r} cannot be the name of a plugin; accepted: {accepted}")
    stem = name.replace("-", "_")
    for info in plugins().plugins:
        if info.name.replace("-", "_") == stem:
            raise PluginError(
                f"plugin {info.name!r} exists already ({info.distribution}); choose another name"
            )
