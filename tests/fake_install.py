"""Installs a plugin project without pip: writes what an editable install would leave in site-packages."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path


def install(project: Path, site: Path) -> None:
    """Makes the packages, modules and entry points of `project` (its pyproject.toml) found in the folder `site`,
    which is to be put on sys.path.
    """
    data = tomllib.loads((project / "pyproject.toml").read_text())
    name, version = data["project"]["name"], data["project"]["version"]
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    groups = data["project"].get("entry-points", {})
    lines = [
        f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in points.items())
        for group, points in groups.items()
    ]
    (info / "entry_points.txt").write_text("\n".join(lines))
    setuptools = data["tool"]["setuptools"]
    for package in setuptools.get("packages", []):
        (site / package).symlink_to(project / package, target_is_directory=True)
    for module in setuptools.get("py-modules", []):
        (site / f"{module}.py").symlink_to(project / f"{module}.py")


def environment(site: Path) -> dict[str, str]:
    """The environment of a process that has `site` installed and computes with one thread."""
    paths = [str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
