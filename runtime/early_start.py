"""What loading an engine can begin with while torch is still being imported. Imports nothing heavy."""

from __future__ import annotations

from contextlib import suppress
from os import PathLike

from ..core.engine_files import EngineFiles, processors
from ..kernels import launch
from ..kernels.errors import DeviceError
from .placement import placement
from .weight_loading import EarlyWeights


class BegunEngine(EngineFiles):
    """An engine directory of which one process runs all: files are being compared and, for target cuda, weights are on their
    way to the GPU, in threads."""

    def __init__(self, folder: str | PathLike[str], *, verify: bool = True) -> None:
        # Half of the processors: with all of them the import of torch takes a second longer.
        super().__init__(folder, verify=verify, threads=max(1, processors() // 2))
        self.weights = self._early_weights()

    def _early_weights(self) -> EarlyWeights | None:
        paths = self.weight_files(0)
        if self.target != "cuda" or not paths:
            return None
        with suppress(DeviceError):  # the executor says what is missing
            launch.bindings()  # here, not in a thread: torch imports from this package too
            return EarlyWeights(paths)
        return None


def begin_loading(engine_dir: str | PathLike[str], *, verify: bool = True) -> str | PathLike[str]:
    """What to give `LLM` or `load_executor` as their engine directory: a `BegunEngine`.

    In a job of several ranks it is `engine_dir` itself: which GPU is whose is known when all ranks have met.
    Raises EngineError when the directory is none of an engine, or files are missing or of another size.
    """
    return engine_dir if placement().size > 1 else BegunEngine(engine_dir, verify=verify)
