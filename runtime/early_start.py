"""What loading an engine can begin with while torch is still being imported. Imports nothing heavy."""

from __future__ import annotations

from contextlib import suppress
from os import PathLike
from threading import Thread

from ..core.engine_files import EngineFiles
from ..kernels import launch
from ..kernels.errors import DeviceError
from .placement import placement


def begin_loading(engine_dir: str | PathLike[str], *, verify: bool = True) -> str | PathLike[str]:
    """What to give `LLM` or `load_executor` as their engine directory: in threads, its files are being compared and the GPU
    is being opened.

    In a job of several ranks it is `engine_dir` itself: which GPU is whose is known when all ranks have met.
    Raises EngineError when the directory is none of an engine, or files are missing or of another size.
    """
    if placement().size > 1:
        return engine_dir
    files = EngineFiles(engine_dir, verify=verify)
    if files.target == "cuda":
        _open_gpu()
    return files


def _open_gpu() -> None:
    """Makes the driver's context for the GPU in a thread. The driver lets other threads import modules meanwhile."""
    with suppress(DeviceError):  # the executor asks again, and says what is wrong
        launch.bindings()  # here, not there: torch imports from this package too
        Thread(target=_make_context, name="open-gpu").start()


def _make_context() -> None:
    with suppress(DeviceError):
        launch.primary_context()
