"""Stages of a pipeline on GPUs, without one: what they send each other, in which order, and what comes out of it.

The streams of a rank are a thread that makes its exchanges one after the other, as NCCL does: a tensor is sent when it is
received. Layers are a rule for the next token. Oracles: the rule, and that no order of ranks comes to a standstill.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from queue import Queue
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from trtc.core.engine import Engine
from trtc.core.passes.stage import STAGE_INPUT
from trtc.core.targets.cuda.program import ContextRows, CudaProgram, DecodeRows
from trtc.kernels.sampling import LoopState, Sampling
from trtc.runtime import cuda_stage
from trtc.runtime.cuda_stage import CudaStageExecutor, Stage, StageLoop
from trtc.runtime.distributed import RankGroup
from trtc.runtime.graph_pool import GraphPool
from trtc.runtime.step_input import Int32Array, StepInput

VOCAB, BATCH, PAGES = 50, 4, 2
LIMIT_S = 60.0


def next_token(token: int, length: int, stages: int) -> int:
    """Every stage but the last adds one."""
    return (7 * token + 3 * length + stages - 1) % VOCAB


class Wires:
    """Channels between ranks, on which a sender waits for its receiver."""

    def __init__(self, size: int) -> None:
        self.channels: dict[tuple[int, int], Queue[Any]] = {
            (a, b): Queue() for a in range(size) for b in range(size)
        }
        self.meeting = threading.Barrier(size, timeout=LIMIT_S)
        self.spoken: Any = None

    def send(self, x: torch.Tensor, source: int, target: int) -> None:
        taken = threading.Event()
        self.channels[source, target].put((x, taken))
        assert taken.wait(LIMIT_S), f"rank {target} does not take what rank {source} sends"

    def receive(self, x: torch.Tensor, source: int, target: int) -> None:
        sent, taken = self.channels[source, target].get(timeout=LIMIT_S)
        x.copy_(sent)
        taken.set()

    def spread(self, x: torch.Tensor, speaker: bool) -> None:
        if speaker:
            self.spoken = x.clone()
        self.meeting.wait()
        x.copy_(self.spoken)
        self.meeting.wait()


class Group:
    """The `RankGroup` of one rank: its exchanges one after the other, in the order of its calls."""

    def __init__(self, wires: Wires, rank: int) -> None:
        self.rank, self._wires = rank, wires
        self._stream = ThreadPoolExecutor(1)
        self._sends: list[tuple[Future[None], torch.Tensor, torch.Tensor]] = []

    def start_send(self, x: torch.Tensor, rank: int) -> None:
        self._sends.append((self._stream.submit(self._wires.send, x, self.rank, rank), x, x.clone()))

    def finish_sends(self) -> None:
        for sent, x, before in self._sends:
            sent.result()
            assert torch.equal(x, before), "changed before it had arrived"
        self._sends.clear()

    def receive(self, x: torch.Tensor, rank: int) -> None:
        self._stream.submit(self._wires.receive, x, rank, self.rank).result()

    def spread(self, x: torch.Tensor, rank: int) -> None:
        self._stream.submit(self._wires.spread, x, rank == self.rank).result()

    @contextmanager
    def device_work(self) -> Iterator[None]:
        yield


class Layers:
    """The program of a stage: [tokens, 2] of token and length become the same plus one, or logits with a single one."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def prefill(
        self, inputs: dict[str, torch.Tensor], decode: DecodeRows | None, context: ContextRows | None
    ) -> torch.Tensor:
        result = self._run(inputs, inputs["positions"] + 1)
        return result[inputs["logits_index"].long()] if self._stage.last else result

    def decoder(self, rows: int) -> Callable[..., torch.Tensor]:
        return lambda inputs, decode: self._run(inputs, decode.kv_length)

    def _run(self, inputs: dict[str, torch.Tensor], length: torch.Tensor) -> torch.Tensor:
        assert (STAGE_INPUT in inputs) != self._stage.first
        x = (
            torch.stack([inputs["token_ids"], length], 1).float()
            if self._stage.first
            else inputs[STAGE_INPUT]
        )
        if not self._stage.last:
            return x + torch.tensor([0.0, 0.0]) + torch.tensor([1 / 7, 0.0])
        best = (7 * x[:, 0] + 3 * x[:, 1]).round().long() % VOCAB
        return torch.nn.functional.one_hot(best, VOCAB).float()


class Chooser:
    """`Sampling` in torch."""

    def greedy(self, logits: torch.Tensor, state: LoopState, *, dependent: bool = True) -> None:
        assert state.kv_length is None, "nobody advances before all know"
        state.next_token.copy_(logits.argmax(-1))

    def advance(self, state: LoopState, *, dependent: bool = True) -> None:
        tensors = state.token_ids, state.positions, state.kv_length, state.history
        for row, token in enumerate(state.next_token.tolist()):
            token_ids, positions, kv_length, history = cast("tuple[torch.Tensor, ...]", tensors)
            if kv_length[row]:
                token_ids[row] = token
                history[row, int(kv_length[row]) % history.shape[1]] = token
                positions[row] += 1
                kv_length[row] += 1


class Eager:
    """A graph that computes anew when it is replayed, into the same memory."""

    def __init__(self, run: Callable[[], torch.Tensor]) -> None:
        self._run, self.result = run, torch.zeros_like(run())

    def replay(self) -> None:
        self.result.copy_(self._run())


class Loop(StageLoop):
    def _capture(self, bucket: int, verify: bool) -> Any:
        decode, inputs = self._program.decoder(bucket), self._inputs(bucket)
        rows = DecodeRows(self._kv_length[:bucket], self._page_table[:bucket], not verify)

        def run() -> torch.Tensor:
            result = decode(inputs, rows)
            self._choose(result, self._state(bucket))
            return result

        graph = Eager(run)
        return graph, graph.result


class Executor(CudaStageExecutor):
    def __init__(self, stages: int, tp_size: int, group: Group) -> None:
        spec = SimpleNamespace(shape=("T", 2), dtype="float32")
        build = SimpleNamespace(tp_size=tp_size, pp_size=stages)
        graphs = [{STAGE_INPUT: spec} if rank >= tp_size else {} for rank in range(stages * tp_size)]
        ranks = [SimpleNamespace(graph=SimpleNamespace(specs=specs)) for specs in graphs]
        engine = SimpleNamespace(build=build, ranks=ranks, model=SimpleNamespace(vocab_size=VOCAB))
        self._device, self._group = torch.device("cpu"), cast(RankGroup, group)
        self._stage = Stage(cast(Engine, engine), self._group, self._device)
        self._most_parts = 4
        self._program = cast(CudaProgram, Layers(self._stage))
        self._loop = Loop(
            self._stage, self._program, cast(Sampling, Chooser()), GraphPool(self._device), BATCH, PAGES
        )

    def _wait(self) -> None:
        pass


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    zeros, empty = torch.zeros, torch.empty
    event = SimpleNamespace(record=lambda: None, synchronize=lambda: None)
    monkeypatch.setattr(torch, "zeros", lambda *sizes, pin_memory=False, **more: zeros(*sizes, **more))
    monkeypatch.setattr(torch, "empty", lambda *sizes, pin_memory=False, **more: empty(*sizes, **more))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(cuda_stage, "to_torch", lambda name: getattr(torch, name))
    monkeypatch.setattr(cuda_stage, "MICRO_STEP_TOKENS", 16)


def int32(values: Any) -> Int32Array:
    return np.array(values, np.int32)


def prompts(lengths: list[int], wanted: list[int]) -> StepInput:
    ends = np.cumsum(lengths)
    return StepInput(
        token_ids=int32([(11 * i) % VOCAB for i in range(ends[-1])]),
        positions=int32([i for length in lengths for i in range(length)]),
        query_start=int32([0, *ends]),
        kv_length=int32(lengths),
        page_table=np.zeros((len(lengths), PAGES), np.int32),
        logits_index=int32(wanted),
    )


STEPS = {
    "prompts": prompts([60, 30], [59, 89]),
    "every logit": prompts([40, 30], list(range(70))),
    "no logits": prompts([70], []),
    "few tokens": prompts([5, 3], [4, 7]),
    "guesses": prompts([3, 2], list(range(5))),
}


def started_ahead(executor: Executor) -> list[list[int]]:
    """A step of prompts, one that decodes their tokens beside a prompt, and one of all three, begun before any is known."""
    first = prompts([20, 15], [19, 34])
    second, third = prompts([1, 1, 40], [0, 1, 41]), prompts([1, 1, 1], [0, 1, 2])
    for step, lengths in ((second, [21, 16, 40]), (third, [22, 17, 41])):
        step.kv_length[:] = lengths
        step.positions[step.query_start[1:] - 1] = step.kv_length - 1
    sources = [None, int32([0, 1, *[-1] * 40]), int32([0, 1, 2])]
    for step, source in zip((second, third), sources[1:], strict=True):
        step.token_ids[source >= 0] = -1
    tickets = [executor.start_step(*each) for each in zip((first, second, third), sources, strict=True)]
    return [executor.finish_step(ticket).tolist() for ticket in tickets]


@pytest.mark.parametrize(("stages", "tp_size"), [(2, 1), (3, 1), (2, 2)])
def test_stages_together_do_what_the_rule_says(stages: int, tp_size: int) -> None:
    """Prompts in parts, verified guesses, a burst of decode steps that runs ahead, a row that rests, and steps after it, also
    begun before the tokens of those before are known."""
    size = stages * tp_size
    wires = Wires(size)
    lengths = int32([4, 9, 2])

    def run(rank: int) -> dict[str, Any]:
        executor = Executor(stages, tp_size, Group(wires, rank))
        found: dict[str, Any] = {}
        for name, step in STEPS.items():
            found[name] = executor.execute(step).argmax(-1).tolist()
            found[f"{name}, chosen"] = executor.choose(step).tolist()
        executor.loop_load(int32([1, 2, 3]), lengths, np.zeros((3, PAGES), np.int32))
        tickets = [executor.loop_enqueue(5)]
        executor._loop.rest([1])
        tickets.append(executor.loop_enqueue(2))
        found["loop"] = np.concatenate([executor.loop_collect(ticket) for ticket in tickets]).T.tolist()
        found["after"] = executor.choose(STEPS["few tokens"]).tolist()
        found["ahead"] = started_ahead(executor)
        return found

    with ThreadPoolExecutor(size) as pool:
        results = [future.result(timeout=60) for future in [pool.submit(run, rank) for rank in range(size)]]
    for name, step in STEPS.items():
        rows = zip(step.token_ids[step.logits_index], step.positions[step.logits_index] + 1, strict=True)
        expected = [next_token(int(token), int(length), stages) for token, length in rows]
        assert results[0][name] == expected, name
        assert all(found[f"{name}, chosen"] == expected for found in results), name
    for row, (token, length) in enumerate(zip([1, 2, 3], lengths.tolist(), strict=True)):
        for index in range(5 if row == 1 else 7):
            token, length = next_token(token, length, stages), length + 1
            assert all(found["loop"][row][index] == token for found in results)
    assert all(found["after"] == found["few tokens, chosen"] for found in results)
    row = [
        next_token(int(STEPS["prompts"].token_ids[index]), length, stages)
        for index, length in ((19, 20), (34, 15))
    ]
    ahead = [row]
    last = next_token((11 * 41) % VOCAB, 40, stages)
    ahead.append(
        [*(next_token(token, length, stages) for token, length in zip(row, (21, 16), strict=True)), last]
    )
    ahead.append(
        [next_token(token, length, stages) for token, length in zip(ahead[1], (22, 17, 41), strict=True)]
    )
    assert all(found["ahead"] == ahead for found in results)
