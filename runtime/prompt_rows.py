"""Steps with prompts as `CudaProgram.prefill` takes them, on their way to the GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch

from ..core.targets.cuda.program import ContextRows, CudaProgram, DecodeRows
from .graph_loop import TakenOver
from .step_input import Int32Array, StepInput

_ALIGNMENT = 4
"""int32 values in 16 bytes, which kernels want tensors aligned to."""


_MEAN_TOKENS = 32
"""Of the prompts of a step, which runs in a larger bucket where they are shorter."""


class Bucket(NamedTuple):
    """Sizes that a step is padded to.

    rows: tokens, of which the first `decodes` are for sequences with one new token each.
    """

    rows: int
    decodes: int

    @property
    def sequences(self) -> int:
        """Those with several new tokens that it has room for."""
        return self.rows // _MEAN_TOKENS

    @property
    def logits(self) -> int:
        """Rows whose logits are computed: one a sequence."""
        return self.decodes + self.sequences

    def holds(self, rows: PromptRows) -> bool:
        decodes, tokens = len(rows.decode_length), len(rows.token_ids)
        return (
            decodes <= self.decodes
            and tokens - decodes <= self.rows - self.decodes
            and len(rows.kv_length) <= self.sequences
            and len(rows.logits_index) <= self.logits
        )


class PromptRows(NamedTuple):
    """A step whose first sequences, all before the first one with several new tokens, are taken as those that decode. int32.

    token_ids:     [T]     positions: [T]
    logits_index:  [R]     as in `StepInput`
    decode_length: [D]     kv_length of sequences with one new token, which have the first D tokens; decode_pages: [D, P]
    query_start:   [B+1]   of the other sequences, counted from token D on; kv_length: [B]; page_table: [B, P]
    """

    token_ids: Int32Array
    positions: Int32Array
    logits_index: Int32Array
    decode_length: Int32Array
    decode_pages: Int32Array
    query_start: Int32Array
    kv_length: Int32Array
    page_table: Int32Array

    @classmethod
    def of(cls, step: StepInput) -> PromptRows:
        several = np.flatnonzero(np.diff(step.query_start) > 1)
        decodes = int(several[0]) if len(several) else step.num_sequences
        return cls(
            step.token_ids,
            step.positions,
            step.logits_index,
            step.kv_length[:decodes],
            step.page_table[:decodes],
            step.query_start[decodes:] - decodes,
            step.kv_length[decodes:],
            step.page_table[decodes:],
        )

    @classmethod
    def none(cls) -> PromptRows:
        """A step of no sequences."""
        shapes: list[tuple[int, ...]] = [(0,), (0,), (0,), (0,), (0, 0), (1,), (0,), (0, 0)]
        return cls(*(np.zeros(shape, np.int32) for shape in shapes))

    def padded(self, bucket: Bucket, pages: int) -> PromptRows:
        """The same step in the sizes of a bucket that holds it; P becomes `pages`.

        Unused sequences have length 0, and those of prompts no tokens either: nothing of them is written to the cache. Tokens
        beyond those in use, between those that decode and the others and at the end, belong to nobody; they go through layers
        that work row by row. Logits beyond those wanted are those of row 0.
        """
        decodes, unused = len(self.decode_length), bucket.decodes - len(self.decode_length)
        logits_index = self.logits_index + unused * (self.logits_index >= decodes)
        query_start = np.full(bucket.sequences + 1, self.query_start[-1])
        query_start[: len(self.query_start)] = self.query_start

        def apart(tokens: Int32Array) -> Int32Array:
            made = np.zeros(bucket.rows, np.int32)
            made[:decodes] = tokens[:decodes]
            made[bucket.decodes : unused + len(tokens)] = tokens[decodes:]
            return made

        return PromptRows(
            apart(self.token_ids),
            apart(self.positions),
            _grown(logits_index, bucket.logits),
            _grown(self.decode_length, bucket.decodes),
            _grown(self.decode_pages, bucket.decodes, pages),
            query_start,
            _grown(self.kv_length, bucket.sequences),
            _grown(self.page_table, bucket.sequences, pages),
        )


def _grown(array: Int32Array, *shape: int) -> Int32Array:
    """`array` with zeros behind it, along all its axes."""
    made = np.zeros(shape, np.int32)
    made[tuple(slice(size) for size in array.shape)] = array
    return made


def flat_starts(arrays: Sequence[Int32Array]) -> list[int]:
    """Where each of the arrays begins when they lie in one, aligned as kernels want it; the last entry is where they end."""
    return [0, *accumulate(-(-array.size // _ALIGNMENT) * _ALIGNMENT for array in arrays)]


def send(
    arrays: Sequence[Int32Array], device: torch.device, room: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """The arrays on the GPU, by one copy. room: int32 there for `flat_starts(arrays)[-1]` values, to put them in."""
    *starts, end = flat_starts(arrays)
    host = torch.empty(end, dtype=torch.int32, pin_memory=True)
    flat = host.numpy()
    for start, array in zip(starts, arrays, strict=True):
        flat[start : start + array.size] = array.reshape(-1)
    sent = host.to(device, non_blocking=True) if room is None else room.copy_(host, non_blocking=True)
    return [
        sent[start : start + array.size].view(array.shape)
        for start, array in zip(starts, arrays, strict=True)
    ]


def launch_prompts(
    program: CudaProgram,
    sent: Sequence[torch.Tensor],
    before: TakenOver | None = None,
    received: Mapping[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Runs a step whose `PromptRows` have been sent; returns what `CudaProgram.prefill` does.

    before: tokens that only the device knows. received: what a stage of a pipeline takes beyond a step.
    """
    token_ids, positions, logits_index, decode_length, decode_pages, *context = sent
    if before is not None:
        token_ids[before[0]] = before[1]
    inputs = {
        "token_ids": token_ids,
        "positions": positions,
        "logits_index": logits_index,
        **(received or {}),
    }
    decode = DecodeRows(decode_length, decode_pages, early=False) if len(decode_length) else None
    rest = ContextRows(*context) if len(context[1]) else None
    return program.prefill(inputs, decode, rest)
