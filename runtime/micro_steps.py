"""A step as several smaller ones, so that the stages of a pipeline work at the same time."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from .step_input import StepInput


def split(step: StepInput, count: int) -> list[StepInput]:
    """`step` as `count` steps of nearly equally many tokens. Run in this order, they do what it does: a sequence that lies
    in several of them is taken in chunks, as the scheduler takes long prompts. Their logits, in order, are the step's.
    """
    if count == 1:
        return [step]
    bounds = np.linspace(0, step.num_tokens, count + 1).astype(np.int32)
    return [_rows(step, start, stop) for start, stop in pairwise(bounds)]


def _rows(step: StepInput, start: np.int32, stop: np.int32) -> StepInput:
    """The tokens [start, stop) of a step."""
    first, last = (np.clip(side, start, stop) for side in (step.query_start[:-1], step.query_start[1:]))
    present = last > first
    query_start = np.zeros(present.sum() + 1, np.int32)
    np.cumsum((last - first)[present], out=query_start[1:])
    to_come = step.query_start[1:] - last
    index = step.logits_index
    return StepInput(
        token_ids=step.token_ids[start:stop],
        positions=step.positions[start:stop],
        query_start=query_start,
        kv_length=(step.kv_length - to_come)[present],
        page_table=step.page_table[present],
        logits_index=index[(start <= index) & (index < stop)] - start,
    )
