"""Logits of whole sequences. Oracle: transformers, and the engine itself with one sequence at a time."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from trtc.core.dtypes import DType
from trtc.core.errors import RequestError
from trtc.runtime.evaluation.forward import Scored, sequence_logits
from trtc.runtime.evaluation.hf import HFModel
from trtc.runtime.executor import Executor
from trtc.runtime.load import load_executor
from trtc.runtime.step_input import StepInput
from trtc.tests.tiny_opt import TINY_OPT, build_tiny_opt


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    limits = "--max-seq-len 96 --max-batch-size 3 --max-num-tokens 64"
    return build_tiny_opt(tmp_path_factory.mktemp("forward") / "engine", *limits.split())


class Counting:
    """An executor that writes down the shape of every step and checks that no page is shared."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self.steps: list[tuple[int, int]] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self._executor, name)

    def execute(self, step: StepInput) -> torch.Tensor:
        pages = step.page_table[step.page_table >= 0].tolist()
        assert len(pages) == len(set(pages)) and max(pages) < self._executor.num_pages
        self.steps.append((step.num_sequences, step.num_tokens))
        return self._executor.execute(step)


@pytest.mark.parametrize("num_pages", [None, 8])
def test_packed_sequences_have_the_logits_of_transformers(engine: Path, num_pages: int | None) -> None:
    """Short ones share a step within all limits of the engine; the one of 90 tokens takes two steps of 64."""
    rng = random.Random(0)
    lengths = [5, 1, 20, 90, 30, 30, 10, 2, 3, 64]
    sequences = [
        Scored([rng.randrange(1920) for _ in range(length)], rng.randrange(length)) for length in lengths
    ]
    executor = Counting(load_executor(engine, num_pages=num_pages))
    found = list(sequence_logits(executor, sequences))  # type: ignore[arg-type]
    hf = HFModel.load(TINY_OPT, DType.FLOAT32)
    for rows, sequence in zip(found, sequences, strict=True):
        expected = hf.logits(sequence.token_ids)[sequence.first_row :]
        torch.testing.assert_close(rows, expected, atol=2e-4, rtol=0)
    assert max(count for count, _ in executor.steps) == 3 and max(t for _, t in executor.steps) == 64
    assert sum(tokens for _, tokens in executor.steps) == sum(lengths) and len(executor.steps) < len(lengths)


@pytest.mark.parametrize(
    ("token_ids", "says"),
    [
        ([2] * 97, "97 tokens; the engine's max_seq_len is 96"),
        ([2, 5, 1920], "token id 1920 at position 2 is outside the vocabulary; accepted: 0 to 1919"),
    ],
)
def test_a_sequence_that_the_engine_cannot_hold(engine: Path, token_ids: list[int], says: str) -> None:
    """The second as from a tokenizer with more tokens than the model: a GPU would read past the embedding."""
    with pytest.raises(RequestError, match=says):
        list(sequence_logits(load_executor(engine), [Scored([2, 3]), Scored(token_ids)]))
