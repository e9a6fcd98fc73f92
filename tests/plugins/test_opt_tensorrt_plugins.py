"""OPT's TensorRT plugins, on NVIDIA's own plugin classes, and whole networks with them.

Oracle: shapes and launches of the launchers in kernels/; the kernels' float64 references in place of the launches, decoded
from the very arguments that TensorRT would pass; transformers, for the logits of whole networks. The launches themselves
need a GPU: tests/gpu/test_tensorrt_plugins.py.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from trtc.core.dtypes import DType
from trtc.core.engine import Engine, RankPart
from trtc.core.errors import BuildError
from trtc.core.sharding import ShardingOptions
from trtc.core.targets.tensorrt import plugin_lowerings
from trtc.core.targets.tensorrt.flavour import Flavour
from trtc.core.targets.tensorrt.lookup import fuse_positions_before_all_reduce
from trtc.core.targets.tensorrt.lower import LoweringOptions, lower_graph
from trtc.core.targets.tensorrt.network import Network
from trtc.core.targets.tensorrt.options import TensorRTOptions
from trtc.kernels.append_kv.reference import append_kv
from trtc.kernels.context_attention.plan import ContextPlan
from trtc.kernels.context_attention.reference import context_attention
from trtc.kernels.embedding.reference import embedding
from trtc.kernels.nvrtc import CI_ARCHITECTURES, compile_kernel
from trtc.kernels.paged import LOG2_E
from trtc.kernels.tensorrt_aot import ATTENTION_SIGNATURE, SHARED_LIMIT, AotLaunch, lookup, paged_attention
from trtc.plugins.opt import tensorrt_plugins
from trtc.runtime.llm import LLM
from trtc.runtime.sampling_params import SamplingParams
from trtc.runtime.tensorrt_executor import PackedTensorRTExecutor, is_packed, packed_pages
from trtc.runtime.tensorrt_steps import PackedBatch, PaddedBatch
from trtc.tests.core.targets.tensorrt_opt import BUILD, CAPACITY, Rank, Session, ranks_of
from trtc.tests.opt_models import OptCheckpoint, hf_logits
from trtc.tests.packed_steps import PagedSequences
from trtc.tests.tensorrt_plugin_host import PluginLayer, data_centre
from trtc.tests.tolerances import LOGITS_FLOAT32_ABS, logits_tolerance, max_error
from trtc.tests.trt_interpreter import NetworkInterpreter

pytestmark = pytest.mark.tensorrt_rtx
Checkpoints = Callable[[str], OptCheckpoint]
PAGE_SIZE, NUM_PAGES = BUILD.page_size, 12


def run_attention(layer: PluginLayer, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """What the launch computes: the references, with what the scalars say."""
    q, k, v, k_cache, v_cache, query_start, kv_length, page_table = tensors
    launch = layer.launch([tuple(t.shape) for t in tensors])
    sequences, kv_heads, group, shift, pages, bits = launch.scalars
    assert (sequences, pages) == tuple(page_table.shape)
    assert (kv_heads, kv_heads * group, 1 << shift) == (k.shape[1], q.shape[1], k_cache.shape[2])
    (scale_log2,) = struct.unpack("=f", struct.pack("=i", bits))
    blocks = sum(-(-n // 64) for n in query_start.diff().tolist())
    assert launch.grid[0] == q.shape[1] and launch.grid[1] >= blocks, (
        "blocks of rows without a place in the grid"
    )
    args = (k, v, k_cache, v_cache, query_start, kv_length, page_table)
    return [context_attention(q, *args, scale=scale_log2 / LOG2_E), *append_kv(*args)]


def run_lookup(layer: PluginLayer, *tensors: torch.Tensor) -> list[torch.Tensor]:
    ids, table, *positions = tensors
    launch = layer.launch([tuple(t.shape) for t in tensors])
    columns, offset, rows, *rest = launch.scalars
    assert [rows, columns] == list(table.shape)
    assert (
        launch.grid[0] == len(ids) and launch.grid[1] * launch.block[0] * 16 >= columns * table.element_size()
    )
    if not positions:
        return [embedding(ids, table, offset=offset, masked=True)]
    position_offset, position_rows = rest
    assert position_rows == len(positions[1])
    return [embedding(ids, table, offset=offset, masked=True, position_ids=positions[0], position_table=positions[1],
                      position_offset=position_offset)]  # fmt: skip


EXECUTORS = {"paged_attention": run_attention, "lookup": run_lookup, "lookup_with_positions": run_lookup}


@contextmanager
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Flavour]:
    """The flavour `tensorrt`, as if on an A100."""
    monkeypatch.setattr(tensorrt_plugins, "architecture", lambda: "sm_80")
    tensorrt_plugins.define.cache_clear()
    with data_centre(EXECUTORS) as module:
        yield Flavour.of_module(module)
    tensorrt_plugins.define.cache_clear()


@pytest.fixture
def flavour(monkeypatch: pytest.MonkeyPatch) -> Iterator[Flavour]:
    with host(monkeypatch) as found:
        yield found


def lowered(rank: Rank, flavour: Flavour, number: int = 0, **options: Any) -> Network:
    chosen = TensorRTOptions(flavour="tensorrt", **options)
    build = replace(
        BUILD, target_options={"context_fmha": chosen.context_fmha} if chosen.context_fmha else {}
    )
    graph = fuse_positions_before_all_reduce(rank.graph, number) if chosen.lookup_plugin else rank.graph
    lowering = LoweringOptions(kv_capacity=CAPACITY, plugins=plugin_lowerings(chosen, flavour, build))
    return lower_graph(graph, rank.weights, flavour, lowering)


def test_definition(flavour: Flavour, opt_checkpoint: Checkpoints) -> None:
    """Types, shapes and aliases as TensorRT is told them."""
    (rank,) = ranks_of(opt_checkpoint("cuda_pre_norm"), DType.FLOAT16)
    network = lowered(rank, flavour, attention_plugin=True)
    layers = network.definition.plugin_layers
    assert [layer.name for layer in layers] == [
        "layers.0.attention.attention",
        "layers.1.attention.attention",
    ]
    out, k_cache, v_cache = layers[1].outputs
    assert (out.name, tuple(out.shape), out.dtype.name) == (
        "layers.1.attention.attention",
        (-1, 4, 64),
        "HALF",
    )
    assert (k_cache.name, tuple(k_cache.shape)) == ("k_cache.1.updated", (-1, 4, PAGE_SIZE, 64))
    assert v_cache.name == "v_cache.1.updated"
    assert [layers[1].plugin.get_aliased_input(i) for i in range(3)] == [-1, 3, 4]
    named = {t.name: tuple(t.shape) for t in network.definition.network_inputs}
    assert named["token_ids"] == (-1,) and named["query_start"] == (-1,) and named["page_table"] == (-1, -1)
    assert not [
        i
        for i in range(network.definition.num_layers)
        if "ATTENTION" in network.definition.get_layer(i).type.name
    ]
    assert list(network.plugins) == ["attention"]


@pytest.mark.parametrize("dtype", [DType.FLOAT16, DType.BFLOAT16], ids=str)
def test_network_over_pages_gives_the_logits_of_transformers(
    dtype: DType, flavour: Flavour, opt_checkpoint: Checkpoints
) -> None:
    """Prompts of three lengths, chunks, and single tokens beside prompts, over shuffled pages; both plugins."""
    variant = "cuda_head_dim_80_odd_vocabulary"
    (rank,) = ranks_of(opt_checkpoint(variant), dtype, target_options={"lookup_plugin": True})
    network = lowered(rank, flavour, attention_plugin=True, lookup_plugin=True)
    assert list(network.plugins) == ["embedding", "attention"]
    interpreter = NetworkInterpreter(network.definition, flavour.trt)
    pages = PagedSequences(PAGE_SIZE, NUM_PAGES)
    caches = {t.name: torch.full((NUM_PAGES, *tuple(t.shape)[1:]), 1000.0, dtype=interpreter.torch_dtype(t))
              for t in interpreter.inputs if "_cache." in t.name}  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    texts: dict[str, list[int]] = {name: [] for name in "abc"}
    for lengths in [(70, 1, 32), (1, 5, 1), (1, 1, 1), (1, 31, 1)]:
        new = {
            name: torch.randint(96, (n,), generator=generator).tolist()
            for name, n in zip("abc", lengths, strict=True)
        }
        texts = {name: texts[name] + tokens for name, tokens in new.items()}
        outputs = interpreter.run({**pages.step(new, last_rows_only=True), **caches})
        caches = {name: outputs[f"{name}.updated"] for name in caches}
        expected = torch.stack([hf_logits(variant, text)[-1] for text in texts.values()])
        assert max_error(outputs[interpreter.outputs[-1]], expected) <= logits_tolerance(dtype, expected)


class PackedSession:
    """A `PlanSession` over a network with plugins; its KV memory is pages."""

    def __init__(self, network: Network, num_pages: int) -> None:
        self.network, self.interpreter = network, NetworkInterpreter(network.definition, network.trt)
        self.caches = {t.name: torch.zeros(num_pages, *tuple(t.shape)[1:], dtype=self.interpreter.torch_dtype(t))
                       for t in self.interpreter.inputs if "_cache." in t.name}  # fmt: skip
        self.profiles: list[str] = []

    def run(self, batch: PaddedBatch | PackedBatch) -> torch.Tensor:
        self.profiles.append(batch.profile)
        feed = {name: torch.from_numpy(array) for name, array in batch.inputs.items()}
        outputs = self.interpreter.run({**feed, **self.caches})
        self.caches = {name: outputs[f"{name}.updated"] for name in self.caches}
        return outputs[self.interpreter.outputs[-1]]

    def close(self) -> None:
        self.caches.clear()


def test_executor_over_pages(flavour: Flavour, opt_checkpoint: Checkpoints) -> None:
    """Greedy tokens through the whole runtime: each is, by the float32 logits for what came before it, the best or within
    the type's error of it. Prompt logprobs want more rows than the plan gives at once."""
    variant = "cuda_pre_norm"
    checkpoint = opt_checkpoint(variant)
    (rank,) = ranks_of(checkpoint, DType.FLOAT16)
    network = lowered(rank, flavour, attention_plugin=True)
    artifacts = {"plan": "rank0.plan", "flavour": "tensorrt", "version": "11", "compute_capabilities": [],
                 "plugins": list(network.plugins), "profiles": []}  # fmt: skip
    part = RankPart(rank.graph, (), artifacts)
    engine = Engine(Path("engine"), checkpoint.config, BUILD, (part,), {}, "0")
    assert is_packed(engine)
    pages = packed_pages(engine)
    session = PackedSession(network, pages)
    llm = LLM.from_executor(PackedTensorRTExecutor(engine, session, pages))
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    prompts = [list(range(5, 35)), [9], [4, 5, 6, 7], list(range(40, 60)), [1, 2]]
    scored = replace(params, prompt_logprobs=0)
    for prompt, output in zip(prompts, llm.generate(prompts, [scored, *[params] * 4]), strict=True):
        new = list(output.outputs[0].token_ids)
        logits = hf_logits(variant, prompt + new)[len(prompt) - 1 : -1]
        chosen = logits[torch.arange(len(new)), torch.tensor(new)]
        assert len(new) == 12
        assert (logits.max(-1).values - chosen).max() <= 2 * logits_tolerance(DType.FLOAT16, logits)
    assert set(session.profiles) == {"decode", "prefill"}
    llm.core.check_integrity()


def test_vocabulary_shards_with_positions_on_one_rank(flavour: Flavour, opt_checkpoint: Checkpoints) -> None:
    """Two ranks with native attention and the lookup plugin; rank 0 adds the positions before the all-reduce."""
    sharding = ShardingOptions(2, use_parallel_embedding=True, embedding_sharding_dim=0)
    ranks = ranks_of(opt_checkpoint("vocabulary_odd"), sharding=sharding)
    networks = [lowered(rank, flavour, number, lookup_plugin=True) for number, rank in enumerate(ranks)]
    names = [[layer.plugin.plugin_name for layer in network.definition.plugin_layers] for network in networks]
    assert names == [["lookup_with_positions"], ["lookup"]]
    session = Session([NetworkInterpreter(n.definition, flavour.trt) for n in networks], 2)
    texts = [[100, 3, 50, 51], [7]]
    for new in (texts, [[1], [99]]):
        found = session.step(new)
        full = texts if new is texts else [text + token for text, token in zip(texts, new, strict=True)]
        expected = torch.stack([hf_logits("vocabulary_odd", text)[-1] for text in full])
        assert max_error(found[:, : expected.shape[-1]], expected) <= LOGITS_FLOAT32_ABS


def attention_launch(
    head_dim: int, dtype: str = "float16", accumulation: str = "float32", **sizes: int
) -> AotLaunch:
    known = {"num_tokens": 300, "num_seqs": 3, "pages_per_seq": 64, **sizes}
    return paged_attention(dtype=dtype, head_dim=head_dim, num_heads=8, num_kv_heads=2, page_size=16,
                           scale=head_dim**-0.5, accumulation=accumulation, **known)  # fmt: skip


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
@pytest.mark.parametrize("accumulation", ["float32", "float16"])
def test_launch_is_that_of_the_cuda_target(head_dim: int, accumulation: str) -> None:
    """Grid, block and shared memory, and what TensorRT's interface leaves out: no more shared memory than any launch has."""
    launch = attention_launch(head_dim, accumulation=accumulation)
    keys = int(launch.entry.split(",")[2])
    theirs = ContextPlan(300, 3, 8, head_dim, 64, keys, accumulation, False).launch_shape(dependent=False)
    assert (launch.grid[:2], (launch.block,), launch.shared_bytes) == (
        theirs.grid,
        theirs.block,
        theirs.shared_bytes,
    )
    assert launch.shared_bytes <= SHARED_LIMIT and not theirs.cluster
    assert launch.entry.endswith("true>") == (accumulation == "float16")


@pytest.mark.parametrize("arch", CI_ARCHITECTURES)
def test_ptx_assembles_and_takes_the_arguments_in_order(arch: str) -> None:
    """ptxas assembles it without spills; the PTX's parameters are inputs, scalars, outputs."""
    cases = [(attention_launch(64, "bfloat16"), ATTENTION_SIGNATURE), (attention_launch(128), ATTENTION_SIGNATURE),
             (lookup(dtype="float16", columns=768, table_rows=9, offset=-3, num_tokens=5), "PPiiiP"),
             (lookup(dtype="float32", columns=768, table_rows=9, offset=0, num_tokens=5, position_rows=4),
              "PPPPiiiiiP")]  # fmt: skip
    for launch, signature in cases:
        compiled = compile_kernel(launch.source, arch=arch)
        usage = compiled.resources[launch.entry]
        assert usage.spill_store_bytes == usage.spill_load_bytes == usage.shared_bytes == 0
        name = compiled.entries[launch.entry]
        (parameters,) = re.findall(rf"\.entry {re.escape(name)}\((.*?)\)", compiled.ptx.decode(), re.DOTALL)
        kinds = {".u64": "P", ".u32": "i"}
        found = "".join(
            kinds[kind] for kind in re.findall(r"\.param\s+(?:\.align \d+ )?(\.u\d+)", parameters)
        )
        assert found == signature and signature.count("i") == len(launch.scalars)


def test_ptx_of_the_plugin_is_that_of_the_gpu_it_is_built_on(
    flavour: Flavour, opt_checkpoint: Checkpoints
) -> None:
    (rank,) = ranks_of(opt_checkpoint("cuda_pre_norm"), DType.FLOAT16)
    for fmha, half in (("enable", "true"), ("fp32_acc", "false"), (None, "false")):
        network = lowered(rank, flavour, attention_plugin=True, context_fmha=fmha)
        layer = network.definition.plugin_layers[0]
        shapes = [(7, 4, 64)] * 3 + [(NUM_PAGES, PAGE_SIZE, 4, 64)] * 2 + [(3,), (2,), (2, 4)]
        launch = layer.launch(shapes)
        entry = f"trtc::paged_attention<__half, 64, 64, {half}>"
        expected = compile_kernel(attention_launch(64, accumulation="float16" if half == "true" else "float32").source,
                                  arch="compute_80")  # fmt: skip
        assert launch.kernel == expected.entries[entry]
        assert f".entry {launch.kernel}" in launch.ptx.decode() and ".target sm_80" in launch.ptx.decode()
        assert (launch.grid, launch.block) == ((4, 0 + 2, 1), (128, 1, 1))


def test_what_the_kernels_do_not_serve_is_refused(flavour: Flavour, opt_checkpoint: Checkpoints) -> None:
    (small,) = ranks_of(opt_checkpoint("pre_norm"), DType.FLOAT16)
    with pytest.raises(
        BuildError, match=r"node 'layers.0.attention.attention': .*head_dim 16 is not supported"
    ):
        lowered(small, flavour, attention_plugin=True)
    (wide,) = ranks_of(opt_checkpoint("cuda_pre_norm"))
    with pytest.raises(BuildError, match="dtype float32 is not supported"):
        lowered(wide, flavour, attention_plugin=True)
    (bfloat,) = ranks_of(opt_checkpoint("cuda_pre_norm"), DType.BFLOAT16)
    with pytest.raises(BuildError, match="accumulation in float16 takes float16 tensors"):
        lowered(bfloat, flavour, attention_plugin=True, context_fmha="enable")


def test_absent_plugins_are_named(flavour: Flavour) -> None:
    rtx = replace(flavour, name="tensorrt_rtx", plugins=False)
    for option in ("attention_plugin", "lookup_plugin"):
        options = TensorRTOptions(**{option: True})
        with pytest.raises(
            BuildError, match=f"takes no custom plugins; leave {option} out, or use flavour tensorrt"
        ):
            options.require(rtx)
    with pytest.raises(BuildError, match="brings a TensorRT plugin for op attention to tensorrt_rtx"):
        plugin_lowerings(TensorRTOptions(attention_plugin=True), rtx, BUILD)
