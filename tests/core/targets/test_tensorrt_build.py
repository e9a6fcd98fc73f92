"""Plans from the real builder, on machines without a GPU; options and profiles."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from trtc.core.config import BuildConfig
from trtc.core.dtypes import DType
from trtc.core.errors import BuildError, ConfigError, TargetError
from trtc.core.sharding import ShardingOptions
from trtc.core.targets.tensorrt import TARGET
from trtc.core.targets.tensorrt.build import Profile, _shape, packed_profiles, profiles
from trtc.core.targets.tensorrt.flavour import Flavour, find_flavour
from trtc.core.targets.tensorrt.options import TensorRTOptions
from trtc.tests.core.targets.tensorrt_opt import BUILD, dummy_rank, ranks_of
from trtc.tests.opt_models import SIZES, OptCheckpoint

with_rtx = pytest.mark.tensorrt_rtx
RTX = Flavour(
    "tensorrt_rtx", None, "1.7", ("8.0", "8.9"), plugins=False, native_attention=True, timing_cache=False
)
DATA_CENTRE = Flavour("tensorrt", None, "11.4", (), plugins=True, native_attention=True, timing_cache=True)


def build_for(capabilities: list[str], **options: object) -> BuildConfig:
    target_options = {"flavour": "tensorrt_rtx", "compute_capabilities": capabilities, **options}
    return replace(BUILD, target_options=target_options)


@pytest.fixture
def rtx() -> None:
    pytest.importorskip("tensorrt_rtx")


@with_rtx
@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize("capability", ["8.0", "8.6", "8.9", "12.0"])
def test_a_plan_for_each_gpu(capability: str, tmp_path: Path) -> None:
    """The builder says yes, and the file is the plan. What the network computes is shown by test_tensorrt_numerics."""
    rank = dummy_rank(4, 16, DType.FLOAT16)
    description = TARGET.compile(rank.graph, build_for([capability]), tmp_path, 0, rank.weights)
    weights = sum(tensor.nbytes for tensor in rank.weights.values())
    assert (tmp_path / "rank0.plan").stat().st_size > weights
    assert json.loads(json.dumps(description)) == description
    assert description["plan"] == "rank0.plan"
    assert description["compute_capabilities"] == [capability]
    assert description["inputs"]["token_ids"] == ["INT32", [-1, -1]]
    assert description["inputs"]["k_cache.1"] == ["HALF", [-1, 4, BUILD.max_seq_len, 16]]
    assert description["outputs"][description["logits"]] == ["FLOAT", [-1, SIZES["vocab_size"]]]


@with_rtx
@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize("dtype", [DType.FLOAT32, DType.BFLOAT16], ids=str)
def test_one_plan_for_several_gpus(dtype: DType, tmp_path: Path) -> None:
    rank = dummy_rank(4, 16, dtype)
    description = TARGET.compile(rank.graph, build_for(["8.0", "12.0"]), tmp_path, 0, rank.weights)
    assert description["compute_capabilities"] == ["8.0", "12.0"]


@with_rtx
@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize(("heads", "head_dim"), [(4, 64), (4, 80), (5, 128), (12, 16)])
def test_attention_is_one_fused_kernel(heads: int, head_dim: int, tmp_path: Path) -> None:
    """The lowering leaves nothing between cache, scores and values that keeps TensorRT from fusing them."""
    rank = dummy_rank(heads, head_dim, DType.FLOAT16)
    TARGET.compile(
        rank.graph, build_for(["8.0", "12.0"], fused_attention_only=True), tmp_path, 0, rank.weights
    )
    assert (tmp_path / "rank0.plan").exists()


@with_rtx
@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize("fmha", ["disable", "enable", "fp32_acc"])
def test_context_fmha_builds(fmha: str, tmp_path: Path) -> None:
    rank = dummy_rank(4, 64, DType.FLOAT16)
    TARGET.compile(rank.graph, build_for(["8.9"], context_fmha=fmha), tmp_path, 0, rank.weights)
    assert (tmp_path / "rank0.plan").exists()


@with_rtx
@pytest.mark.usefixtures("rtx")
def test_enabled_context_fmha_is_fused_or_refused(tmp_path: Path) -> None:
    rank = dummy_rank(4, 16, DType.FLOAT32)
    with pytest.raises(BuildError, match="not supported by a dedicated kernel"):
        TARGET.compile(rank.graph, build_for(["8.9"], context_fmha="enable"), tmp_path, 0, rank.weights)


@with_rtx
@pytest.mark.usefixtures("rtx")
def test_ranks_build(tmp_path: Path, opt_checkpoint: Callable[[str], OptCheckpoint]) -> None:
    """A plan for each rank of tensor parallelism, collectives inside."""
    sharding = ShardingOptions(2, use_parallel_embedding=True, embedding_sharding_dim=1)
    for r, rank in enumerate(ranks_of(opt_checkpoint("pre_norm"), DType.FLOAT16, sharding)):
        TARGET.compile(rank.graph, build_for(["8.9"]), tmp_path, r, rank.weights)
    assert {path.name for path in tmp_path.iterdir()} == {"rank0.plan", "rank1.plan"}


@with_rtx
@pytest.mark.usefixtures("rtx")
def test_weight_streaming_builds(tmp_path: Path) -> None:
    rank = dummy_rank(4, 16, DType.FLOAT16)
    TARGET.compile(rank.graph, build_for(["8.9"], weight_streaming=True), tmp_path, 0, rank.weights)
    assert (tmp_path / "rank0.plan").exists()


@with_rtx
@pytest.mark.usefixtures("rtx")
def test_refused_build_carries_the_reason_of_tensorrt(tmp_path: Path) -> None:
    """TensorRT has no fused attention kernel for float32."""
    rank = dummy_rank(4, 16, DType.FLOAT32)
    with pytest.raises(BuildError, match=r"cannot build the network: .*not supported by a dedicated kernel"):
        TARGET.compile(rank.graph, build_for(["8.9"], fused_attention_only=True), tmp_path, 0, rank.weights)
    assert not list(tmp_path.iterdir())


@with_rtx
@pytest.mark.usefixtures("rtx")
@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without a GPU")
@pytest.mark.parametrize("option", ["strip_plan", "refit"])
def test_what_needs_a_gpu_to_build_says_so(option: str, tmp_path: Path) -> None:
    rank = dummy_rank(4, 16, DType.FLOAT16)
    with pytest.raises(BuildError, match="strip_plan and refit may need a GPU to build"):
        TARGET.compile(rank.graph, build_for(["8.9"], **{option: True}), tmp_path, 0, rank.weights)


@with_rtx
@pytest.mark.usefixtures("rtx")
def test_what_tensorrt_rtx_has() -> None:
    flavour = find_flavour("tensorrt_rtx")
    assert {"8.0", "8.6", "8.9", "12.0"} <= set(flavour.compute_capabilities)
    assert flavour.native_attention
    assert not flavour.plugins


def test_profiles() -> None:
    """Decode takes every sequence; prefill as many of the longest prompts as max_num_tokens holds."""
    build = BuildConfig(max_batch_size=16, max_input_len=512, max_seq_len=1024, max_num_tokens=2048)
    assert profiles(build) == (
        Profile("decode", (1, 16, 16), (1, 1, 1)),
        Profile("prefill", (1, 4, 4), (1, 512, 512)),
    )


def test_prefill_profile_when_a_prompt_needs_several_steps() -> None:
    build = BuildConfig(max_batch_size=16, max_input_len=512, max_seq_len=1024, max_num_tokens=128)
    assert profiles(build)[1] == Profile("prefill", (1, 1, 1), (1, 128, 128))


def test_shapes_of_a_network_over_pages() -> None:
    """Smallest, usual and largest step: every input of packed.py, and the caches of the attention plugin."""
    build = BuildConfig(
        max_batch_size=4,
        max_input_len=60,
        max_seq_len=70,
        max_num_tokens=128,
        page_size=16,
        target="tensorrt",
    )
    decode, prefill = packed_profiles(build)
    ends = {
        "token_ids": ((-1,), [(1,), (4,), (4,)], [(1,), (128,), (128,)]),
        "query_start": ((-1,), [(2,), (5,), (5,)], [(2,), (5,), (5,)]),
        "kv_length": ((-1,), [(1,), (4,), (4,)], [(1,), (4,), (4,)]),
        "logits_index": ((-1,), [(1,), (4,), (4,)], [(1,), (4,), (4,)]),
        "page_table": ((-1, -1), [(1, 1), (4, 5), (4, 5)], [(1, 1), (4, 5), (4, 5)]),
        "k_cache.0": ((-1, 2, 16, 64), [(1, 2, 16, 64), *[(20, 2, 16, 64)] * 2], [(1, 2, 16, 64), *[(20, 2, 16, 64)] * 2]),
    }  # fmt: skip
    for name, (declared, *expected) in ends.items():
        tensor = SimpleNamespace(name=name, shape=declared)
        found = [
            [_shape(tensor, profile, build, which) for which in range(3)] for profile in (decode, prefill)
        ]
        assert found == expected, name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flavor": "tensorrt"}, "unknown: flavor"),
        (
            {"flavour": "tensorrt_llm"},
            "flavour 'tensorrt_llm' is not known; accepted: tensorrt, tensorrt_rtx",
        ),
        ({"optimization_level": 9}, "optimization_level is 9; accepted: 0 to 5"),
        ({"compute_capabilities": ["8.9", "8.9"]}, "compute_capabilities names a GPU twice"),
        ({"compute_capabilities": "8.9"}, "compute_capabilities is '8.9'; accepted: a list"),
        ({"tf32": "yes"}, "tf32 is 'yes'; accepted: true, false"),
        ({"attention_plugin": 1}, "attention_plugin is 1; accepted: true, false"),
        ({"context_fmha": "on"}, "context_fmha is 'on'; accepted: disable, enable, fp32_acc"),
        (
            {"context_fmha": "disable", "attention_plugin": True},
            "in several layers, attention_plugin in one kernel",
        ),
        (
            {"context_fmha": "fp32_acc", "fused_attention_only": True},
            "several layers, fused_attention_only in one",
        ),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TARGET.capabilities(replace(BUILD, target_options=options))


@pytest.mark.parametrize(
    ("flavour", "options", "message"),
    [
        (
            RTX,
            TensorRTOptions(compute_capabilities=("9.0",)),
            "no plan for compute capability 9.0; accepted: 8.0, 8.9",
        ),
        (
            RTX,
            TensorRTOptions(timing_cache="cache"),
            "times no kernels while it builds; leave timing_cache out",
        ),
        (DATA_CENTRE, TensorRTOptions(compute_capabilities=("8.9",)), "builds for the GPU it runs on"),
    ],
)
def test_options_a_flavour_does_not_have_are_refused(
    flavour: Flavour, options: TensorRTOptions, message: str
) -> None:
    with pytest.raises(BuildError, match=message):
        options.require(flavour)


def test_absent_tensorrt_is_reported_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr("importlib.import_module", missing)
    find_flavour.cache_clear()
    with pytest.raises(TargetError, match=r"No module named 'tensorrt'.*pip install 'trtc\[tensorrt-rtx\]'"):
        find_flavour()


def test_unknown_flavour_is_named() -> None:
    with pytest.raises(TargetError, match="'trt' is not known; accepted: tensorrt, tensorrt_rtx"):
        find_flavour("trt")
