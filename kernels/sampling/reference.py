"""What the sampling kernels compute, by sorting, in numpy float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class RowSampling:
    """Parameters of one row; see `SamplingState`."""

    temperature: float = 1.0
    min_p: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0


def uniform(seed: int, sample_index: int, output_position: int) -> float:
    """The number in [0, 1) that chooses the token at `output_position`: Philox4x64-10."""
    generator = np.random.Philox(key=seed | sample_index << 64, counter=output_position)
    return (int(generator.random_raw()) >> 11) * 2.0**-53


def penalized(logits: Floats, token_state: npt.NDArray[np.int32], row: RowSampling) -> Floats:
    """Logits [vocab_size] float32 after the three penalties, in float32 arithmetic."""
    repetition, frequency, presence = map(
        np.float32, (row.repetition_penalty, row.frequency_penalty, row.presence_penalty)
    )
    repeated = np.where(logits > 0, logits / repetition, logits * repetition)
    scores = np.where(token_state > 0, repeated, logits)
    count = (token_state >> 1).astype(np.float32)
    return np.asarray(scores - frequency * count - presence * (count > 0).astype(np.float32), np.float32)


def sample_token(scores: Floats, row: RowSampling, number: float) -> int:
    """The token drawn from scores [vocab_size] float32 (after penalties) by `number` in [0, 1)."""
    if row.temperature == 0:
        return int(scores.argmax())
    scaled = (scores - scores.max()) / np.float32(row.temperature)
    order = np.argsort(-scaled, kind="stable")
    ordered = scaled[order]
    weights = np.exp(ordered.astype(np.float64))
    weights[weights < np.float32(row.min_p)] = 0.0
    if 0 < row.top_k < len(ordered):
        weights[ordered < ordered[row.top_k - 1]] = 0.0
    if row.top_p < 1.0:
        cumulative = weights.cumsum()
        weights[(cumulative - weights) / cumulative[-1] >= np.float32(row.top_p)] = 0.0
    cumulative = weights.cumsum()
    pick = int(np.searchsorted(cumulative, number * cumulative[-1], side="right"))
    return int(order[min(pick, int((weights > 0).sum()) - 1)])
