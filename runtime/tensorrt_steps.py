"""Packed steps -> the padded batches that a TensorRT plan takes.

The KV memory of a plan is `num_slots` rows, each one block of `capacity` tokens; to the scheduler a row is a page that
holds a whole sequence, so page ids are rows. A padded batch takes neighbouring rows, and writes S tokens to every one of
them, its padding included: nothing may be written beyond a row's end, and what is written to a row that is not part of
the step must lie behind the tokens of its sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from .step_input import Int32Array, StepInput

DECODE, PREFILL = "decode", "prefill"


@dataclass(frozen=True)
class Limits:
    """Sizes that the plan has kernels for: B of decode batches; B, S of prefill batches; and tokens of a KV row."""

    decode_rows: int
    prefill_rows: int
    prefill_tokens: int
    capacity: int


@dataclass(frozen=True, eq=False)
class PaddedBatch:
    """One execution of the plan, over the KV rows first_row ... first_row + B - 1.

    token_ids, positions: [B, S] int32    past_length: [B] int32    logits_index: [R] int32, of the flattened [B * S]
    results: where in the step's logits the first of these R rows belong; the others are not wanted
    """

    profile: str
    first_row: int
    token_ids: Int32Array
    positions: Int32Array
    past_length: Int32Array
    logits_index: Int32Array
    results: Int32Array

    @property
    def inputs(self) -> Mapping[str, Int32Array]:
        """The plan's inputs that change from step to step, by name."""
        return {
            "token_ids": self.token_ids,
            "positions": self.positions,
            "past_length": self.past_length,
            "logits_index": self.logits_index,
        }

    @property
    def cache_rows(self) -> slice:
        """The part of the KV memory that the plan sees."""
        return slice(self.first_row, self.first_row + len(self.past_length))


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """One execution of a plan over pages: a step as it is, or with a part of the rows that it wants.

    inputs: those of StepInput    results: as in PaddedBatch
    """

    profile: str
    inputs: Mapping[str, Int32Array]
    results: Int32Array
    cache_rows: slice = field(default_factory=lambda: slice(None))


def packed_batches(step: StepInput, max_rows: int, pages_per_seq: int) -> Iterator[PackedBatch]:
    """The step, again with the same tokens for wanted rows beyond the `max_rows` that the plan takes.

    The page table is widened to `pages_per_seq`, so that shapes repeat; -1 is never looked at.
    """
    decodes = step.num_tokens == step.num_sequences == len(step.logits_index)
    table = np.full((step.num_sequences, pages_per_seq), -1, np.int32)
    table[:, : step.page_table.shape[1]] = step.page_table
    for first in range(0, max(len(step.logits_index), 1), max_rows):
        index = step.logits_index[first : first + max_rows]
        results = np.arange(first, first + len(index), dtype=np.int32)
        wanted = index if len(index) else np.zeros(1, np.int32)
        inputs = {
            "token_ids": step.token_ids,
            "positions": step.positions,
            "query_start": step.query_start,
            "kv_length": step.kv_length,
            "page_table": table,
            "logits_index": wanted,
        }
        yield PackedBatch(DECODE if decodes else PREFILL, inputs, results)


@dataclass(frozen=True, eq=False)
class _Piece:
    """New tokens of one sequence that run at once. `wanted`: (offset in the piece, row of the step's logits)."""

    slot: int
    past: int
    token_ids: Int32Array
    wanted: tuple[tuple[int, int], ...]


class StepPadder:
    """Makes the batches of each step, and keeps the length of the sequence in every row."""

    def __init__(self, limits: Limits, num_slots: int) -> None:
        self._limits = limits
        self._lengths = np.zeros(num_slots, np.int32)

    def batches(self, step: StepInput) -> Iterator[PaddedBatch]:
        """What to execute, in this order, for `step`. Decodes run together, prompts with their neighbours."""
        pieces = [list(self._pieces(step, i)) for i in range(step.num_sequences)]
        decodes = [one[0] for one in pieces if len(one) == 1 and len(one[0].token_ids) == 1]
        if decodes:
            self._take(decodes)
            yield from self._decode(decodes)
        prompts = [one for one in pieces if len(one) > 1 or len(one[0].token_ids) > 1]
        for wave in range(max(map(len, prompts), default=0)):
            now = sorted((one[wave] for one in prompts if wave < len(one)), key=lambda piece: piece.slot)
            self._take(now)
            for run in self._runs(now):
                yield from self._padded(PREFILL, run[0].slot, run)

    def _take(self, pieces: Sequence[_Piece]) -> None:
        for piece in pieces:
            self._lengths[piece.slot] = piece.past + len(piece.token_ids)

    def _pieces(self, step: StepInput, sequence: int) -> Iterator[_Piece]:
        """The new tokens of a sequence in parts that a prefill batch takes: a resumed prompt can be longer."""
        start, stop = (int(row) for row in step.query_start[sequence : sequence + 2])
        length, slot = int(step.kv_length[sequence]), int(step.page_table[sequence, 0])
        rows = [(int(row), result) for result, row in enumerate(step.logits_index) if start <= row < stop]
        for first in range(start, stop, self._limits.prefill_tokens):
            last = min(first + self._limits.prefill_tokens, stop)
            wanted = tuple((row - first, result) for row, result in rows if first <= row < last)
            yield _Piece(slot, length - (stop - first), step.token_ids[first:last], wanted)

    def _decode(self, pieces: Sequence[_Piece]) -> Iterator[PaddedBatch]:
        """One batch from row 0 on, to the last row that decodes and then to a power of two: few shapes, that repeat."""
        by_slot = {piece.slot: piece for piece in pieces}
        rows = min(1 << max(by_slot).bit_length(), len(self._lengths))
        assert rows <= self._limits.decode_rows
        run = [by_slot.get(slot) or self._idle(slot) for slot in range(rows)]
        yield from self._padded(DECODE, 0, run)

    def _idle(self, slot: int) -> _Piece:
        """One padding token behind the row's sequence. A sequence that fills its row has ended."""
        length = int(self._lengths[slot])
        past = length if length < self._limits.capacity else 0
        return _Piece(slot, past, np.zeros(1, np.int32), ())

    def _runs(self, pieces: Sequence[_Piece]) -> Iterator[list[_Piece]]:
        """Neighbouring rows that fit one batch and, padded to its longest, their own ends."""
        run: list[_Piece] = []
        for piece in pieces:
            longer = [*run, piece]
            width = max(len(one.token_ids) for one in longer)
            fits = all(one.past + width <= self._limits.capacity for one in longer)
            if run and (
                piece.slot != run[-1].slot + 1 or not fits or len(longer) > self._limits.prefill_rows
            ):
                yield run
                longer = [piece]
            run = longer
        if run:
            yield run

    def _padded(self, profile: str, first_row: int, run: Sequence[_Piece]) -> Iterator[PaddedBatch]:
        """The batch of a run; again with the same tokens for wanted rows beyond the B that the profile takes."""
        width = max(len(piece.token_ids) for piece in run)
        token_ids, positions = np.zeros((2, len(run), width), np.int32)
        for row, piece in enumerate(run):
            count = len(piece.token_ids)
            token_ids[row, :count] = piece.token_ids
            positions[row, :count] = np.arange(piece.past, piece.past + count)
        past = np.array([piece.past for piece in run], np.int32)
        wanted = [(row * width + at, result) for row, piece in enumerate(run) for at, result in piece.wanted]
        limit = self._limits.decode_rows if profile == DECODE else self._limits.prefill_rows
        for first in range(0, max(len(wanted), 1), limit):
            part = wanted[first : first + limit]
            count = (
                len(run) if profile == DECODE else max(len(part), 1)
            )  # of a decode always as many, to repeat
            index = np.zeros(count, np.int32)
            index[: len(part)] = [row for row, _ in part]
            results = np.array([result for _, result in part], np.int32)
            yield PaddedBatch(profile, first_row, token_ids, positions, past, index, results)
