"""The lowering and the build use only what both flavours have.

Oracle: the names in the Python bindings that NVIDIA publishes for TensorRT 11, in `tensorrt_11_names.txt`. What is used
of TensorRT-RTX is recorded while networks with every op are lowered and a plan is built.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from trtc.core.dtypes import DType
from trtc.core.graph import Graph
from trtc.core.sharding import ShardingOptions
from trtc.core.targets.tensorrt.build import build_plan
from trtc.core.targets.tensorrt.flavour import Flavour, find_flavour
from trtc.core.targets.tensorrt.lower import LoweringOptions, lower_graph
from trtc.core.targets.tensorrt.options import TensorRTOptions
from trtc.runtime import tensorrt_session
from trtc.tests.core.targets.tensorrt_cases import CASES, Composer, add_case
from trtc.tests.core.targets.tensorrt_opt import BUILD, CAPACITY, dummy_rank, ranks_of
from trtc.tests.opt_models import OptCheckpoint

trt = pytest.importorskip("tensorrt_rtx")
pytestmark = pytest.mark.tensorrt_rtx

Use = tuple[str, str]
"""Class (or "" for the module) and the name used of it."""


class Recorder:
    """Stands for an object of the module and notes every attribute that is read or set."""

    def __init__(self, target: Any, owner: str, uses: set[Use]) -> None:
        self.__dict__.update(_target=target, _owner=owner, _uses=uses)

    def __getattr__(self, name: str) -> Any:
        self._uses.add((self._owner, name))
        return record(getattr(self._target, name), self._uses)

    def __setattr__(self, name: str, value: Any) -> None:
        self._uses.add((self._owner, name))
        setattr(self._target, name, plain(value))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self._target(*map(plain, args), **{key: plain(value) for key, value in kwargs.items()})
        return record(result, self._uses)


def record(value: Any, uses: set[Use]) -> Any:
    """Objects, classes and methods of the module wrapped; numbers, enum members, shapes and strings as they are."""
    kind = value if isinstance(value, type) else type(value)
    if not kind.__module__.startswith("tensorrt_rtx"):
        return Recorder(value, "", uses) if callable(value) else value
    if value is kind:
        return (
            value if kind is trt.ILogger else Recorder(value, kind.__name__, uses)
        )  # a subclass is made of ILogger
    is_data = hasattr(kind, "__members__") or issubclass(
        kind, trt.Dims | trt.Weights | trt.Permutation | trt.IHostMemory
    )
    return value if is_data else Recorder(value, kind.__name__, uses)


def plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(map(plain, value))
    return value._target if isinstance(value, Recorder) else value


@pytest.fixture
def uses() -> set[Use]:
    return set()


@pytest.fixture
def flavour(uses: set[Use]) -> Flavour:
    return replace(find_flavour("tensorrt_rtx"), trt=Recorder(trt, "", uses))


def published() -> set[Use]:
    lines = Path(__file__).with_name("tensorrt_11_names.txt").read_text().splitlines()
    names: set[Use] = set()
    for line in lines:
        if not line.startswith("#"):
            owner, members = line.split(":")
            names |= {("", owner)} | {(owner, member) for member in members.split()}
    return names


def graphs(checkpoint: OptCheckpoint) -> Iterator[tuple[Graph, Mapping[str, torch.Tensor]]]:
    """Every use of every op, and collectives."""
    for case in CASES.values():
        c = Composer(DType.FLOAT16)
        yield c.graph(add_case(c, case).tensors[0]), c.values
    sharding = ShardingOptions(2, use_parallel_embedding=True, embedding_sharding_dim=1)
    rank = ranks_of(checkpoint, DType.FLOAT16, sharding)[0]
    yield rank.graph, rank.weights


def test_names_used_are_in_tensorrt_11(
    flavour: Flavour, uses: set[Use], opt_checkpoint: Callable[[str], OptCheckpoint]
) -> None:
    for graph, weights in graphs(opt_checkpoint("pre_norm")):
        lower_graph(graph, weights, flavour, LoweringOptions(kv_capacity=CAPACITY))
    rank = dummy_rank(4, 16, DType.FLOAT16)
    network = lower_graph(rank.graph, rank.weights, flavour, LoweringOptions(kv_capacity=CAPACITY))
    build_plan(network, BUILD, TensorRTOptions())
    assert ("INetworkDefinition", "add_attention_v2") in uses
    assert ("IAttention", "key_value_lengths") in uses
    assert ("IBuilderConfig", "builder_optimization_level") in uses
    assert sorted(uses - published()) == []


def test_timing_cache_is_in_tensorrt_11(flavour: Flavour, uses: set[Use], tmp_path: Path) -> None:
    """TensorRT-RTX has its functions, which do nothing and say so; a second build reads what the first wrote."""
    rank, options = dummy_rank(4, 16, DType.FLOAT16), TensorRTOptions(timing_cache=str(tmp_path / "timings"))
    for _ in range(2):
        network = lower_graph(
            rank.graph,
            rank.weights,
            replace(flavour, timing_cache=True),
            LoweringOptions(kv_capacity=CAPACITY),
        )
        with pytest.warns(DeprecationWarning, match="no-ops in TensorRT-RTX"):
            build_plan(network, BUILD, options)
    assert (tmp_path / "timings").stat().st_size > 0
    assert {("IBuilderConfig", "create_timing_cache"), ("ITimingCache", "serialize")} <= uses
    assert sorted(uses - published()) == []


def test_building_ahead_of_time_is_the_one_difference(flavour: Flavour, uses: set[Use]) -> None:
    """Choosing GPUs is what TensorRT-RTX alone has."""
    rank = dummy_rank(4, 16, DType.FLOAT16)
    network = lower_graph(rank.graph, rank.weights, flavour, LoweringOptions(kv_capacity=CAPACITY))
    build_plan(network, BUILD, TensorRTOptions(compute_capabilities=("8.9",)))
    assert sorted(uses - published()) == [
        ("", "ComputeCapability"),
        ("ComputeCapability", "SM89"),
        ("IBuilderConfig", "num_compute_capabilities"),
        ("IBuilderConfig", "set_compute_capability"),
    ]


OWNERS = {"_trt": "", "_plan": "ICudaEngine", "_runtime": "Runtime", "context": "IExecutionContext"}
"""Names that hold objects of TensorRT in runtime/tensorrt_session.py, and the classes of these."""


def attributes_of_the_session() -> set[Use]:
    """What the session over a GPU, which no test here can run, uses of TensorRT: read from its source."""
    uses = set()
    for node in ast.walk(ast.parse(Path(tensorrt_session.__file__).read_text())):
        if isinstance(node, ast.Attribute):
            holder = (
                node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
            )
            if holder in OWNERS:
                uses.add((OWNERS[holder], node.attr))
    return uses


def test_names_of_the_runtime_are_in_both() -> None:
    uses = attributes_of_the_session()
    assert {("IExecutionContext", "execute_async_v3"), ("ICudaEngine", "device_memory_size_v2")} <= uses
    assert sorted(uses - published()) == []
    owners = {owner: getattr(trt, owner) if owner else trt for owner, _ in uses}
    assert [use for use in sorted(uses) if not hasattr(owners[use[0]], use[1])] == []
    assert hasattr(
        trt.IExecutionContext, "is_stream_capturable"
    )  # asked for by getattr: TensorRT-RTX alone has it


def test_names_of_the_plugin_path_are_in_tensorrt_11() -> None:
    assert {
        ("INetworkDefinition", "add_plugin"),
        ("PreviewFeature", "ALIASED_PLUGIN_IO_10_03"),
        ("IBuilderConfig", "set_preview_feature"),
    } <= published()
