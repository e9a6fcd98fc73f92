"""Steps of packed tokens for graphs and programs: the bookkeeping of a scheduler, without one."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import torch
from trtc.core.graph import Graph
from trtc.core.interpreter import interpret
from trtc.core.ops import ReferenceContext

Inputs = dict[str, torch.Tensor]


class PagedSequences:
    """Sequences by name, whose pages are drawn from a shuffled pool, so that neighbours in a sequence are rarely
    neighbours in the cache."""

    def __init__(self, page_size: int, num_pages: int) -> None:
        self.page_size = page_size
        self._free = list(range(num_pages))
        random.Random(0).shuffle(self._free)
        self._pages: dict[str, list[int]] = {}
        self._length: dict[str, int] = {}

    def step(self, work: Mapping[str, Sequence[int]], *, last_rows_only: bool = False) -> Inputs:
        """The graph inputs of a step that appends tokens to sequences: name -> new token ids, in this order.

        Logits are wanted for every token, or for the last one of each sequence.
        """
        first = {name: self._length.get(name, 0) for name in work}
        for name, tokens in work.items():
            self._length[name] = first[name] + len(tokens)
            pages = self._pages.setdefault(name, [])
            while len(pages) * self.page_size < self._length[name]:
                pages.append(self._free.pop())
        starts = [0]
        for tokens in work.values():
            starts.append(starts[-1] + len(tokens))
        table = torch.full((len(work), max(len(self._pages[name]) for name in work)), -1)
        for row, name in enumerate(work):
            table[row, : len(self._pages[name])] = torch.tensor(self._pages[name])
        rows = [stop - 1 for stop in starts[1:]] if last_rows_only else list(range(starts[-1]))
        inputs = {
            "token_ids": torch.tensor([token for tokens in work.values() for token in tokens]),
            "positions": torch.cat([torch.arange(first[name], self._length[name]) for name in work]),
            "query_start": torch.tensor(starts),
            "kv_length": torch.tensor([self._length[name] for name in work]),
            "page_table": table,
            "logits_index": torch.tensor(rows, dtype=torch.int32),
        }
        return {name: tensor.to(torch.int32) for name, tensor in inputs.items()}

    def release(self, name: str) -> None:
        """Ends a sequence; its pages are the next ones to be given out."""
        self._free += self._pages.pop(name)
        del self._length[name]


class Reference:
    """A graph in float64, step by step, over a cache of its own. weights: by name, in float64."""

    def __init__(
        self, graph: Graph, weights: Mapping[str, torch.Tensor], page_size: int, num_pages: int
    ) -> None:
        self._graph, self._weights = graph, weights
        self._context = ReferenceContext(filled_cache(graph, page_size, num_pages, torch.float64))

    def run(self, inputs: Inputs) -> torch.Tensor:
        """The logits of a step."""
        logits: torch.Tensor = interpret(self._graph, {**self._weights, **inputs}, self._context)
        return logits


def filled_cache(
    graph: Graph, page_size: int, num_pages: int, dtype: torch.dtype, fill: float = float("nan")
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per attention node of `graph`, pages of k and v full of `fill`: NaN shows every read of a slot never written."""
    layers = []
    for node in graph.nodes:
        if node.op == "attention":
            size = [num_pages, page_size, *map(int, graph.specs[node.used[1]].shape[1:])]
            layers.append((torch.full(size, fill, dtype=dtype), torch.full(size, fill, dtype=dtype)))
    return layers
