"""Logits of whole sequences from an engine that serves nothing else meanwhile: the base of every score."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch

from ...core.errors import RequestError
from ..executor import Executor
from ..request_check import check_token_ids
from ..step_input import StepInput

STEP_TOKENS = 512
"""Tokens, and rows of logits, of one step: bounds the memory for logits on the device."""


@dataclass(frozen=True)
class Scored:
    """Token ids of one sequence, and the first of them whose row of logits is wanted; those of all after it are too."""

    token_ids: Sequence[int]
    first_row: int = 0


Part: TypeAlias = tuple[Scored, int, int, int]
"""A sequence, the part [first, end) of it that runs in a step, and the first of its cache pages."""


def sequence_logits(executor: Executor, sequences: Sequence[Scored]) -> Iterator[torch.Tensor]:
    """Logits [T - first_row, V] float32 of each sequence, in order; row i predicts the token after its own.

    Short sequences share steps, long ones take several. It uses the first pages of the cache.
    Raises RequestError for a sequence that is longer than the engine's, or has tokens that it does not know.
    """
    for sequence in sequences:
        if len(sequence.token_ids) > executor.max_seq_len:
            raise RequestError(
                f"a sequence of {len(sequence.token_ids)} tokens; the engine's max_seq_len is {executor.max_seq_len}"
            )
        check_token_ids(sequence.token_ids, executor.vocab_size)
    limit = min(STEP_TOKENS, executor.max_num_tokens)
    for group in _groups(executor, sequences, limit):
        if len(group) == 1:
            yield _alone(executor, group[0], limit)
        else:
            yield from _together(executor, group)


def _pages(executor: Executor, sequence: Scored) -> int:
    return -(-len(sequence.token_ids) // executor.page_size)


def _groups(executor: Executor, sequences: Sequence[Scored], limit: int) -> Iterator[list[Scored]]:
    """Neighbours that fit one step together; a sequence that is longer than a step is a group of its own."""
    group: list[Scored] = []
    tokens = pages = 0
    for sequence in sequences:
        count, wanted = len(sequence.token_ids), _pages(executor, sequence)
        full = len(group) == executor.max_batch_size or pages + wanted > executor.num_pages
        if group and (full or tokens + count > limit):
            yield group
            group, tokens, pages = [], 0, 0
        group.append(sequence)
        tokens, pages = tokens + count, pages + wanted
    if group:
        yield group


def _alone(executor: Executor, sequence: Scored, limit: int) -> torch.Tensor:
    total = len(sequence.token_ids)
    parts = [_execute(executor, [(sequence, i, min(i + limit, total), 0)]) for i in range(0, total, limit)]
    return torch.cat(parts)


def _together(executor: Executor, group: Sequence[Scored]) -> Iterator[torch.Tensor]:
    parts: list[Part] = []
    page = 0
    for sequence in group:
        parts.append((sequence, 0, len(sequence.token_ids), page))
        page += _pages(executor, sequence)
    rows = [len(sequence.token_ids) - sequence.first_row for sequence in group]
    yield from torch.split(_execute(executor, parts), rows)


def _execute(executor: Executor, parts: Sequence[Part]) -> torch.Tensor:
    """The rows of one step, all its parts after each other."""
    ends = [end for _, _, end, _ in parts]
    query_start = np.cumsum([0, *(end - first for _, first, end, _ in parts)], dtype=np.int32)
    page_table = np.full((len(parts), -(-max(ends) // executor.page_size)), -1, np.int32)
    for row, (_, _, end, page) in zip(page_table, parts, strict=True):
        count = -(-end // executor.page_size)
        row[:count] = np.arange(page, page + count)
    rows = [
        np.arange(max(first, sequence.first_row), end, dtype=np.int32) - first + start
        for (sequence, first, end, _), start in zip(parts, query_start, strict=False)
    ]
    step = StepInput(
        token_ids=np.concatenate(
            [np.asarray(s.token_ids[first:end], np.int32) for s, first, end, _ in parts]
        ),
        positions=np.concatenate([np.arange(first, end, dtype=np.int32) for _, first, end, _ in parts]),
        query_start=query_start,
        kv_length=np.array(ends, np.int32),
        page_table=page_table,
        logits_index=np.concatenate(rows),
    )
    return executor.execute(step).to(torch.float32, copy=True)  # the executor may reuse its tensor
