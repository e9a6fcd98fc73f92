"""From logits to the next token, and the step of a decode loop that stays on the device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..contract import ALIGNMENT, ELEMENT_TYPES, addresses_and_key, check_tensor, element_type
from ..errors import KernelContractError
from ..launch import BoundKernel, LaunchShape
from ..library import KernelLibrary
from ..nvrtc import KernelSource
from ..paged import check_int32

if TYPE_CHECKING:
    import torch

OP = "sampling"
FOLDER = Path(__file__).parent
ROW_THREADS = 512
ADVANCE_THREADS = 128
MAX_CLUSTER = 8
MAX_VOCAB_SIZE = 2**19
"""Indices of sample.cu's search tree have 19 bits."""

LOOP_SIGNATURE = "PPPPPPi"
GREEDY_SIGNATURE = "Pqi" + LOOP_SIGNATURE
SAMPLE_SIGNATURE = "Pqi" + "P" * 12 + LOOP_SIGNATURE
ADVANCE_SIGNATURE = "i" + LOOP_SIGNATURE
ADVANCE_ENTRY = "trtc::advance"


@dataclass(frozen=True)
class LoopState:
    """What a decode loop on the device carries from step to step; every launch here advances it. int32, on the GPU.

    next_token:      [num_seqs]  the token chosen in this step
    token_ids:       [num_seqs]  or None; the graph's input of that name: becomes the chosen token
    positions:       [num_seqs]  or None; the graph's input: + 1
    kv_length:       [num_seqs]  or None; the graph's input: + 1. A row with 0 is unused and keeps its state
    output_position: [num_seqs]  or None; tokens generated before this one (needed for random sampling): + 1
    history:         [num_seqs, history_length] or None; needs kv_length: entry kv_length % history_length (the position
                     of the chosen token) becomes the chosen token. May be pinned host memory, so that the host reads
                     tokens while the device goes on.
    """

    next_token: torch.Tensor
    token_ids: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    kv_length: torch.Tensor | None = None
    output_position: torch.Tensor | None = None
    history: torch.Tensor | None = None

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        return (
            self.next_token,
            self.token_ids,
            self.positions,
            self.kv_length,
            self.output_position,
            self.history,
        )

    @property
    def history_length(self) -> int:
        """0 without a history."""
        return 0 if self.history is None else self.history.shape[1]

    def check(self, like: torch.Tensor) -> None:
        """Raise KernelContractError unless the tensors are as the docstring says, for `like` = [num_seqs, ...]."""
        sizes = {"num_seqs": like.shape[0]}
        names = ("next_token", "token_ids", "positions", "kv_length", "output_position")
        for name, tensor in zip(names, self.tensors, strict=False):
            if tensor is not None:
                check_int32(OP, name, tensor, like, sizes)
        if self.history is None:
            return
        if self.kv_length is None:
            raise KernelContractError(f"{OP}: history needs kv_length, which says where in it a token goes")
        place = self.history if self.history.is_pinned() else like
        check_int32(OP, "history", self.history, place, {**sizes, "history_length": self.history.shape[-1]})


@dataclass(frozen=True)
class SamplingState:
    """How each row is sampled; meanings as in `runtime`'s sampling parameters. All on the GPU.

    temperature:     [num_seqs] float32; 0: the most likely token
    min_p, top_p:    [num_seqs] float32; 0 and 1 keep everything
    top_k:           [num_seqs] int32; 0 or less keeps everything; tokens that tie with the k-th stay
    repetition_penalty, frequency_penalty, presence_penalty: [num_seqs] float32; 1, 0, 0 change nothing
    seed:            [num_seqs] int64, its bits taken as unsigned
    sample_index:    [num_seqs] int32
    token_state:     [num_seqs, vocab_size] int32 or None for no penalties: 2 * (times generated) + (1 if in the prompt);
                     the chosen token is counted by the launch
    keys, weights:   [num_seqs, vocab_size] int32 and int64: scratch
    """

    temperature: torch.Tensor
    min_p: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    repetition_penalty: torch.Tensor
    frequency_penalty: torch.Tensor
    presence_penalty: torch.Tensor
    seed: torch.Tensor
    sample_index: torch.Tensor
    token_state: torch.Tensor | None
    keys: torch.Tensor
    weights: torch.Tensor

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        return (
            self.temperature, self.min_p, self.top_k, self.top_p, self.repetition_penalty, self.frequency_penalty,
            self.presence_penalty, self.seed, self.sample_index, self.token_state, self.keys, self.weights,
        )  # fmt: skip

    def check(self, like: torch.Tensor) -> None:
        """Raise KernelContractError unless the tensors are as the docstring says, for logits `like`."""
        import torch

        num_seqs, vocab_size = like.shape
        row = {"num_seqs": num_seqs}
        table = {"num_seqs": num_seqs, "vocab_size": vocab_size}
        for name, dtype, sizes in (
            ("temperature", torch.float32, row), ("min_p", torch.float32, row), ("top_k", torch.int32, row),
            ("top_p", torch.float32, row), ("repetition_penalty", torch.float32, row),
            ("frequency_penalty", torch.float32, row), ("presence_penalty", torch.float32, row),
            ("seed", torch.int64, row), ("sample_index", torch.int32, row), ("token_state", torch.int32, table),
            ("keys", torch.int32, table), ("weights", torch.int64, table),
        ):  # fmt: skip
            tensor = getattr(self, name)
            if tensor is not None:
                check_tensor(OP, name, tensor, dtype, sizes, like)


def greedy_source(element: str) -> KernelSource:
    """The greedy kernel for logits of CUDA type `element`, and the advance kernel."""
    return KernelSource(FOLDER / "greedy.cu", (_greedy_entry(element), ADVANCE_ENTRY))


def sample_source(element: str) -> KernelSource:
    """The random sampling kernel for logits of CUDA type `element`."""
    return KernelSource(FOLDER / "sample.cu", (_sample_entry(element),))


def sources(element: str) -> tuple[KernelSource, ...]:
    """The files with every kernel for logits of CUDA type `element`."""
    return greedy_source(element), sample_source(element)


class Sampling:
    """Launcher of the sampling kernels. One per device and thread.

    logits: [num_seqs, vocab_size] float32, float16 or bfloat16; rows may lie apart.
    dependent: programmatic dependent launch; nothing is read before the predecessors have ended. What reads the loop
    state before its own wait (`PagedDecodeAttention(..., early=True)`) must be behind a full dependency.
    All raise KernelContractError for tensors that do not fit, DeviceError without a GPU.
    """

    def __init__(self, library: KernelLibrary) -> None:
        self._library = library
        self._bound: dict[tuple[object, ...], BoundKernel] = {}

    def greedy(self, logits: torch.Tensor, state: LoopState, *, dependent: bool = True) -> None:
        """Choose the largest logit of each row; equal ones: the lowest index; NaN counts as the largest, as in torch."""
        (address, *others), contract = addresses_and_key((logits, *state.tensors))
        key = ("greedy", contract, dependent)
        kernel = self._bound.get(key)
        if kernel is None:
            check_logits(logits)
            state.check(logits)
            element = element_type(OP, logits)
            shape = _row_shape(logits.shape[0], self._library, dependent)
            kernel = self._bound[key] = self._library.bind(
                greedy_source(element), _greedy_entry(element), GREEDY_SIGNATURE, shape
            )
        kernel(address, logits.stride(0), logits.shape[1], *others, state.history_length)

    def sample(
        self, logits: torch.Tensor, sampling: SamplingState, state: LoopState, *, dependent: bool = True
    ) -> None:
        """Draw a token of each row; -1 where the row's best score is not finite. Needs state.output_position.

        The definition is that of `runtime/sampler.py`; see sample.cu for the method.
        """
        (address, *others), contract = addresses_and_key((logits, *sampling.tensors, *state.tensors))
        key = ("sample", contract, dependent)
        kernel = self._bound.get(key)
        if kernel is None:
            check_logits(logits)
            sampling.check(logits)
            state.check(logits)
            if state.output_position is None:
                raise KernelContractError(
                    f"{OP}: random sampling needs output_position, which counts its numbers"
                )
            if logits.shape[1] > MAX_VOCAB_SIZE:
                raise KernelContractError(f"{OP}: vocab_size {logits.shape[1]} is more than {MAX_VOCAB_SIZE}")
            element = element_type(OP, logits)
            shape = _row_shape(logits.shape[0], self._library, dependent)
            kernel = self._bound[key] = self._library.bind(
                sample_source(element), _sample_entry(element), SAMPLE_SIGNATURE, shape
            )
        kernel(address, logits.stride(0), logits.shape[1], *others, state.history_length)

    def advance(self, state: LoopState, *, dependent: bool = True) -> None:
        """Advance the loop by the tokens in state.next_token, chosen by other means."""
        num_seqs = state.next_token.shape[0]
        addresses, contract = addresses_and_key(state.tensors)
        key = ("advance", contract, dependent)
        kernel = self._bound.get(key)
        if kernel is None:
            state.check(state.next_token)
            grid = (-(-num_seqs // ADVANCE_THREADS),)
            shape = LaunchShape(grid, (ADVANCE_THREADS,), dependent=dependent)
            source = greedy_source(ELEMENT_TYPES["float32"])
            kernel = self._bound[key] = self._library.bind(source, ADVANCE_ENTRY, ADVANCE_SIGNATURE, shape)
        kernel(num_seqs, *addresses, state.history_length)


def check_logits(logits: torch.Tensor) -> None:
    """Raise KernelContractError unless `logits` are rows the kernels take."""
    element_type(OP, logits)
    if logits.dim() != 2 or logits.stride(1) != 1 or logits.data_ptr() % ALIGNMENT or 0 in logits.shape:
        raise KernelContractError(
            f"{OP}: logits are {list(logits.shape)}, stride {logits.stride()}; expected [num_seqs, vocab_size], none of "
            f"them 0, with contiguous rows, {ALIGNMENT}-byte aligned"
        )


def cluster_size(num_seqs: int, capability: int, multiprocessors: int) -> int:
    """Blocks per row: as many as fill the GPU about twice, 1 where there are no clusters."""
    size = MAX_CLUSTER if capability >= 90 else 1
    while size > 1 and num_seqs * size > 2 * multiprocessors:
        size //= 2
    return size


def _row_shape(num_seqs: int, library: KernelLibrary, dependent: bool) -> LaunchShape:
    size = cluster_size(num_seqs, library.capability, library.multiprocessors)
    cluster = (size,) if size > 1 else ()
    return LaunchShape((size, num_seqs), (ROW_THREADS,), 0, cluster, dependent=dependent)


def _greedy_entry(element: str) -> str:
    return f"trtc::greedy_tokens<{element}>"


def _sample_entry(element: str) -> str:
    return f"trtc::sample_tokens<{element}>"
