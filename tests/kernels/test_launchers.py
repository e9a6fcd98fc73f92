"""What the launchers share: tensors are checked once per combination, and what a kernel gets. Over a stand-in for a GPU."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from trtc.kernels import linear
from trtc.kernels.all_reduce import AllReduce, memory_bytes
from trtc.kernels.all_reduce.norm import AllReduceNorm
from trtc.kernels.all_reduce.two_shot import TwoShotAllReduce, plain_cut
from trtc.kernels.append_kv import AppendKv
from trtc.kernels.context_attention import ContextAttention, ContextPlan
from trtc.kernels.contract import addresses_and_key, pointer
from trtc.kernels.embedding import Embedding, Positions
from trtc.kernels.errors import KernelContractError
from trtc.kernels.launch import LaunchShape
from trtc.kernels.layer_norm import LayerNorm
from trtc.kernels.library import KernelLibrary
from trtc.kernels.linear import Linear, Norm, quantized
from trtc.kernels.linear.multicast_plan import plan_multicast
from trtc.kernels.linear.plan import plan_stream, plan_tile, plan_warpgroup
from trtc.kernels.linear.quantized import Dequantize, QuantizedLinear
from trtc.kernels.linear.quantized_plan import quantized_stream, quantized_tile
from trtc.kernels.linear.quantized_warpgroup_plan import plan_quantized_warpgroup
from trtc.kernels.linear.stripe_plan import StripePlan
from trtc.kernels.nvrtc import KernelSource
from trtc.kernels.paged import LOG2_E
from trtc.kernels.paged_decode_attention import PagedDecodeAttention
from trtc.kernels.quantize_rows import QuantizeRows
from trtc.kernels.sampling import LoopState, Sampling, SamplingState

ROWS, COLUMNS, FEATURES = 8, 64, 96


class Launch(NamedTuple):
    source: KernelSource
    entry: str
    signature: str
    shape: LaunchShape
    arguments: tuple[Any, ...]

    @property
    def parameters(self) -> list[str]:
        """The names of the kernel's parameters, in the order of its file."""
        path, name = self.source.path, self.entry.removeprefix("trtc::").split("<")[0]
        found = re.search(rf"__global__[^;{{]*?\b{name}\(([^()]*)\) {{", path.read_text())
        assert found, f"{path} has no kernel {name}"
        declared = found[1]
        for header in path.parent.glob("*.cuh"):
            for macro, text in re.findall(r"#define (\w+_PARAMETERS)\b((?:.*\\\n)*.*)", header.read_text()):
                declared = declared.replace(macro, text.replace("\\\n", ""))
        return [re.findall(r"\w+", parameter)[-1] for parameter in declared.split(",")]


class Recorder(KernelLibrary):
    """A library whose kernels note what they are launched with."""

    def __init__(self, capability: int = 90) -> None:
        super().__init__()
        self.__dict__ |= {"capability": capability, "multiprocessors": 132, "shared_limit": 99 * 1024}
        self.launches: list[Launch] = []
        self.binds = 0

    def kernel(self, source: Any, entry: str, signature: str, defines: Any = None) -> Any:
        recorder = self

        class Kernel:
            def bind(self, shape: LaunchShape) -> Callable[..., None]:
                recorder.binds += 1
                return lambda *arguments: recorder.launches.append(
                    Launch(source, entry, signature, shape, arguments)
                )

            def __call__(self, shape: LaunchShape, *arguments: Any) -> None:
                self.bind(shape)(*arguments)

        return Kernel()


def zeros(*sizes: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.zeros(sizes, dtype=torch.uint8 if dtype.itemsize == 1 else dtype).view(dtype)


def int32(*sizes: int) -> torch.Tensor:
    return zeros(*sizes, dtype=torch.int32)


def float32(*sizes: int) -> torch.Tensor:
    return zeros(*sizes, dtype=torch.float32)


def stand_in_map(address: int, dtype: str, rows: int, columns: int, box_rows: int) -> bytes:
    """For `tensor_map`, which asks the driver."""
    return repr((address, dtype, rows, columns, box_rows)).encode()


def as_argument(value: Any) -> Any:
    return pointer(value) if value is None or isinstance(value, torch.Tensor) else value


Case = tuple[Callable[[], object], dict[str, Any]]
"""A launch, and what belongs to its kernel's parameters: tensors (None: a null pointer) and numbers."""


def cases(library: KernelLibrary) -> dict[str, Case]:
    """Of each launcher, and each kernel that one chooses among."""
    return {
        **linear_cases(library),
        **quantized_cases(library),
        **row_cases(library),
        **attention_cases(library),
        **sampling_cases(library),
        **sum_cases(library),
    }


def of_plan(plan: Any) -> dict[str, Any]:
    """What kernels of linear layers take of their plans."""
    names = (
        "features_per_block", "columns_per_block", "tile_rows", "weight_stages", "row_stages", "early_steps"
    )  # fmt: skip
    return {name: getattr(plan, name) for name in names if hasattr(plan, name)}


def linear_cases(library: KernelLibrary) -> dict[str, Case]:
    x, weight, bias = zeros(ROWS, COLUMNS), zeros(FEATURES, COLUMNS), zeros(FEATURES)
    out, residual, sums = zeros(ROWS, FEATURES), zeros(ROWS, FEATURES), float32(FEATURES)
    sizes = (ROWS, FEATURES, COLUMNS)
    stream = plan_stream(*sizes, norm="layer")
    tile = plan_tile(*sizes, cluster=2, feature_tiles=1, warps_down=4)
    warpgroup = plan_warpgroup(*sizes, cluster=2, feature_tiles=1)
    multicast = plan_multicast(*sizes, features_per_block=40, copies=2)
    given = {
        "y": out, "x": x, "weight": weight, "scales": None, "bias": bias, "residual": residual, "weight_sums": sums
    }  # fmt: skip
    given |= {"rows": ROWS, "features": FEATURES, "columns": COLUMNS, "activation": 4, "epsilon": 0.5}

    def case(plan: Any, norm: Norm | None = None, **more: Any) -> Case:
        def launch() -> object:
            return Linear(library)(
                x, weight, bias, out=out, residual=residual, activation="silu", norm=norm, plan=plan
            )

        return launch, given | of_plan(plan) | more

    def maps(width: int, rows: int) -> dict[str, bytes]:
        return {
            "weight_map": stand_in_map(weight.data_ptr(), "float16", FEATURES, COLUMNS, width),
            "x_map": stand_in_map(x.data_ptr(), "float16", ROWS, COLUMNS, rows),
        }

    return {
        "linear_stream": case(stream, Norm(sums, epsilon=0.5)),
        "linear_tile": case(tile),
        "linear_warpgroup": case(
            warpgroup, ring_stages=warpgroup.stages, **maps(warpgroup.features_per_block, warpgroup.tokens)
        ),
        "linear_multicast": case(
            multicast, **maps(multicast.features_per_block, multicast.tile_rows // multicast.copies)
        ),
    }


def quantized_cases(library: KernelLibrary) -> dict[str, Case]:
    x, integers, scale = zeros(ROWS, COLUMNS), zeros(FEATURES, COLUMNS, dtype=torch.int8), zeros(FEATURES)
    out, residual, bias, sums = (
        zeros(ROWS, FEATURES),
        zeros(ROWS, FEATURES),
        zeros(FEATURES),
        float32(FEATURES),
    )
    norm_scale, norm_shift, matrix = zeros(COLUMNS), zeros(COLUMNS), zeros(FEATURES, COLUMNS)
    sizes = (ROWS, FEATURES, COLUMNS)
    stripe = StripePlan(*sizes, "layer", 132, 8, 1, 4, 1, 0, 3, "int8")
    warpgroup = plan_quantized_warpgroup(*sizes, weight="int8", groups=1)
    x_map = stand_in_map(x.data_ptr(), "float16", ROWS, COLUMNS, warpgroup.tokens)
    given = {"y": out, "x": x, "weight": integers, "scales": scale, "bias": bias, "residual": residual}
    given |= {"weight_sums": sums, "norm_scale": norm_scale, "norm_shift": norm_shift, "x_map": x_map}
    given |= {"rows": ROWS, "features": FEATURES, "columns": COLUMNS, "activation": 4, "epsilon": 0.5}

    def case(plan: Any, norm: Norm | None = None) -> Case:
        def launch() -> object:
            return QuantizedLinear(library)(
                x, integers, scale, bias, out=out, residual=residual, activation="silu", norm=norm, plan=plan
            )

        return launch, given | of_plan(plan)

    return {
        "quantized_stream": case(
            quantized_stream(*sizes, weight="int8", norm="layer"), Norm(sums, epsilon=0.5)
        ),
        "quantized_tile": case(quantized_tile(*sizes, weight="int8")),
        "quantized_stripe": case(stripe, Norm(None, epsilon=0.5, scale=norm_scale, shift=norm_shift)),
        "quantized_warpgroup": case(warpgroup),
        "dequantize": (
            lambda: Dequantize(library)(integers, scale, out=matrix),
            {"out": matrix, "weight": integers, "scales": scale, "features": FEATURES, "columns": COLUMNS},
        ),
    }


def row_cases(library: KernelLibrary) -> dict[str, Case]:
    x, out, residual, total = (zeros(ROWS, COLUMNS) for _ in range(4))
    scale, shift = zeros(COLUMNS), zeros(COLUMNS)
    table, position_table = zeros(48, COLUMNS), zeros(32, COLUMNS)
    ids, position_ids = int32(ROWS), int32(ROWS)
    rounded, scales = zeros(ROWS, COLUMNS + 16, dtype=torch.float8_e4m3fn), float32(ROWS)
    embedding = {
        "y": out, "ids": ids, "table": table, "columns": COLUMNS, "offset": 3, "table_rows": 48, "masked": 1
    }  # fmt: skip
    nowhere = {"position_ids": None, "position_table": None, "position_offset": 0, "position_rows": 0}
    positions = {
        "position_ids": position_ids, "position_table": position_table, "position_offset": 2, "position_rows": 32
    }  # fmt: skip
    return {
        "layer_norm": (
            lambda: LayerNorm(library)(x, scale, shift, out=out, residual=residual, total=total, epsilon=0.5),
            {
                "normed": out, "total": total, "x": x, "residual": residual, "scale": scale, "shift": shift,
                "columns": COLUMNS, "epsilon": 0.5,
            },
        ),
        "embedding": (
            lambda: Embedding(library)(ids, table, out=out, offset=3, masked=True),
            embedding | nowhere,
        ),
        "embedding_of_positions": (
            lambda: Embedding(library)(
                ids, table, out=out, offset=3, masked=True, positions=Positions(position_ids, position_table, 2)
            ),
            embedding | positions,
        ),
        "quantize_rows": (
            lambda: QuantizeRows(library)(x, out=rounded, scale=scales, relu=True, dependent=True),
            {"out": rounded, "scales": scales, "x": x, "columns": COLUMNS, "padded_columns": COLUMNS + 16, "relu": 1},
        ),
    }  # fmt: skip


def attention_cases(library: KernelLibrary) -> dict[str, Case]:
    """4 heads of 64 elements, 2 of k and v; rows that lie apart by different steps."""
    q, k, v, out = (zeros(ROWS, step, 64)[:, :heads] for heads, step in ((4, 5), (2, 3), (2, 6), (4, 7)))
    k_cache, v_cache = zeros(4, 2, 16, 64), zeros(4, 2, 16, 64)
    k_bytes, v_bytes = (zeros(4, 2, 16, 64, dtype=torch.float8_e4m3fn) for _ in range(2))
    starts, lengths, pages = int32(ROWS), int32(ROWS - 1), int32(ROWS - 1, 9)
    given: dict[str, Any] = {"q": q, "k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache, "out": out}
    given |= {f"{name}_stride": given[name].stride(0) for name in ("q", "k", "v", "out")}
    given |= {"query_start": starts, "kv_length": lengths, "page_table": pages, "sequences": ROWS - 1}
    given |= {
        "num_kv_heads": 2, "group": 2, "page_shift": 4, "pages_per_sequence": 9, "scale_log2": 0.5 * LOG2_E
    }  # fmt: skip

    def append_case(k_cache: torch.Tensor, v_cache: torch.Tensor) -> Case:
        pieces = {"k_stride": k.stride(0) // 8, "v_stride": v.stride(0) // 8, "head_pieces": 8}
        return (
            lambda: AppendKv(library)(k, v, k_cache, v_cache, starts, lengths, pages),
            given | {"k_cache": k_cache, "v_cache": v_cache} | pieces,
        )

    decode_lengths, decode_pages = int32(ROWS), int32(ROWS, 9)
    decode = PagedDecodeAttention(library)
    plan = replace(decode.plan(ROWS, 4, k_cache, 16), splits=2, cluster=False)
    workspace = zeros(plan.workspace_bytes, dtype=torch.uint8)
    decode_given = {
        "kv_length": decode_lengths, "page_table": decode_pages, "partial": workspace.data_ptr() + plan.counter_bytes,
        "counters": workspace, "early": 1,
    }  # fmt: skip

    def context_case(**kind: Any) -> Case:
        context, counters = ContextAttention(library), int32(2)
        context._counters = counters
        plan = ContextPlan(ROWS, ROWS - 1, 4, 64, 128, 64, "float32", **kind)
        return (
            lambda: context(q, k, v, k_cache, v_cache, starts, lengths, pages, out=out, scale=0.5, plan=plan),
            given | {"append": 1, "counters": counters, "pieces": plan.pieces},
        )

    return {
        "append_kv": append_case(k_cache, v_cache),
        "append_kv_e4m3": append_case(k_bytes, v_bytes),
        "decode": (
            lambda: decode(
                q, k, v, k_cache, v_cache, decode_pages, decode_lengths, out=out, plan=plan, scale=0.5,
                workspace=workspace, early=True,
            ),
            given | decode_given,
        ),
        "context": context_case(hopper=False),
        "context_hopper": context_case(hopper=True),
        "context_persistent": context_case(hopper=True, blocks=132),
    }  # fmt: skip


def sampling_cases(library: KernelLibrary) -> dict[str, Case]:
    logits, sampling = zeros(ROWS, COLUMNS + 16)[:, :COLUMNS], Sampling(library)
    state = LoopState(*(int32(ROWS) for _ in range(5)), int32(ROWS, 24))
    row, table = (ROWS,), (ROWS, COLUMNS)
    random = SamplingState(
        float32(*row), float32(*row), int32(*row), float32(*row), float32(*row), float32(*row), float32(*row),
        zeros(*row, dtype=torch.int64), int32(*row), int32(*table), int32(*table), zeros(*table, dtype=torch.int64),
    )  # fmt: skip
    given = {"logits": logits, "row_stride": COLUMNS + 16, "vocab_size": COLUMNS, "rows": ROWS}
    given |= vars(state) | {"history_length": 24}
    drawn = {
        "temperatures": random.temperature, "min_ps": random.min_p, "top_ks": random.top_k, "top_ps": random.top_p,
        "repetitions": random.repetition_penalty, "frequencies": random.frequency_penalty,
        "presences": random.presence_penalty, "seeds": random.seed, "sample_indices": random.sample_index,
        "token_state": random.token_state, "keys": random.keys, "weights": random.weights,
    }  # fmt: skip
    return {
        "greedy": (lambda: sampling.greedy(logits, state), given),
        "sample": (lambda: sampling.sample(logits, random, state), given | drawn),
        "advance": (lambda: sampling.advance(state), given),
    }


def sum_cases(library: KernelLibrary) -> dict[str, Case]:
    """On rank 3 of 8."""
    x, out, residual, total = (zeros(ROWS, COLUMNS) for _ in range(4))
    scale, shift, state = zeros(COLUMNS), zeros(COLUMNS), int32(2)
    lent = [256 * (1 + rank) for rank in range(8)]
    reduce = AllReduce(library, lent, 3, 1 << 16, state, two_shot_bytes=1 << 18)
    two_shot = TwoShotAllReduce(library, lent, 3, 1 << 17, state)
    given: dict[str, Any] = {f"memory{rank}": address for rank, address in enumerate(lent)}
    given |= {
        "here": lent[3], "state": state, "rank": 3, "x": x, "vectors": x.nbytes // 16, "capacity": (1 << 16) // 16
    }  # fmt: skip
    normed = {
        "normed": out, "total": total, "residual": residual, "scale": scale, "shift": shift, "epsilon": 0.5
    }  # fmt: skip
    normed |= {"rows": ROWS, "columns": COLUMNS, "block_columns": COLUMNS, "row_vectors": COLUMNS * 2 // 16}
    plain = dict.fromkeys(normed) | {
        "total": out, "row_vectors": plain_cut(x.nbytes, 8).row_vectors, "epsilon": 0.0
    }  # fmt: skip
    behind = [address + memory_bytes(1 << 16, 8) for address in lent]
    in_two = {f"memory{rank}": address for rank, address in enumerate(behind)}
    in_two |= {"here": behind[3], "capacity": (1 << 18) // 16 // 8}
    lines = {"capacity": plain_cut(1 << 17, 8).lines}
    norm = {"out": out, "residual": residual, "total": total, "epsilon": 0.5}
    return {
        "all_reduce": (lambda: reduce(x, out=out), given | {"y": out}),
        "all_reduce_in_two": (lambda: reduce(x, out=out, two_shot=True), given | {"y": out} | in_two),
        "all_reduce_norm": (lambda: AllReduceNorm(reduce)(x, scale, shift, **norm), given | normed),
        "two_shot": (lambda: two_shot(x, out=out), given | plain | lines),
        "two_shot_norm": (lambda: two_shot.norm(x, scale, shift, **norm), given | normed | lines),
    }


@pytest.mark.parametrize("name", cases(Recorder()))
def test_what_a_kernel_gets(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the parameters in the kernel's file. Programmatic dependent launch from sm_90 on, where it is asked for."""
    for module in (linear, quantized):
        monkeypatch.setattr(module, "tensor_map", stand_in_map)
    for capability in (80, 90):
        library = Recorder(capability)
        launch, given = cases(library)[name]
        launch()
        (launched,) = library.launches
        got = list(zip(launched.parameters, launched.arguments, strict=True))
        assert got == [(parameter, as_argument(given[parameter])) for parameter in launched.parameters]
        kinds = {"P": int, "i": int, "q": int, "f": float, "T": bytes}
        assert all(
            isinstance(value, kinds[letter])
            for letter, value in zip(launched.signature, launched.arguments, strict=True)
        )
        assert launched.shape.dependent == (capability == 90 and name != "dequantize")


def test_arguments_of_a_norm() -> None:
    """Oracle: the order of layer_norm.cu. The second launch is bound already, and has the addresses of its own tensors."""
    library = Recorder()
    norm = LayerNorm(library)
    for _ in range(2):
        x, out, residual, total = (zeros(ROWS, COLUMNS) for _ in range(4))
        scale = zeros(COLUMNS)
        norm(x, scale, out=out, residual=residual, total=total, epsilon=0.5)
        addresses = [tensor.data_ptr() for tensor in (out, total, x, residual, scale)]
        assert library.launches[-1].arguments == (*addresses, 0, COLUMNS, 0.5)
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
    product = Linear(Recorder())
    product(x, weight, out=out, norm=Norm(sums))
    with pytest.raises(KernelContractError, match="norms without scale and shift"):
        product(x, weight, out=out, norm=Norm(sums, scale=vector))
    reduce = AllReduce(Recorder(), [256, 512], 0, 1 << 16, int32(2))
    reduce(x, out=out)
    with pytest.raises(KernelContractError, match=r"out is .* expected contiguous"):
        reduce(x, out=zeros(COLUMNS, ROWS).t())
