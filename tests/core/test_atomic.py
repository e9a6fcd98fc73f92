"""Output folders: complete or not at all, and never at the cost of somebody's files."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trtc.core import atomic
from trtc.core.atomic import atomic_directory
from trtc.core.errors import ConfigError


def is_ours(path: Path) -> bool:
    return (path / "marker").exists()


def write(path: Path, text: str) -> None:
    with atomic_directory(path, is_ours) as folder:
        (folder / "marker").write_text(text)


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


@pytest.fixture(params=["exchange", "two steps"])
def swap(request, monkeypatch):
    """Both ways to replace a folder: with renameat2, and without it."""
    if request.param == "two steps":
        monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)


def test_a_new_folder_appears_with_its_content(tmp_path):
    write(tmp_path / "a" / "out", "new")
    assert (tmp_path / "a" / "out" / "marker").read_text() == "new"
    assert names(tmp_path / "a") == ["out"]


def test_our_folder_is_replaced_as_a_whole(tmp_path, swap):
    write(tmp_path / "out", "old")
    (tmp_path / "out" / "more").touch()
    write(tmp_path / "out", "new")
    assert names(tmp_path / "out") == ["marker"]
    assert (tmp_path / "out" / "marker").read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_an_empty_folder_is_replaced(tmp_path, swap):
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", "new")
    assert names(tmp_path / "out") == ["marker"]


def test_a_link_keeps_pointing_to_the_replaced_folder(tmp_path):
    write(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "marker").read_text() == "new"


def test_an_error_leaves_the_old_folder_and_no_rubbish(tmp_path):
    write(tmp_path / "out", "old")

    def fail(folder: Path) -> None:
        (folder / "marker").write_text("half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), atomic_directory(tmp_path / "out", is_ours) as folder:
        fail(folder)
    assert (tmp_path / "out" / "marker").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_a_folder_of_somebody_else_is_refused_untouched(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter").write_text("dear")
    with pytest.raises(ConfigError, match="home: exists and is not an output of trtc"):
        write(tmp_path / "home", "new")
    assert names(tmp_path) == ["home"]
    assert (tmp_path / "home" / "letter").read_text() == "dear"


def test_a_folder_filled_meanwhile_by_somebody_else_is_refused(tmp_path):

    def fill_and_write() -> None:
        with atomic_directory(tmp_path / "out", is_ours):
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "letter").touch()

    with pytest.raises(ConfigError, match="is not an output of trtc"):
        fill_and_write()
    assert names(tmp_path / "out") == ["letter"]


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file: exists and is not a folder"):
        write(tmp_path / "file", "new")
    with pytest.raises(ConfigError, match=r"cannot be written: (Not a directory|File exists)"):
        write(tmp_path / "file" / "out", "new")


def test_a_full_disk_is_a_config_error_that_names_the_folder(tmp_path):
    def fill_the_disk() -> None:
        with atomic_directory(tmp_path / "out", is_ours):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(ConfigError, match="out: cannot be written: No space left on device"):
        fill_the_disk()
    assert names(tmp_path) == []


def test_what_could_not_be_read_is_not_said_to_be_written(tmp_path: Path) -> None:
    """Text files are copied within the block. Where a copy breaks off, shutil names the source first."""

    def fail(work: Callable[[Path], object]) -> None:
        with atomic_directory(tmp_path / "out", is_ours) as folder:
            work(folder)

    def break_off(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/source", None, folder / "copy")

    with pytest.raises(ConfigError, match=r"^/nowhere: cannot be read: No such file or directory$"):
        fail(lambda folder: shutil.copyfile("/nowhere", folder / "copy"))
    with pytest.raises(ConfigError, match=r"/\.out\.tmp.*/copy: cannot be written: No space left on device$"):
        fail(break_off)
    with pytest.raises(ConfigError, match=r"/none/copy: cannot be written: No such file or directory$"):
        fail(lambda folder: shutil.copyfile(__file__, folder / "none" / "copy"))


def test_an_old_folder_that_cannot_be_removed_is_replaced_all_the_same(tmp_path: Path, swap: None) -> None:
    """As another user's. Here it is a folder in the place of the seal; what is left is no reason to refuse the next write."""
    (tmp_path / "out" / "seal").mkdir(parents=True)
    for text in ("new", "newer"):
        with atomic_directory(tmp_path / "out", lambda _: True, seal="seal") as folder:
            (folder / "seal").write_text(text)
        assert (tmp_path / "out" / "seal").read_text() == text


def test_a_mount_point_is_refused():
    with pytest.raises(ConfigError, match="/: is a mount point"):
        write(Path("/"), "new")


KILLED_WRITER = """
import os, sys
from pathlib import Path
from typing import Any
from trtc.core.atomic import atomic_directory
with atomic_directory(Path(sys.argv[1]), lambda path: True) as folder:
    (folder / "marker").write_text("half")
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_the_current_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even empty: a shell in it would be left in a folder that no longer has a name."""
    monkeypatch.chdir(tmp_path)
    with (
        pytest.raises(ConfigError, match="is the current folder, which cannot be replaced"),
        atomic_directory(".", is_ours),
    ):
        pass


def test_rubbish_of_a_killed_process_is_removed_and_that_of_a_live_one_is_not(tmp_path):
    writer = subprocess.Popen(
        [sys.executable, "-c", KILLED_WRITER, str(tmp_path / "out")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert writer.stdout.readline() == b"ready\n"
        write(tmp_path / "out", "first")
        assert len(names(tmp_path)) == 2
    finally:
        os.kill(writer.pid, signal.SIGKILL)
        writer.communicate()
    assert len(names(tmp_path)) == 2
    assert (tmp_path / "out" / "marker").read_text() == "first"
    write(tmp_path / "out", "second")
    assert names(tmp_path) == ["out"]


def test_other_hidden_folders_are_left_alone(tmp_path):
    kept = [".out.tmp", ".out.tmp-1-abc", ".other.tmp-1-00000000", ".out.tmp-1-0000000g"]
    for name in kept:
        (tmp_path / name).mkdir()
    write(tmp_path / "out", "new")
    assert names(tmp_path) == sorted([*kept, "out"])


def test_the_seal_is_the_first_file_to_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replaced folder loses what it needs to load before anything else of it is removed."""
    seen: list[list[str]] = []
    remove = shutil.rmtree

    def watch(folder: Path, **options: Any) -> None:
        if folder.exists():
            seen.append(sorted(path.name for path in folder.iterdir()))
        remove(folder, **options)

    monkeypatch.setattr("trtc.core.atomic.shutil.rmtree", watch)
    for _ in range(2):
        with atomic_directory(tmp_path / "out", lambda _: True, seal="config.json") as folder:
            for name in ("a", "config.json", "z"):
                (folder / name).write_text(name)
    assert seen == [["a", "z"]]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a", "config.json", "z"]
