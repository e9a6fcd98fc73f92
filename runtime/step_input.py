"""The arrays that go into an engine step."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

from .batch import Batch

Int32Array = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class StepInput:
    """Packed tokens of B sequences, T tokens in all: int32 arrays, contiguous, named as the graph's inputs.

    token_ids:    [T]      sequence after sequence
    positions:    [T]      0 for the first token of a sequence
    query_start:  [B+1]    where each sequence begins in T; the last entry is T
    kv_length:    [B]      tokens in the cache after this step, the new ones included
    page_table:   [B, P]   page ids in the order of the sequence, -1 where unused
    logits_index: [R]      rows of T for which logits are wanted, ascending; R may be 0
    """

    token_ids: Int32Array
    positions: Int32Array
    query_start: Int32Array
    kv_length: Int32Array
    page_table: Int32Array
    logits_index: Int32Array

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_sequences(self) -> int:
        return len(self.kv_length)

    @classmethod
    def from_batch(cls, batch: Batch) -> StepInput:
        """Copies what the step needs out of a batch that is not empty."""
        parts = batch.scheduled
        assert parts, "an empty batch has no step input"
        query_start = np.zeros(len(parts) + 1, np.int32)
        ends = [part.end + len(part.draft) for part in parts]
        query_start[1:] = np.cumsum([end - part.first for part, end in zip(parts, ends, strict=True)])
        slices = (part.token_ids for part in parts)
        positions = [
            np.arange(part.first, end, dtype=np.int32) for part, end in zip(parts, ends, strict=True)
        ]
        rows = [
            np.arange(stop - part.num_rows, stop, dtype=np.int32)
            for part, stop in zip(parts, query_start[1:], strict=True)
        ]
        return cls(
            token_ids=np.fromiter(chain.from_iterable(slices), np.int32, count=query_start[-1]),
            positions=np.concatenate(positions),
            query_start=query_start,
            kv_length=np.array(ends, np.int32),
            page_table=_page_table([part.request.page_ids for part in parts]),
            logits_index=np.concatenate(rows),
        )


def _page_table(pages: list[list[int]]) -> Int32Array:
    table = np.full((len(pages), max(map(len, pages))), -1, np.int32)
    for row, page_ids in zip(table, pages, strict=True):
        row[: len(page_ids)] = page_ids
    return table
