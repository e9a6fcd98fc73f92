"""trtc: compiles a Hugging Face transformer checkpoint into an engine and runs it.

    from trtc import LLM, SamplingParams

    with LLM("engine-dir") as llm:
        print(llm.generate("The news of today:", SamplingParams(max_tokens=32, temperature=0))[0].outputs[0].text)

`trtc build` makes the engine directory. Plugin authors start at docs/plugins.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "RequestOutput",
    "SamplingParams",
    "TrtcError",
    "__version__",
]

if TYPE_CHECKING:
    from .core.errors import TrtcError
    from .runtime.async_llm import AsyncLLM
    from .runtime.llm import LLM
    from .runtime.outputs import CompletionOutput, RequestOutput
    from .runtime.sampling_params import SamplingParams

_HOMES = {
    "LLM": ".runtime.llm",
    "AsyncLLM": ".runtime.async_llm",
    "SamplingParams": ".runtime.sampling_params",
    "RequestOutput": ".runtime.outputs",
    "CompletionOutput": ".runtime.outputs",
    "TrtcError": ".core.errors",
}


def __getattr__(name: str) -> Any:
    """Public names, imported when first used, so that `trtc --help` does not pay for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    """With the public names that are not imported yet, for whoever completes what they type."""
    return sorted({*globals(), *_HOMES})
