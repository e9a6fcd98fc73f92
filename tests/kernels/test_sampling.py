"""sampling: reference, contract, machine code; on a GPU the kernels themselves."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from trtc.bench.kernels import sampling_checks
from trtc.kernels.errors import KernelContractError
from trtc.kernels.library import KernelLibrary
from trtc.kernels.nvrtc import CI_ARCHITECTURES, compile_kernel
from trtc.kernels.sampling import LoopState, check_logits, cluster_size, sources
from trtc.kernels.sampling.reference import RowSampling, penalized, sample_token, uniform
from trtc.runtime import sampler


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("seed", "sample_index", "position"), [(0, 0, 0), (5, 2, 7), (2**64 - 1, 3, 2**31 - 1)]
)
def test_uniform_is_the_samplers(seed: int, sample_index: int, position: int) -> None:
    """Oracle: the runtime's sampler, whose definition the kernels follow."""
    assert uniform(seed, sample_index, position) == sampler.uniform(seed, sample_index, position)


@pytest.mark.parametrize(
    "row",
    [
        RowSampling(), RowSampling(temperature=0.7), RowSampling(top_k=3), RowSampling(top_p=0.6),
        RowSampling(min_p=0.2), RowSampling(temperature=1.5, top_k=10, top_p=0.8, min_p=0.05),
    ],
    ids=str,
)  # fmt: skip
def test_reference_filters_as_the_sampler(row: RowSampling) -> None:
    """Oracle: the weights of the runtime's sampler: the token's share of the unit interval, found by sampling it."""
    scores = np.round(np.random.default_rng(1).normal(size=50) * 8).astype(np.float32) / 4  # with ties
    scaled = (torch.from_numpy(scores) - float(scores.max())) / row.temperature
    ordered, ids = scaled.sort(descending=True, stable=True)
    weights = sampler.filtered_weights(
        ordered[None],
        sampler.Filters(
            min_p=torch.tensor([[row.min_p]]),
            top_k=torch.tensor([[row.top_k or 50]]),
            top_p=torch.tensor([[row.top_p]]),
        ),
    )[0]
    edges = weights.cumsum(0) / weights.sum()
    for i in weights.nonzero()[:, 0].tolist():
        middle = float(edges[i] - weights[i] / weights.sum() / 2)
        assert sample_token(scores, row, middle) == int(ids[i])
    assert sample_token(scores, row, 1.0 - 2.0**-53) == int(ids[int(weights.nonzero()[-1])])


def test_reference_penalties() -> None:
    """Oracle: the definitions, worked out by hand: state is 2 * (times generated) + (in the prompt)."""
    row = RowSampling(repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=0.25)
    scores = penalized(np.array([4, -4, 4, 4], np.float32), np.array([0, 1, 1, 4], np.int32), row)
    assert scores.tolist() == [4.0, -8.0, 2.0, 2.0 - 2 * 0.5 - 0.25]


def test_greedy_row_takes_the_first_of_equals() -> None:
    """Oracle: torch.argmax on the CPU."""
    scores = np.array([1, 3, 3, 2], np.float32)
    assert (
        sample_token(scores, RowSampling(temperature=0.0), 0.9) == int(torch.from_numpy(scores).argmax()) == 1
    )


def test_contract_of_the_loop_state() -> None:
    """Oracle: the contract in `LoopState`."""
    logits = torch.zeros(2, 8)
    LoopState(int32(0, 0), kv_length=int32(1, 1), history=torch.zeros(2, 4, dtype=torch.int32)).check(logits)
    with pytest.raises(KernelContractError, match="history needs kv_length"):
        LoopState(int32(0, 0), history=torch.zeros(2, 4, dtype=torch.int32)).check(logits)
    with pytest.raises(KernelContractError, match=r"positions is \[3\] int32.*expected \[num_seqs=2\]"):
        LoopState(int32(0, 0), positions=int32(0, 0, 0)).check(logits)


@pytest.mark.parametrize(
    "logits", [torch.zeros(4), torch.zeros(2, 8).t(), torch.zeros(2, 8, dtype=torch.float64)]
)
def test_contract_of_the_logits(logits: torch.Tensor) -> None:
    """Oracle: the contract in `Sampling`."""
    with pytest.raises(KernelContractError, match=r"^sampling: .*(expected|accepted)"):
        check_logits(logits)


def test_sampling_state_names_the_tensor() -> None:
    """Oracle: the contract in `SamplingState`."""
    state = sampling_checks.sampling_state([RowSampling()] * 2, 8, device="cpu")
    state.check(torch.zeros(2, 8))
    wrong = dataclasses.replace(state, top_k=state.top_k.long())
    with pytest.raises(KernelContractError, match=r"top_k is \[2\] int64"):
        wrong.check(torch.zeros(2, 8))


def test_cluster_size() -> None:
    """Oracle: the rule in its docstring, on 132 multiprocessors."""
    assert [cluster_size(rows, 90, 132) for rows in (1, 33, 64, 132, 300)] == [8, 8, 4, 2, 1]
    assert cluster_size(1, 89, 128) == 1


@pytest.mark.parametrize("arch", CI_ARCHITECTURES)
def test_compiles_without_spills(arch: str) -> None:
    """Oracle: NVRTC and the resource report of ptxas. The other types are in test_compile."""
    for source in sources("float"):
        for name, usage in compile_kernel(source, {}, arch).resources.items():
            assert usage.spill_store_bytes == usage.spill_load_bytes == usage.stack_bytes == 0, name


@pytest.mark.gpu
def test_kernels(library: KernelLibrary) -> None:
    """Oracles: torch.argmax on the CPU for greedy; the numpy reference, token by token, for random sampling."""
    for name, run in sampling_checks.all_checks(library):
        try:
            run()
        except AssertionError as error:
            raise AssertionError(name) from error
