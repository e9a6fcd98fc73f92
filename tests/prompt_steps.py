"""Steps with prompts of engines of target `cuda` on a GPU, as CUDA graphs and launched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from trtc.runtime.load import load_executor
from trtc.runtime.prompt_rows import PromptRows, launch_prompts, send

from .engine_steps import TOKENS, step_input
from .packed_steps import Inputs, PagedSequences
from .tolerances import max_error

STEPS = (
    {"a": TOKENS[:40]},
    {"b": TOKENS[:7], "c": TOKENS[10:43]},
    {"a": [7], "b": [9], "d": TOKENS[3:30]},
    {"d": [2], "a": TOKENS[:25], "c": [3, 4], "e": [5]},
    {"a": [1], "b": [2], "c": [3], "d": [4], "e": [5], "f": TOKENS[:60]},
    {"b": TOKENS[5:60], "g": TOKENS[:9], "h": TOKENS[1:40]},
)
"""Steps with prompts alone and together, continued, and beside sequences that decode."""


def check_prompt_graphs(
    engine: Path,
    reference: Callable[[int, int], Callable[[Inputs], torch.Tensor]],
    tolerance: Callable[[torch.Tensor], float],
) -> None:
    """From CUDA graphs, and launched: logits are within `tolerance` of the reference's, and in the cache only the slots of the
    step's tokens change.

    engine: of max_batch_size 8 or more; reference: (page size, pages) -> what computes a step's logits.
    """
    for replays in (True, False):
        executor: Any = load_executor(engine)
        while executor.prepare():
            pass
        assert not cache_bytes(executor).any(), "capturing wrote to the cache"
        paged = PagedSequences(executor.page_size, executor.num_pages)
        expect = reference(executor.page_size, executor.num_pages)
        for work in STEPS:
            inputs = paged.step(work, last_rows_only=True)
            rows, before = PromptRows.of(step_input(inputs)), cache_bytes(executor)
            if replays:
                logits = executor._prompts.run(rows)
                assert logits is not None, "launched"
            else:
                logits = launch_prompts(executor._program, send(rows, executor._device))
            expected = expect(inputs)
            error = max_error(logits.cpu(), expected)
            assert error <= tolerance(expected), f"replayed: {replays}, step {work}: {error}"
            changed = (cache_bytes(executor) != before).any(-1).any(0).nonzero().tolist()
            assert set(map(tuple, changed)) == written_slots(inputs, executor.page_size)
        executor.close()


def cache_bytes(executor: Any) -> torch.Tensor:
    """[layers * 2, pages, page size, bytes of a token] of the cache of target `cuda`."""
    parts = [part for layer in executor._cache for part in layer]
    return torch.stack([part.transpose(1, 2).flatten(2).contiguous().view(torch.uint8) for part in parts])


def written_slots(inputs: Inputs, page_size: int) -> set[tuple[int, int]]:
    """(page, slot) of every token of a step."""
    owner = torch.repeat_interleave(inputs["query_start"].diff())
    positions = inputs["positions"].long()
    pages = inputs["page_table"][owner, positions // page_size]
    return set(zip(pages.tolist(), (positions % page_size).tolist(), strict=True))
