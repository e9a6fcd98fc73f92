"""Python's cyclic garbage collector in processes of trtc's own: what it need not look through, and when it need not look.

It goes through every object that can be part of a cycle, some 200,000 of them once torch is imported, which takes 35 to 70 ms;
while many requests come, the device waits for that.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collection() -> Iterator[None]:
    """No collection within: importing makes many objects and hardly any garbage. (`import torch` here: 1.18 s, so 0.97 s.)"""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def keep_heap(*, collect: bool = True) -> None:
    """Everything that there is now stays, unseen by later collections: modules, an engine. For a process of trtc's own, once it
    has loaded what it needs; a library must not decide this for its user.

    collect: look for garbage first
    """
    if collect:
        gc.collect()
    gc.freeze()
