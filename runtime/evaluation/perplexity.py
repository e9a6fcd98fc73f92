"""Perplexity over a long text, and how far an engine is from `transformers` at every position of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from ...core.errors import ConfigError
from ..executor import Executor
from .forward import Scored, sequence_logits

Logits: TypeAlias = Callable[[Sequence[int]], torch.Tensor]
"""Token ids of one sequence -> logits [T, V] float32; row i predicts token i + 1."""

Float64Array: TypeAlias = npt.NDArray[np.float64]
Int64Array: TypeAlias = npt.NDArray[np.int64]

_COMPARED_ROWS = 128
"""Rows compared at once: bounds the memory for float64 copies."""


@dataclass(frozen=True)
class Window:
    """Tokens [begin, end) are given to the model; tokens [first, end) are scored."""

    begin: int
    end: int
    first: int


@dataclass(frozen=True, eq=False)
class Scores:
    """Of the scored tokens, in order. The first token of the text has no prediction and no score.

    nll: [N] negative log-likelihood of each token, in nats
    top: [N] token id that was most probable in its place
    """

    nll: Float64Array
    top: Int64Array

    @property
    def perplexity(self) -> float:
        return math.exp(float(self.nll.mean()))


@dataclass(frozen=True, eq=False)
class Distance:
    """How far the engine's logits are from the reference's, for each of the N scored tokens.

    max_abs, mean_abs: [N] of |engine - reference| over the vocabulary
    kl:                [N] Kullback-Leibler divergence KL(reference || engine) of the two distributions, in nats
    """

    max_abs: Float64Array
    mean_abs: Float64Array
    kl: Float64Array


@dataclass(frozen=True, eq=False)
class Comparison:
    """An engine beside its reference on the same tokens."""

    engine: Scores
    reference: Scores
    distance: Distance

    @property
    def agrees(self) -> npt.NDArray[np.bool_]:
        """[N] whether both would choose the same token."""
        return np.equal(self.engine.top, self.reference.top)


def windows(num_tokens: int, size: int, stride: int) -> Iterator[Window]:
    """The sliding window of the `transformers` documentation ("Perplexity of fixed-length models").

    Windows of `size` tokens begin every `stride` tokens; each scores the tokens that no earlier one has seen.
    """
    if not 1 <= stride < size:
        raise ConfigError(f"stride is {stride}; accepted: 1 to {size - 1}, below the window of {size} tokens")
    if num_tokens < 2:
        raise ConfigError(f"the text has {num_tokens} token(s); perplexity needs at least 2")
    first = 1
    for begin in range(0, num_tokens, stride):
        end = min(begin + size, num_tokens)
        yield Window(begin, end, first)
        first = end
        if end == num_tokens:
            return


def engine_logits(executor: Executor) -> Logits:
    """The logits function of an engine that serves nothing else meanwhile: it uses the first pages of the cache."""
    return lambda token_ids: next(sequence_logits(executor, [Scored(token_ids)]))


def score(token_ids: Sequence[int], logits: Logits, size: int, stride: int) -> Scores:
    """Scores every token of a text but the first, with at least `size` - `stride` tokens before each, where there are.

    Raises ConfigError for a stride or a text that do not fit the window.
    """
    parts = [
        _score_rows(*_rows_and_targets(token_ids, w, logits)) for w in windows(len(token_ids), size, stride)
    ]
    return _joined_scores(parts)


def compare(
    token_ids: Sequence[int], engine: Logits, reference: Logits, size: int, stride: int
) -> Comparison:
    """Scores a text as `score` does on both sides, and measures their distance."""
    engine_scores, reference_scores, distances = [], [], []
    for window in windows(len(token_ids), size, stride):
        ours, targets = _rows_and_targets(token_ids, window, engine)
        theirs, _ = _rows_and_targets(token_ids, window, reference)
        theirs = theirs.to(ours.device)
        engine_scores.append(_score_rows(ours, targets))
        reference_scores.append(_score_rows(theirs, targets))
        blocks = [slice(i, i + _COMPARED_ROWS) for i in range(0, len(ours), _COMPARED_ROWS)]
        distances += [_distance(ours[block], theirs[block]) for block in blocks]
    return Comparison(
        _joined_scores(engine_scores),
        _joined_scores(reference_scores),
        Distance(*(np.concatenate(column) for column in zip(*distances, strict=True))),
    )


def _rows_and_targets(
    token_ids: Sequence[int], window: Window, logits: Logits
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits rows [n, V] that predict the scored tokens of a window, and those tokens [n]."""
    rows = logits(token_ids[window.begin : window.end])
    first = window.first - window.begin
    targets = torch.tensor(list(token_ids[window.first : window.end]), device=rows.device)
    return rows[first - 1 : first - 1 + len(targets)], targets


def _score_rows(rows: torch.Tensor, targets: torch.Tensor) -> Scores:
    nll = torch.nn.functional.cross_entropy(rows, targets, reduction="none")
    return Scores(nll.double().cpu().numpy(), rows.argmax(dim=-1).cpu().numpy())


def _joined_scores(parts: list[Scores]) -> Scores:
    return Scores(np.concatenate([part.nll for part in parts]), np.concatenate([part.top for part in parts]))


def _distance(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[Float64Array, Float64Array, Float64Array]:
    ours, theirs = ours.double(), theirs.double()
    difference = (ours - theirs).abs()
    log_p, log_q = theirs.log_softmax(-1), ours.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0)  # rounding can make it a hair below zero
    return tuple(x.cpu().numpy() for x in (difference.amax(-1), difference.mean(-1), kl))  # type: ignore[return-value]
