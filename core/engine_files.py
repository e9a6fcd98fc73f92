"""The files of an engine directory: engine.json, and whether the others are those that it describes.

Imports nothing heavy, so that files can be compared while torch is being imported: see `EngineFiles`.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from .. import __version__
from .errors import EngineError
from .strict_json import read_object

FORMAT = "trtc-engine"
FORMAT_VERSION = 1
DESCRIPTION = "engine.json"
_KEYS = {"format", "format_version", "trtc_version", "model", "build", "ranks", "files", "digest"}
_HASH_BLOCK = 32 << 20
"""Large: each thread takes the interpreter from the one that imports modules twice a block."""


class EngineFiles:
    """An engine directory whose files are compared with engine.json, in threads, while its owner does other things.

    A path: what takes an engine directory takes this too, and waits for the comparison at most.
    folder:      the directory
    description: the content of engine.json, which is sound
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        verify: bool = True,
        rank: int | None = None,
        threads: int | None = None,
    ) -> None:
        """Reads engine.json, compares the sizes of files and starts to compare their sha256.

        verify:  compare sha256
        rank:    check only the files of this rank and of all ranks, and with rank 0 those of no rank
        threads: hash in so many until somebody waits for the result; None: in as many as there are processors
        Raises EngineError naming the file and the reason.
        """
        self.folder = Path(folder)
        self.description = _read_description(self.folder)
        files = self.description["files"]
        try:
            self._expected = {
                name: str(entry["sha256"])
                for name, entry in files.items()
                if rank is None or _needed_by(name, rank)
            }
            for name in self._expected:
                if os.path.basename(name) != name:
                    raise KeyError(name)
                _check_size(self.folder / name, files[name]["bytes"])
        except (KeyError, TypeError, AttributeError) as error:
            where = self.folder / DESCRIPTION
            raise EngineError(f"{where}: not an engine of this format: {error!r} in files") from None
        self._hashing = _Hashing(self.folder, self._expected if verify else ())
        self._hashing.start(processors() if threads is None else threads)
        weakref.finalize(self, self._hashing.end)

    def __fspath__(self) -> str:
        return str(self.folder)

    def weight_files(self, rank: int) -> list[Path]:
        """The files with the weights of `rank`, as far as engine.json says so."""
        try:
            return [self.folder / name for name in self.description["ranks"][rank]["weights"]]
        except (LookupError, TypeError):
            return []

    @property
    def num_ranks(self) -> int:
        """Raises EngineError where engine.json holds no ranks."""
        ranks = self.description["ranks"]
        if not isinstance(ranks, list) or not ranks:
            raise EngineError(f"{self.folder / DESCRIPTION}: not an engine of this format: no list of ranks")
        return len(ranks)

    @property
    def target(self) -> object:
        """The target that the engine was built for, if engine.json says it where it should."""
        build = self.description["build"]
        return build.get("target") if isinstance(build, dict) else None

    def wait(self) -> None:
        """Returns when all is compared. Raises EngineError naming the first file that is damaged."""
        self._hashing.start(processors())
        for name, digest in self._hashing.digests.items():
            path = self.folder / name
            try:
                found = digest.result()
            except OSError as error:
                raise EngineError(f"{path}: cannot be read: {error.strerror}") from None
            if found != self._expected[name]:
                raise EngineError(f"{path}: content does not match its sha256: the file is damaged")


def processors() -> int:
    """As many as this process may use."""
    return len(os.sched_getaffinity(0))


def is_engine(path: Path) -> bool:
    """Whether `path` looks like an engine directory (whole or not): what a build may replace."""
    try:
        return read_object(path / DESCRIPTION, EngineError).get("format") == FORMAT
    except EngineError:
        return False


def write_description(folder: Path, data: Mapping[str, Any]) -> None:
    """Writes `data`, of which it adds the digest, as engine.json."""
    (folder / DESCRIPTION).write_text(_text({**data, "digest": _digest(data)}))


def sha256(path: Path, stopped: Callable[[], bool] = lambda: False) -> str:
    """Hex digest of a file, as sha256sum prints it; of a part of it when it is `stopped`."""
    state = hashlib.sha256()
    # Memory that nobody has to fill with zeros while other threads cannot run.
    with (
        path.open("rb", buffering=0) as file,
        mmap.mmap(-1, min(_HASH_BLOCK, max(1, path.stat().st_size))) as block,
        memoryview(block) as view,
    ):
        while (count := file.readinto(view)) and not stopped():
            with view[:count] as read:
                state.update(read)
    return state.hexdigest()


class _Hashing:
    """Files being hashed in threads. These do not know of the `EngineFiles` that they work for, which could not end then."""

    def __init__(self, folder: Path, names: Iterable[str]) -> None:
        self.digests: dict[str, Future[str]] = {name: Future() for name in names}
        self._folder = folder
        self._waiting = deque(self.digests.items())
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self, threads: int) -> None:
        """Lets so many threads work, if there is work for them."""
        for _ in range(min(threads - len(self._threads), len(self._waiting))):
            self._threads.append(threading.Thread(target=self._work, name="sha256", daemon=True))
            self._threads[-1].start()

    def end(self) -> None:
        """Threads end at the next block."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while not self._stop.is_set():
            try:
                name, digest = self._waiting.popleft()
            except IndexError:  # the other threads had the rest
                return
            try:
                digest.set_result(sha256(self._folder / name, self._stop.is_set))
            except (OSError, MemoryError) as error:  # `wait` raises it
                digest.set_exception(error)
            finally:
                digest.cancel()  # nobody waits for ever for what failed in another way


def _text(data: Mapping[str, Any]) -> str:
    return json.dumps(data, separators=(",", ":")) + "\n"


def _digest(data: Mapping[str, Any]) -> str:
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION
    if not folder.is_dir():
        raise EngineError(f"{folder}: no such folder; `trtc build` makes an engine directory")
    if not path.is_file():
        raise EngineError(
            f"{folder}: not an engine directory: it has no {DESCRIPTION}; `trtc build` makes one"
        )
    data = read_object(path, EngineError)
    if data.get("format") != FORMAT:
        raise EngineError(f"{path}: format is {data.get('format')!r}, not {FORMAT!r}: not an engine of trtc")
    if data.get("format_version") != FORMAT_VERSION:
        raise EngineError(
            f"{path}: written by trtc {data.get('trtc_version', '(unknown)')} in engine format "
            f"{data.get('format_version')!r}; this is trtc {__version__}, which reads format {FORMAT_VERSION}; "
            f"build the engine again"
        )
    if data.keys() != _KEYS:
        raise EngineError(f"{path}: keys are {sorted(data)}, expected {sorted(_KEYS)}")
    # Compared as text too: `1E-05` for `1e-05`, or another last digit, can be the same value.
    if path.read_bytes() != _text(data).encode() or data.pop("digest") != _digest(data):
        raise EngineError(f"{path}: content does not match its digest: the file was damaged or edited")
    return data


def _needed_by(name: str, rank: int) -> bool:
    """Whether a rank needs a file; what belongs to no rank is rank 0's."""
    found = re.match(r"rank(\d+)[-.]", name)
    return name.startswith("kernels.") or rank == (int(found[1]) if found else 0)


def _check_size(path: Path, expected: int) -> None:
    if not path.is_file():
        raise EngineError(f"{path}: file of the engine is missing")
    if path.stat().st_size != expected:
        raise EngineError(
            f"{path}: has {path.stat().st_size} bytes, expected {expected}: truncated or replaced"
        )
