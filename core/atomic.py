"""Output folders that appear complete or not at all."""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import ConfigError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def atomic_directory(
    path: Path | str, is_ours: Callable[[Path], bool], *, seal: str | None = None
) -> Iterator[Path]:
    """Gives an empty folder to fill; when the block ends without an error, it becomes `path`.

    A kill at any moment leaves at `path` the old folder, nothing, or the whole new one. What a killed process
    has left beside it is removed by the next use.

    is_ours: whether an existing folder is an earlier output, which may be replaced. Other folders, unless
        empty, are refused, so that `--output-dir ~` costs nobody their files.
    seal: the file without which such a folder does not load. It is the first to go when a folder is removed, so
        that a kill in the midst of that leaves nothing that loads.
    Raises ConfigError, naming the path, when it cannot be written (an OSError of the block included) or must not be
    replaced.
    """
    target = Path(os.path.realpath(path))
    _check_replaceable(target, is_ours)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(target, seal)
        temporary, lock = _make_temporary(target)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None
    try:
        yield temporary
        _sync_tree(temporary)
        _check_replaceable(target, is_ours)
        _move_into_place(temporary, target, seal)
    except OSError as error:
        raise ConfigError(_what_failed(error, path, temporary)) from error
    finally:
        _remove(temporary, seal)
        os.close(lock)


def _what_failed(error: OSError, path: Path | str, temporary: Path) -> str:
    """Of an error while `temporary` was filled to become `path`: which file, and whether it was to be written or only read."""
    if error.filename2 is not None:  # a copy that broke off
        return f"{error.filename2}: cannot be written: {error.strerror}"
    where = Path(str(error.filename or path))
    read = error.filename and where != temporary.parent and not where.is_relative_to(temporary)
    return f"{where}: cannot be {'read' if read else 'written'}: {error.strerror}"


def _check_replaceable(target: Path, is_ours: Callable[[Path], bool]) -> None:
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise ConfigError(f"{target}: exists and is not a folder; choose another output folder")
    if os.path.ismount(target):
        raise ConfigError(f"{target}: is a mount point, which cannot be replaced; choose a folder inside it")
    if os.path.samefile(target, "."):  # whoever stands in it would be left in a folder that has been removed
        raise ConfigError(
            f"{target}: is the current folder, which cannot be replaced; call trtc from outside it"
        )
    try:
        replaceable = not any(target.iterdir()) or is_ours(target)
    except OSError as error:
        raise ConfigError(f"{target}: cannot be read: {error.strerror}") from None
    if not replaceable:
        raise ConfigError(
            f"{target}: exists and is not an output of trtc; choose another folder or remove it"
        )


# A live process holds a lock on its temporary folder. Process ids would not do: another container may share
# the disk.


def _make_temporary(target: Path) -> tuple[Path, int]:
    """(new folder beside `target`, open file descriptor that keeps it locked)."""
    while True:
        temporary = target.parent / f".{target.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}"
        temporary.mkdir()
        try:
            lock = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # another process took it for a stale one before it was locked
        fcntl.flock(lock, fcntl.LOCK_EX)
        if temporary.exists():
            return temporary, lock
        os.close(lock)


def _remove(folder: Path, seal: str | None) -> None:
    """As far as this process may: what stands at the target is whole, whatever is left of the old folder beside it."""
    if seal is not None:
        with suppress(OSError):
            (folder / seal).unlink()
    shutil.rmtree(folder, ignore_errors=True)


def _remove_stale(target: Path, seal: str | None) -> None:
    pattern = re.compile(rf"\.{re.escape(target.name)}\.tmp-\d+-[0-9a-f]{{8}}")
    for entry in target.parent.iterdir():
        if (
            pattern.fullmatch(entry.name)
            and entry.is_dir()
            and not entry.is_symlink()
            and not _is_locked(entry)
        ):
            _remove(entry, seal)


def _is_locked(folder: Path) -> bool:
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return True  # not ours to open, or its owner has just removed or moved it
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _sync_tree(folder: Path) -> None:
    """Flushes all files and folders below `folder` to the disk, so that a power cut cannot leave empty
    files.
    """
    for root, _, names in os.walk(folder):
        for name in names:
            _sync(Path(root, name))
        _sync(Path(root))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move_into_place(temporary: Path, target: Path, seal: str | None) -> None:
    """Afterwards `target` is the new folder, and `temporary` the old one or nothing."""
    if not target.exists():
        os.rename(temporary, target)
    elif not _exchange(temporary, target):
        _replace_in_two_steps(temporary, target, seal)
    _sync(target.parent)


def _exchange(first: Path, second: Path) -> bool:
    """Swaps two folders in one step; False where the C library or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    paths = (os.fsencode(first), os.fsencode(second))
    return bool(renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], ctypes.c_uint(_RENAME_EXCHANGE)) == 0)


def _replace_in_two_steps(temporary: Path, target: Path, seal: str | None) -> None:
    """Between the two renames nothing is at `target`; the old folder then has the name of a temporary one."""
    aside = target.parent / f".{target.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}"
    os.rename(target, aside)
    os.rename(temporary, target)
    _remove(aside, seal)
