"""The decode loop of target cuda without a GPU: graphs compute anew when they are replayed, on the device's state. Oracle: a
rule for the next token that knows a sequence's length and pages."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trtc.core.targets.cuda.program import CudaProgram, DecodeRows
from trtc.kernels.sampling import LoopState, Sampling
from trtc.runtime.graph_loop import GraphLoop
from trtc.runtime.graph_pool import GraphPool

VOCAB, PAGES = 97, 3


def next_token(token: int, length: int, page: int) -> int:
    return (7 * token + 3 * length + 5 * page) % VOCAB


class Rule:
    """`CudaProgram` and `Sampling`: logits that are largest at the next token. `buckets`: of the steps that ran."""

    def __init__(self) -> None:
        self.buckets: list[int] = []

    def decoder(self, rows: int) -> Any:
        def run(inputs: dict[str, torch.Tensor], decode: DecodeRows) -> torch.Tensor:
            length, pages = decode.kv_length, decode.page_table.sum(1)
            best = (7 * inputs["token_ids"] + 3 * length + 5 * pages) % VOCAB
            assert torch.equal(inputs["positions"][length > 0], length[length > 0] - 1)
            assert len(pages[length > 0].unique()) == (length > 0).sum(), "two rows write to the same pages"
            return torch.nn.functional.one_hot(best.long(), VOCAB).float()

        return run

    def greedy(self, logits: torch.Tensor, state: LoopState) -> None:
        self.buckets.append(len(logits))
        state.next_token.copy_(logits.argmax(-1))
        token_ids, positions, kv_length, history = cast(
            "tuple[torch.Tensor, ...]", (state.token_ids, state.positions, state.kv_length, state.history)
        )
        rows = torch.nonzero(kv_length)[:, 0]
        chosen = state.next_token[rows]
        token_ids[rows], history[rows, kv_length[rows] % history.shape[1]] = chosen, chosen
        positions[rows] += 1
        kv_length[rows] += 1


class Loop(GraphLoop):
    def _capture(self, bucket: int, verify: bool) -> Any:
        decode, inputs, state = self._program.decoder(bucket), self._inputs(bucket), self._state(bucket)
        rows = DecodeRows(self._kv_length[:bucket], self._page_table[:bucket], True)
        graph = SimpleNamespace(replay=lambda: self._choose(decode(inputs, rows), state))
        return graph, torch.zeros(bucket, VOCAB)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *sizes, pin_memory=False, **more: zeros(*sizes, **more))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    event = SimpleNamespace(record=lambda: None, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)


def run(lengths: list[int], actions: list[int | set[int]], unread: int) -> tuple[list[list[int]], list[int]]:
    """Bursts, and rows that come to rest, in turn; tokens are read so many bursts late. Returns those of each row until it
    rested, and the buckets of the steps."""
    rule = Rule()
    loop = Loop(cast(CudaProgram, rule), cast(Sampling, rule), GraphPool(torch.device("cpu")), 40, PAGES)
    rows = len(lengths)
    tokens = np.arange(rows, dtype=np.int32) % VOCAB
    pages = np.arange(rows * PAGES, dtype=np.int32).reshape(rows, PAGES)
    loop.load(tokens, np.array(lengths, np.int32), pages)
    tickets, found, running = [], [[] for _ in range(rows)], set(range(rows))

    def read() -> None:
        ticket, then = tickets.pop(0)
        collected = loop.collect(ticket)
        assert collected.shape == (ticket.count, rows)
        for row in then:
            found[row] += collected[:, row].tolist()

    for action in actions:
        if isinstance(action, int):
            tickets.append((loop.enqueue(action), set(running)))
        elif action & running:
            loop.rest(sorted(action & running))
            running -= action
        while len(tickets) > unread:
            read()
    while tickets:
        read()
    return found, rule.buckets


@pytest.mark.usefixtures("no_gpu")
@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 600), min_size=1, max_size=40),
    st.lists(st.integers(1, 5) | st.sets(st.integers(0, 39), max_size=20), max_size=12),
    st.integers(0, 2),
)
def test_every_row_gets_its_tokens_wherever_it_is_moved(
    lengths: list[int], actions: list[int | set[int]], unread: int
) -> None:
    found, _ = run(lengths, actions, unread)
    for row, (length, tokens) in enumerate(zip(lengths, found, strict=True)):
        token, page = row % VOCAB, sum(range(row * PAGES, (row + 1) * PAGES))
        for got in tokens:
            token = next_token(token, length, page)
            length += 1
            assert got == token


@pytest.mark.usefixtures("no_gpu")
def test_rows_that_are_left_go_on_in_the_bucket_that_holds_them() -> None:
    found, buckets = run([5] * 30, [2, {0, 3}, 1, {29}, 2, set(range(4, 20)), 3, set(range(30)), 1], 1)
    assert buckets == [32, 32, 32, 32, 32, 16, 16, 16, 16]
    assert [len(tokens) for tokens in found] == [2, 8, 8, 2, *[5] * 16, *[8] * 9, 3]


@pytest.mark.usefixtures("no_gpu")
def test_graphs_are_prepared_one_by_one() -> None:
    rule = Rule()
    loop = Loop(cast(CudaProgram, rule), cast(Sampling, rule), GraphPool(torch.device("cpu")), 9, PAGES)
    loop.load(
        np.array([3, 4], np.int32),
        np.array([5, 6], np.int32),
        np.arange(2 * PAGES, dtype=np.int32).reshape(2, PAGES),
    )
    loop.enqueue(1)
    known = loop._graphs[2, False]
    assert [loop.prepare() for _ in range(6)] == [True] * 4 + [False] * 2
    assert (
        sorted(loop._graphs) == [(size, False) for size in (1, 2, 4, 8, 9)]
        and loop._graphs[2, False] is known
    )
