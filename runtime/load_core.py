"""Engine directory -> EngineCore, and the options that all who load an engine take."""

from __future__ import annotations

from collections.abc import Iterable
from os import PathLike
from typing import TypedDict

from .engine_core import EngineCore
from .load import load_executor
from .prompt_lookup import PromptLookup
from .tokenizer import Tokenizer


class LoadOptions(TypedDict, total=False):
    """Keywords of `load_executor`, which says what they mean."""

    num_pages: int | None
    kv_cache_memory_bytes: int | None
    verify: bool


class CoreOptions(TypedDict, total=False):
    """Keywords of `EngineCore` that do not depend on where its executor comes from.

    seed:                of the stream from which requests without a seed draw theirs
    enable_prefix_cache: a prompt starts behind what an earlier one with the same beginning has left in the KV cache
    prompt_lookup:       for greedy requests that ask for nothing else
    """

    seed: int
    enable_prefix_cache: bool
    prompt_lookup: PromptLookup | None


class EngineOptions(LoadOptions, CoreOptions, total=False):
    """Keywords of `load_core`, which has the defaults, and of all who hand them on to it: `LLM`, `AsyncLLM`, `Worker`."""


def check_keywords(caller: str, given: Iterable[str], *others: str) -> None:
    """Raises TypeError for the first keyword given to `caller` that EngineOptions does not have; others: what else it takes."""
    accepted = ", ".join(["engine_dir", *others, *EngineOptions.__annotations__])
    for name in given:
        if name not in EngineOptions.__annotations__:
            raise TypeError(
                f"{caller}() has no argument {name!r}; accepted: {accepted}. Data types, lengths and ranks are chosen when an "
                "engine is built (trtc build); ranks are started by trtc run --nproc or mpirun"
            )


def load_core(
    engine_dir: str | PathLike[str],
    *,
    num_pages: int | None = None,
    kv_cache_memory_bytes: int | None = None,
    verify: bool = True,
    seed: int = 0,
    enable_prefix_cache: bool = True,
    prompt_lookup: PromptLookup | None = None,
) -> EngineCore:
    """What runs requests on an engine directory, with its tokenizer. Raises what `load_executor` and `EngineCore` raise."""
    executor = load_executor(
        engine_dir, num_pages=num_pages, kv_cache_memory_bytes=kv_cache_memory_bytes, verify=verify
    )
    try:
        return EngineCore(
            executor,
            Tokenizer.from_dir(engine_dir),
            seed=seed,
            enable_prefix_cache=enable_prefix_cache,
            prompt_lookup=prompt_lookup,
        )
    except BaseException:
        executor.close()
        raise
