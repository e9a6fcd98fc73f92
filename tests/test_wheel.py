"""The built wheel holds the package and nothing else, and works outside the checkout. Oracle: the list of rooms."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {"core", "kernels", "runtime", "plugins", "cli"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that the checkout gets no build folder; this one has that of an older version."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    names = files.stdout.splitlines() if files.returncode == 0 else None
    assert names, "the test needs a git checkout"
    for name in names:
        if name.split("/")[0] in ROOMS or "/" not in name:
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / name).is_file():
                target.write_bytes((ROOT / name).read_bytes())
    older = source / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    (older / "trtc" / "formerly").mkdir(parents=True)
    (older / "trtc" / "formerly" / "module.py").touch()
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        ".",
    ]
    subprocess.run(command, cwd=source, check=True)
    (found,) = folder.glob("trtc-*.whl")
    return found


def test_contents(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    package = [name for name in names if not name.split("/")[0].endswith(".dist-info")]
    assert {name.split("/")[0] for name in package} == {"trtc"}
    assert {name.split("/")[1] for name in package if name.count("/") > 1} == ROOMS
    top = {name.split("/")[1] for name in package if name.count("/") == 1}
    assert top == {"__init__.py", "py.typed"}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "kernels").rglob("*.cu*")}
    assert sources <= {name.removeprefix("trtc/") for name in names}, "CUDA sources are missing"
    assert any("cli/templates/plugin" in name for name in names)


def test_it_works_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}

    def trtc(*words: str) -> str:
        command = [sys.executable, "-m", "trtc.cli", *words]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        ).stdout

    where = subprocess.run([sys.executable, "-c", "import trtc; print(trtc.__file__)"], cwd=tmp_path, env=environment,
                           capture_output=True, text=True, check=True).stdout  # fmt: skip
    assert where.strip() == str(tmp_path / "site" / "trtc" / "__init__.py")
    assert "OPTForCausalLM" in trtc("plugins")
    trtc("build", "--model-dir", str(ROOT / "examples" / "tiny-opt"), "--output-dir", "engine")
    assert "Output [0]" in trtc(
        "run", "--engine-dir", "engine", "--input-text", "Hello", "--max-output-len", "2"
    )
