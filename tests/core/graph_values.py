"""The value of a graph in float64, by the interpreter, and the prompts that tests of passes give it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from trtc.core.graph import Graph
from trtc.core.interpreter import interpret
from trtc.core.ops import ReferenceContext
from trtc.tests.packed_steps import Inputs, PagedSequences, filled_cache

PAGE_SIZE, NUM_PAGES = 16, 12
Weights = Mapping[str, torch.Tensor]


def evaluate(graph: Graph, weights: Weights, inputs: Inputs, communicator: Any = None) -> torch.Tensor:
    """The graph's output in float64, on a fresh cache."""
    context = ReferenceContext(filled_cache(graph, PAGE_SIZE, NUM_PAGES, torch.float64), communicator)
    result: torch.Tensor = interpret(graph, {**weights, **inputs}, context)
    assert result.dtype == torch.float64
    return result


def two_prompts(vocab_size: int) -> Inputs:
    """Two sequences of 5 and 18 tokens; the logits of their last rows."""
    generator = torch.Generator().manual_seed(7)
    a, b = (torch.randint(vocab_size, (size,), generator=generator).tolist() for size in (5, 18))
    return PagedSequences(PAGE_SIZE, NUM_PAGES).step({"a": a, "b": b})


def three_rows(vocab_size: int) -> Inputs:
    """`two_prompts`, with the logits of three of their rows."""
    return two_prompts(vocab_size) | {"logits_index": torch.tensor([4, 9, 22], dtype=torch.int32)}
