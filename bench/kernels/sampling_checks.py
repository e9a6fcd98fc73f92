"""Sampling kernels on a GPU against torch.argmax and their numpy reference. Each check raises AssertionError."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch

from ...kernels.library import KernelLibrary
from ...kernels.sampling import LoopState, Sampling, SamplingState
from ...kernels.sampling.reference import RowSampling, penalized, sample_token, uniform

Check = tuple[str, Callable[[], None]]
NAN = float("nan")


def loop_state(num_seqs: int, *, history_length: int = 0) -> LoopState:
    """A loop in which every sequence has 10 tokens."""

    def filled(value: int) -> torch.Tensor:
        return torch.full((num_seqs,), value, dtype=torch.int32, device="cuda")

    history = (
        torch.full((num_seqs, history_length), -1, dtype=torch.int32).pin_memory() if history_length else None
    )
    return LoopState(filled(-7), filled(-7), filled(9), filled(10), filled(3), history)


def sampling_state(
    rows: Sequence[RowSampling],
    vocab_size: int,
    token_state: torch.Tensor | None = None,
    device: str = "cuda",
) -> SamplingState:
    """Device parameters of `rows`; seeds 1000 + row, some with the high bit set, sample index row % 3."""

    def column(values: Sequence[float], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    seeds = [seed_of(row) for row in range(len(rows))]
    return SamplingState(
        column([row.temperature for row in rows]),
        column([row.min_p for row in rows]),
        column([row.top_k for row in rows], torch.int32),
        column([row.top_p for row in rows]),
        column([row.repetition_penalty for row in rows]),
        column([row.frequency_penalty for row in rows]),
        column([row.presence_penalty for row in rows]),
        column([seed - 2**64 if seed >= 2**63 else seed for seed in seeds], torch.int64),
        column([row % 3 for row in range(len(rows))], torch.int32),
        token_state,
        torch.empty(len(rows), vocab_size, dtype=torch.int32, device=device),
        torch.empty(len(rows), vocab_size, dtype=torch.int64, device=device),
    )


def seed_of(row: int) -> int:
    return 1000 + row + (row % 2 << 63)


def check_greedy(library: KernelLibrary, logits: torch.Tensor, name: str) -> None:
    """The chosen token and the advance of the loop, for rows of `logits`."""
    num_seqs = logits.shape[0]
    state = loop_state(num_seqs, history_length=8)
    assert state.kv_length is not None and state.history is not None
    Sampling(library).greedy(logits, state)
    torch.cuda.synchronize()
    # Ties: the lowest index, which torch promises on the CPU.
    wanted = logits.float().cpu().argmax(dim=-1)
    got = state.next_token.cpu().long()
    assert torch.equal(got, wanted), f"{name}: {got.tolist()[:8]}, expected {wanted.tolist()[:8]}"
    assert torch.equal(state.history[:, 10 % 8].long(), wanted), (
        f"{name}: history {state.history[:, 2].tolist()[:8]}"
    )
    check_advanced(state, wanted)


def check_advanced(state: LoopState, tokens: torch.Tensor) -> None:
    for tensor, wanted in (
        (state.token_ids, tokens), (state.positions, 10), (state.kv_length, 11), (state.output_position, 4)
    ):  # fmt: skip
        assert tensor is not None
        assert bool((tensor.cpu() == wanted).all()), f"state {tensor.tolist()[:8]}, expected {wanted}"


def check_advance(library: KernelLibrary) -> None:
    """The advance alone; unused rows keep their state."""
    state = loop_state(300)
    assert state.kv_length is not None and state.token_ids is not None and state.positions is not None
    state.next_token.copy_(torch.arange(300))
    state.kv_length[5] = 0
    Sampling(library).advance(state)
    unused = [int(tensor[5]) for tensor in (state.kv_length, state.token_ids, state.positions)]
    assert unused == [0, -7, 9], f"an unused row moved: {unused}"
    state.kv_length[5], state.token_ids[5], state.positions[5] = 11, 5, 10
    assert state.output_position is not None
    state.output_position[5] = 4
    check_advanced(state, torch.arange(300))


def check_sample(
    library: KernelLibrary, rows: Sequence[RowSampling], vocab_size: int, dtype: torch.dtype
) -> None:
    """Three steps of the loop against the reference, penalties counted from step to step."""
    generator = torch.Generator().manual_seed(vocab_size)
    token_state = torch.randint(0, 40, (len(rows), vocab_size), generator=generator)
    token_state = torch.where(token_state < 4, token_state, 0).to(torch.int32)
    counts = token_state.numpy().copy()
    sampling = sampling_state(rows, vocab_size, token_state.cuda())
    state, launcher = loop_state(len(rows)), Sampling(library)
    for step in range(3):
        # Rounding to steps of 1/8 makes ties.
        logits = (torch.randn(len(rows), vocab_size, generator=generator) * 24).round().div(8).to(dtype)
        launcher.sample(logits.cuda(), sampling, state)
        got = state.next_token.tolist()
        for i, row in enumerate(rows):
            scores = penalized(logits[i].float().numpy(), counts[i], row)
            wanted = sample_token(scores, row, uniform(seed_of(i), i % 3, 3 + step))
            counts[i, wanted] += 2
            assert got[i] == wanted, f"step {step}, row {i}, {row}: token {got[i]}, expected {wanted}"
    assert sampling.token_state is not None
    assert np.array_equal(sampling.token_state.cpu().numpy(), counts), "token_state differs"


def check_not_finite(library: KernelLibrary) -> None:
    """A row whose best score is not finite gives -1, greedy or not; -infinity elsewhere is fine."""
    rows = [RowSampling(), RowSampling(temperature=0.0), RowSampling(), RowSampling()]
    logits = torch.zeros(4, 1000, device="cuda")
    logits[0, 3], logits[1, 7], logits[2, :], logits[3, 1:] = NAN, torch.inf, -torch.inf, -torch.inf
    state = loop_state(4)
    Sampling(library).sample(logits, sampling_state(rows, 1000), state)
    assert state.next_token.tolist() == [-1, -1, -1, 0], f"tokens {state.next_token.tolist()}"


def all_checks(library: KernelLibrary) -> Iterator[Check]:
    """(name, check) of everything above."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for num_seqs, vocab_size in ((1, 50272), (3, 50257), (64, 50272), (300, 1003), (2, 5)):
            logits = torch.randn(num_seqs, vocab_size, device="cuda").to(dtype)
            padded = torch.full((num_seqs, -(-vocab_size // 8) * 8 + 8), 99.0, device="cuda", dtype=dtype)
            padded[:, :vocab_size] = logits
            name = f"greedy {dtype} {num_seqs} x {vocab_size}"
            # Odd row lengths: rows after the first start at any element.
            yield name, partial(check_greedy, library, logits, name)
            yield name, partial(check_greedy, library, padded[:, :vocab_size], name + " strided")
            yield name, partial(check_greedy, library, logits.mul(2).round(), name + " ties")
    special = torch.randn(5, 50272, device="cuda")
    special[0, [70, 50000]], special[1, [3, 40000]], special[2] = NAN, torch.inf, -torch.inf
    special[3], special[4] = -0.0, -3.0
    special[3, 600], special[4, 50271] = 0.0, -1.0
    yield "greedy special values", partial(check_greedy, library, special, "special values")
    yield "advance", partial(check_advance, library)
    rows = [
        RowSampling(), RowSampling(temperature=0.0), RowSampling(temperature=0.7), RowSampling(top_k=1),
        RowSampling(top_k=50), RowSampling(top_p=0.9), RowSampling(top_p=0.1), RowSampling(min_p=0.05),
        RowSampling(temperature=1.7, top_k=200, top_p=0.8, min_p=0.01), RowSampling(temperature=100.0),
        RowSampling(temperature=0.01), RowSampling(top_p=1e-6), RowSampling(min_p=1.0),
        RowSampling(repetition_penalty=1.3), RowSampling(frequency_penalty=0.5, presence_penalty=0.25),
        RowSampling(temperature=0.0, repetition_penalty=1.3, frequency_penalty=0.7),
        RowSampling(0.9, 0.02, 100, 0.95, 1.1, 0.2, 0.1), RowSampling(top_k=10**6), RowSampling(top_p=0.999999),
    ]  # fmt: skip
    for dtype in (torch.float32, torch.float16):
        for vocab_size in (50272, 1003, 7, 131072):
            name = f"sample {dtype} {vocab_size}"
            yield name, partial(check_sample, library, rows, vocab_size, dtype)
    yield "sample 80 rows", partial(check_sample, library, rows * 4 + rows[:4], 5000, torch.float32)
    yield "sample not finite", partial(check_not_finite, library)
