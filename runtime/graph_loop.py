"""Decode steps of target `cuda` as CUDA graphs that the device repeats.

The state of a decode loop (tokens, positions, lengths, page table) lives on the device; the last kernel of a decode graph
chooses the next tokens and advances it. The host enqueues steps and reads tokens, written to pinned memory, when it likes.
Steps of few tokens that verify guesses are such graphs too, of which every token is a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ..core.targets.cuda.code import decode_buckets, verify_buckets
from ..core.targets.cuda.program import CudaProgram, DecodeRows
from ..kernels.sampling import LoopState, Sampling
from .graph_pool import GraphPool
from .step_input import Int32Array

TakenOver = tuple[torch.Tensor, torch.Tensor]
"""Indices into the tokens of a step, [N] int64, and the tokens there, [N] int32; on the device."""


@dataclass(frozen=True)
class Ticket:
    """Steps that were enqueued: `event` tells when they are done."""

    event: torch.cuda.Event
    count: int
    num_loaded: int
    """Rows that were loaded."""
    loaded: npt.NDArray[np.int64]
    """[rows] of the device: which of the rows that were loaded each is, -1 where it rests."""
    kv_length: Int32Array
    """[rows] before the first of these steps, that step's token included."""
    history: npt.NDArray[np.int32]
    """[rows, HISTORY]: where the steps write their tokens."""


class GraphLoop:
    """Decode steps as CUDA graphs, one for each bucket of batch sizes, captured when first needed. When so many rows rest that
    the others fit a smaller bucket, the device moves these together and goes on there.

    Steps that verify guesses, whose rows may be tokens of one sequence, have graphs and buckets of their own.
    """

    HISTORY = 256
    """Tokens of each row that the host may leave unread."""

    def __init__(
        self, program: CudaProgram, sampling: Sampling, pool: GraphPool, max_batch_size: int, pages: int
    ) -> None:
        """pool: closed by its owner."""
        self._program, self._sampling, self._pool, self._device = program, sampling, pool, pool.device
        self._buckets = {False: decode_buckets(max_batch_size), True: verify_buckets(max_batch_size)}
        size = self._buckets[True][-1]

        def state(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=pool.device)

        self._token_ids, self._positions, self._kv_length = state(size), state(size), state(size)
        self._next_token, self._page_table, self._row_start = state(size), state(size, pages), state(size + 1)
        self._histories: dict[int, torch.Tensor] = {}
        """One for each bucket: the tokens of steps in another may still be unread."""
        self._graphs: dict[tuple[int, bool], tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._verify, self._num_loaded = False, 0
        self._loaded: npt.NDArray[np.int64] = np.arange(0)
        """Of each row of the device; see `Ticket`."""
        self._host_length: Int32Array = np.zeros(0, np.int32)

    @property
    def _rows(self) -> int:
        return len(self._loaded)

    def prepare(self) -> bool:
        """Captures one more graph of decode steps. False: all have been."""
        missing = (size for size in self._buckets[False] if (size, False) not in self._graphs)
        bucket = next(missing, None)
        if bucket is None:
            return False
        self._graphs[bucket, False] = self._capture(bucket, False)
        return True

    def max_rows(self, *, verify: bool) -> int:
        return self._buckets[verify][-1]

    def load(
        self, token_ids: Int32Array, kv_length: Int32Array, page_table: Int32Array, *, verify: bool = False
    ) -> None:
        """Sets the rows of the next steps, or of one step that verifies guesses; the rest of their bucket is unused."""
        rows = len(token_ids)
        self._num_loaded, self._loaded = rows, np.arange(rows)
        self._host_length, self._verify = kv_length.copy(), verify
        bucket = self._bucket(rows)
        padded = np.zeros((3, bucket), np.int32)
        padded[0, :rows], padded[1, :rows], padded[2, :rows] = token_ids, kv_length - 1, kv_length
        for tensor, values in zip((self._token_ids, self._positions, self._kv_length), padded, strict=True):
            tensor[:bucket].copy_(torch.from_numpy(values).pin_memory(), non_blocking=True)
        pages = torch.from_numpy(np.ascontiguousarray(page_table)).pin_memory()
        self._page_table[:rows, : page_table.shape[1]].copy_(pages, non_blocking=True)
        if verify:
            starts = torch.arange(bucket + 1, dtype=torch.int32).clamp_(max=rows)
            self._row_start[: bucket + 1].copy_(starts.pin_memory(), non_blocking=True)

    def run_once(self) -> torch.Tensor:
        """One step; returns its logits [rows, vocab], valid until the next step."""
        graph, logits = self._graph()
        graph.replay()
        self._host_length = self._host_length + 1
        return logits[: self._rows]

    def set_tokens(self, tokens: TakenOver) -> None:
        """Replaces some of the tokens that were loaded."""
        self._token_ids[tokens[0]] = tokens[1]

    def run_once_choosing(self) -> torch.Tensor:
        """One step; returns the tokens it chooses, [rows] int32, valid until the next step."""
        self.run_once()
        return self._next_token[: self._rows]

    def enqueue(self, count: int) -> Ticket:
        assert count <= self.HISTORY // 2
        graph, _ = self._graph()
        for _ in range(count):
            graph.replay()
        return self._ticket(count)

    def _ticket(self, count: int) -> Ticket:
        """Of the `count` steps that were started last."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        history = self._history(self._bucket(self._rows)).numpy()
        ticket = Ticket(event, count, self._num_loaded, self._loaded, self._host_length, history)
        self._host_length = self._host_length + count
        return ticket

    def rest(self, rows: Sequence[int]) -> None:
        """Makes these of the rows that were loaded unused."""
        ending = np.isin(self._loaded, rows)
        self._loaded = np.where(ending, -1, self._loaded)
        running = np.flatnonzero(self._loaded >= 0)
        if len(running) and self._bucket(len(running)) < self._bucket(self._rows):
            self._move_together(running)
        else:
            self._kv_length.index_fill_(0, self._sent(np.flatnonzero(ending)), 0)

    def _move_together(self, running: npt.NDArray[np.int64]) -> None:
        """Leaves these rows of the device, as the first ones, and goes on in the bucket that holds them."""
        rows, bucket = len(running), self._bucket(len(running))
        index = self._sent(running)
        for tensor in (self._token_ids, self._positions, self._kv_length, self._page_table):
            tensor[:rows] = tensor[index]
            tensor[rows:bucket] = 0
        self._loaded, self._host_length = self._loaded[running], self._host_length[running]

    def _sent(self, index: npt.NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(index).pin_memory().to(self._device, non_blocking=True)

    def collect(self, ticket: Ticket) -> Int32Array:
        """[count, rows that were loaded]: the tokens that the steps of `ticket` chose; 0 for rows that rest."""
        ticket.event.synchronize()
        rows = np.flatnonzero(ticket.loaded >= 0)
        slots = (ticket.kv_length[None, rows] + np.arange(ticket.count)[:, None]) % self.HISTORY
        tokens = np.zeros((ticket.count, ticket.num_loaded), np.int32)
        tokens[:, ticket.loaded[rows]] = ticket.history[rows[None, :], slots]
        return tokens

    def _bucket(self, rows: int) -> int:
        return next(size for size in self._buckets[self._verify] if size >= rows)

    def _history(self, bucket: int) -> torch.Tensor:
        """[bucket, HISTORY], pinned: steps of `bucket` rows write here what the host reads later."""
        if bucket not in self._histories:
            self._histories[bucket] = torch.zeros(bucket, self.HISTORY, dtype=torch.int32, pin_memory=True)
        return self._histories[bucket]

    def _graph(self) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        key = (self._bucket(self._rows), self._verify)
        if key not in self._graphs:
            self._graphs[key] = self._capture(*key)
        return self._graphs[key]

    def _capture(self, bucket: int, verify: bool) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        """Captures the step of `bucket` rows. State is left as it was: capturing runs nothing, and warming up runs on
        unused rows of its own."""
        decode = self._program.decoder(bucket)
        inputs = self._inputs(bucket)
        row_start = self._row_start[: bucket + 1] if verify else None
        rows = DecodeRows(self._kv_length[:bucket], self._page_table[:bucket], not verify, row_start)
        idle = {name: torch.zeros_like(tensor) for name, tensor in inputs.items()}
        nowhere = None if row_start is None else torch.zeros_like(row_start)
        unused = DecodeRows(torch.zeros_like(rows.kv_length), rows.page_table, False, nowhere)
        decode(idle, unused)  # what `GraphPool.capture` wants to have run
        state = self._state(bucket)
        self._choose(decode(idle, unused), LoopState(next_token=torch.zeros_like(state.next_token)))

        def step() -> torch.Tensor:
            logits = decode(inputs, rows)
            self._choose(logits, state)
            return logits

        return self._pool.capture(step)

    def _inputs(self, bucket: int) -> dict[str, torch.Tensor]:
        return {"token_ids": self._token_ids[:bucket], "positions": self._positions[:bucket]}

    def _state(self, bucket: int) -> LoopState:
        return LoopState(
            next_token=self._next_token[:bucket],
            token_ids=self._token_ids[:bucket],
            positions=self._positions[:bucket],
            kv_length=self._kv_length[:bucket],
            history=self._history(bucket),
        )

    def _choose(self, logits: torch.Tensor, state: LoopState) -> None:
        """The end of a step: chooses tokens, by which it advances `state`."""
        self._sampling.greedy(logits, state)
