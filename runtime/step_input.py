"""The arrays that go into an engine step."""

from __future__ import annotations

from array import array
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
        firsts = np.array([part.first for part in parts], np.int32)
        ends = np.array([part.end + len(part.draft) for part in parts], np.int32)
        rows = np.array([part.num_rows for part in parts], np.int32)
        query_start = np.zeros(len(parts) + 1, np.int32)
        np.cumsum(ends - firsts, out=query_start[1:])
        token_ids = array("i")
        for part in parts:
            token_ids += part.token_ids
        return cls(
            token_ids=np.frombuffer(token_ids, np.int32),
            positions=_ranges(firsts, ends),
            query_start=query_start,
            kv_length=ends,
            page_table=_page_table([part.request.page_ids for part in parts]),
            logits_index=_ranges(query_start[1:] - rows, query_start[1:]),
        )


def _ranges(starts: Int32Array, stops: Int32Array) -> Int32Array:
    """start .. stop - 1 of each pair, one after the other."""
    counts = stops - starts
    before = np.cumsum(counts) - counts
    found: Int32Array = np.arange(counts.sum(), dtype=np.int32) + np.repeat(starts - before, counts).astype(
        np.int32
    )
    return found


def _page_table(pages: list[list[int]]) -> Int32Array:
    counts = np.array(list(map(len, pages)))
    table = np.full((len(pages), counts.max()), -1, np.int32)
    table[np.arange(counts.max()) < counts[:, None]] = list(chain.from_iterable(pages))
    return table
