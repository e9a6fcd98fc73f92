"""What the launchers share: tensors are checked once per combination, and what a kernel gets. Over a stand-in for a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from trtc.kernels.all_reduce import AllReduce
from trtc.kernels.all_reduce.norm import AllReduceNorm
from trtc.kernels.all_reduce.two_shot import TwoShotAllReduce
from trtc.kernels.append_kv import AppendKv
from trtc.kernels.context_attention import ContextAttention
from trtc.kernels.contract import addresses_and_key
from trtc.kernels.embedding import Embedding, Positions
from trtc.kernels.errors import KernelContractError
from trtc.kernels.launch import LaunchShape
from trtc.kernels.layer_norm import LayerNorm
from trtc.kernels.library import KernelLibrary
from trtc.kernels.linear import Linear, Norm
from trtc.kernels.linear.quantized import QuantizedLinear
from trtc.kernels.paged_decode_attention import PagedDecodeAttention
from trtc.kernels.quantize_rows import QuantizeRows
from trtc.kernels.sampling import LoopState, Sampling

ROWS, COLUMNS = 8, 64


class Recorder(KernelLibrary):
    """A library whose kernels note what they are launched with: signature, launch shape, arguments."""

    def __init__(self, capability: int = 90) -> None:
        super().__init__()
        self.__dict__ |= {"capability": capability, "multiprocessors": 132, "shared_limit": 99 * 1024}
        self.launches: list[tuple[str, LaunchShape, tuple[Any, ...]]] = []
        self.binds = 0

    def kernel(self, source: Any, entry: str, signature: str, defines: Any = None) -> Any:
        recorder = self

        class Kernel:
            def bind(self, shape: LaunchShape) -> Callable[..., None]:
                recorder.binds += 1
                return lambda *arguments: recorder.launches.append((signature, shape, arguments))

        return Kernel()


def zeros(*sizes: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.zeros(sizes, dtype=torch.uint8 if dtype.itemsize == 1 else dtype).view(dtype)


def int32(*sizes: int) -> torch.Tensor:
    return zeros(*sizes, dtype=torch.int32)


def launchers(library: KernelLibrary) -> dict[str, Callable[[], object]]:
    """A launch of each."""
    x, out, residual, total, vector = (zeros(*size) for size in (*[(ROWS, COLUMNS)] * 4, (COLUMNS,)))
    weight, ids, kv_length = zeros(COLUMNS, COLUMNS), int32(ROWS), int32(ROWS)
    heads, cache, pages, starts = zeros(ROWS, 2, 64), zeros(4, 2, 16, 64), int32(ROWS, 4), int32(ROWS + 1)
    sums = Norm(zeros(COLUMNS, dtype=torch.float32))
    normed = {"out": out, "residual": residual, "total": total}
    layer_norm, linear, quantized, embedding = (
        kind(library) for kind in (LayerNorm, Linear, QuantizedLinear, Embedding)
    )
    append, decode, context = AppendKv(library), PagedDecodeAttention(library), ContextAttention(library)
    sampling, state = Sampling(library), LoopState(ids)
    lent, counters = [256, 512], int32(2)
    reduce = AllReduce(library, lent, 0, 1 << 16, counters)
    two_shot = TwoShotAllReduce(library, lent, 0, 1 << 16, counters)
    plan = decode.plan(ROWS, 2, cache, 16)
    integers, rounded, scales = (
        zeros(COLUMNS, COLUMNS, dtype=torch.int8),
        zeros(ROWS, COLUMNS, dtype=torch.float8_e4m3fn),
        zeros(ROWS, dtype=torch.float32),
    )
    return {
        "layer_norm": lambda: layer_norm(x, vector, vector, **normed),
        "linear": lambda: linear(x, weight, vector, out=out, norm=sums),
        "quantized": lambda: quantized(x, integers, vector, out=out, norm=sums),
        "embedding": lambda: embedding(ids, weight, out=out, positions=Positions(ids, weight)),
        "quantize_rows": lambda: QuantizeRows(library)(x, out=rounded, scale=scales, dependent=True),
        "append_kv": lambda: append(heads, heads, cache, cache, starts, kv_length, pages),
        "decode": lambda: decode(
            heads, heads, heads, cache, cache, pages, kv_length, out=heads, plan=plan, scale=1.0
        ),
        "context": lambda: context(
            heads, heads, heads, cache, cache, starts, kv_length, pages, out=heads, scale=1.0
        ),
        "greedy": lambda: sampling.greedy(x, state),
        "advance": lambda: sampling.advance(state),
        "all_reduce": lambda: reduce(x, out=out),
        "all_reduce_norm": lambda: AllReduceNorm(reduce)(x, vector, vector, **normed),
        "two_shot": lambda: two_shot(x, out=out),
        "two_shot_norm": lambda: two_shot.norm(x, vector, vector, **normed),
    }


@pytest.mark.parametrize("name", launchers(Recorder()))
def test_what_a_kernel_gets(name: str) -> None:
    """As many arguments as its signature has, of those kinds; programmatic dependent launch from sm_90 on."""
    for capability in (80, 90):
        library = Recorder(capability)
        launchers(library)[name]()
        ((signature, shape, arguments),) = library.launches
        assert len(arguments) == len(signature) and shape.dependent == (capability == 90)
        kinds = {"P": int, "i": int, "q": int, "f": float, "T": bytes}
        assert all(
            isinstance(value, kinds[letter]) for letter, value in zip(signature, arguments, strict=True)
        )


def test_arguments_of_a_norm() -> None:
    """Oracle: the order of layer_norm.cu. The second launch is bound already, and has the addresses of its own tensors."""
    library = Recorder()
    norm = LayerNorm(library)
    for _ in range(2):
        x, out, residual, total = (zeros(ROWS, COLUMNS) for _ in range(4))
        scale = zeros(COLUMNS)
        norm(x, scale, out=out, residual=residual, total=total, epsilon=0.5)
        addresses = [tensor.data_ptr() for tensor in (out, total, x, residual, scale)]
        assert library.launches[-1][2] == (*addresses, 0, COLUMNS, 0.5)
    assert library.binds == 1


def test_a_key_has_all_that_a_contract_looks_at() -> None:
    """Equal for tensors that differ in address only; different for what `check_tensor` refuses beside the first."""
    x = zeros(ROWS, COLUMNS)
    addresses, key = addresses_and_key((x, None))
    assert addresses == [x.data_ptr(), 0] and key == addresses_and_key((zeros(ROWS, COLUMNS), None))[1]
    shifted = zeros(ROWS * COLUMNS + 1)[1:].view(ROWS, COLUMNS)
    others = (x[:4], x.view(COLUMNS, ROWS), x.view(torch.bfloat16), zeros(COLUMNS, ROWS).t(), shifted, None)
    assert len({key, *(addresses_and_key((other, None))[1] for other in others)}) == 1 + len(others)


def test_what_fits_once_is_not_taken_for_what_does_not() -> None:
    """Oracle: the contract, after a launch of tensors that differ in one thing."""
    x, weight, out, vector = (
        zeros(ROWS, COLUMNS),
        zeros(COLUMNS, COLUMNS),
        zeros(ROWS, COLUMNS),
        zeros(COLUMNS),
    )
    sums = zeros(COLUMNS, dtype=torch.float32)
    linear = Linear(Recorder())
    linear(x, weight, out=out, norm=Norm(sums))
    with pytest.raises(KernelContractError, match="norms without scale and shift"):
        linear(x, weight, out=out, norm=Norm(sums, scale=vector))
    reduce = AllReduce(Recorder(), [256, 512], 0, 1 << 16, int32(2))
    reduce(x, out=out)
    with pytest.raises(KernelContractError, match=r"out is .* expected contiguous"):
        reduce(x, out=zeros(COLUMNS, ROWS).t())
