"""Engines of several ranks for target cuda, without a GPU. Oracle: the graph of one rank, in float64."""

from __future__ import annotations

import dataclasses
from collections import Counter
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from trtc.core.build import build_engine, plan
from trtc.core.dtypes import DType
from trtc.core.engine import Engine
from trtc.core.errors import BuildError, EngineError
from trtc.core.graph import Graph, GraphBuilder
from trtc.core.interpreter import interpret
from trtc.core.ops import ReferenceContext, get_op, op_names
from trtc.core.ops.norm import NORMS
from trtc.core.passes.stage import STAGE_INPUT
from trtc.core.quantize.scheme import QuantizeOptions, WeightFormat
from trtc.core.quantize.source import nearest
from trtc.core.sharding import ShardingOptions
from trtc.core.targets.base import CacheShape
from trtc.core.targets.cuda import program as program_module
from trtc.core.targets.cuda.code import code_file, kernel_sources, read_code
from trtc.core.targets.cuda.program import CudaProgram
from trtc.core.targets.cuda.variants import decode_graph, prefill_graph, rank_graph
from trtc.kernels.library import KernelLibrary
from trtc.kernels.sampling import ADVANCE_ENTRY
from trtc.tests.opt_models import BUILD, OptCheckpoint, save_hf
from trtc.tests.packed_steps import PagedSequences, filled_cache
from trtc.tests.thread_group import RankCommunicator, run_ranks
from trtc.tests.tolerances import FLOAT64_ABS, max_error
from trtc.tests.toy_decoder import random_weights, weight_rows

CUDA = {"target": "cuda", "target_options": {"architectures": ["sm_90"]}}
EMBEDDINGS = {
    "none": ShardingOptions(2),
    "vocabulary": ShardingOptions(2, True, 0),
    "hidden": ShardingOptions(2, True, 1),
}
PROMPT = {"a": [3, 4, 5], "b": list(range(20))}
TOKEN = {"a": [7], "b": [8]}

Rank = tuple[Graph, dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory):
    def opened(variant: str) -> OptCheckpoint:
        return OptCheckpoint.open(save_hf(variant, tmp_path_factory.mktemp("hf")))

    return opened


def planned(
    source: OptCheckpoint, sharding: ShardingOptions, rank: int, how: WeightFormat | None = None
) -> Rank:
    """The graph that the engine of a rank would have, and its weights in float64, or as integers with scales in float64."""
    model = dataclasses.replace(source.config, dtype=DType.FLOAT16)
    build = dataclasses.replace(BUILD, tp_size=sharding.tp_size, pp_size=sharding.pp_size, **CUDA)
    if how is None:
        parts = plan(source.family, model, source.weights(DType.FLOAT16, sharding), build, rank)
        exact = source.weights(sharding=sharding)
    else:
        exact = nearest(QuantizeOptions(how))(source.weights(DType.FLOAT16, sharding))
        parts = plan(source.family, model, exact, build, rank)
    member = sharding.place(rank)[1]
    graphs = (parts.graph, *parts.recipes.values())  # a last stage reads the tied head itself
    read = {node.name for graph in graphs for node in graph.weights} - parts.recipes.keys()
    raw = {name: exact.read(member, name) for name in {*exact.names(member), *read}}
    raw = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in raw.items()}
    made = {name: interpret(recipe, raw) for name, recipe in parts.recipes.items()}
    return parts.graph, raw | made


def expected_logits(source: OptCheckpoint, how: WeightFormat | None = None) -> list[torch.Tensor]:
    """Of a prompt and a token after it, by the graph of one rank."""
    graph, weights = planned(source, ShardingOptions(), 0, how)
    cache, sequences = filled_cache(graph, 16, 32, torch.float64), PagedSequences(16, 32)
    steps = [sequences.step(PROMPT), sequences.step(TOKEN)]
    return [interpret(graph, weights | step, ReferenceContext(cache)) for step in steps]


@pytest.mark.parametrize("embedding", EMBEDDINGS)
@pytest.mark.parametrize(
    ("variant", "how"),
    [
        ("cuda_pre_norm", None),
        ("cuda_pre_norm", WeightFormat("int8")),
        ("cuda_post_norm_projected", None),
        ("cuda_bias_free_gelu", None),
        ("cuda_bias_free_gelu", WeightFormat("int4", 64)),
    ],
    ids=str,
)
def test_ranks_compute_what_one_does(
    variant: str, how: WeightFormat | None, embedding: str, checkpoint
) -> None:
    """Prefill and decode graphs as the program of each rank rewrites them, ranks in threads that really exchange."""
    source = checkpoint(variant)
    parts = [planned(source, EMBEDDINGS[embedding], rank, how) for rank in range(2)]

    def run(rank: int, group: RankCommunicator) -> torch.Tensor:
        graph, weights = parts[rank]
        context = ReferenceContext(filled_cache(graph, 16, 32, torch.float64), group)
        sequences, first = PagedSequences(16, 32), rank == 0
        prefill = rank_graph(prefill_graph(graph), first=first, residuals=False)
        decode = rank_graph(decode_graph(graph, rows=1, capability=90), first=first, residuals=True)
        prompt = interpret(prefill, weights | sequences.step(PROMPT), context)
        return torch.cat([prompt, interpret(decode, weights | sequences.step(TOKEN), context)])

    expected = torch.cat(expected_logits(source, how))
    for found in run_ranks(2, run):
        assert max_error(found, expected) <= FLOAT64_ABS


def test_a_vocabulary_that_is_split_is_held_once(checkpoint) -> None:
    """As lookup and as head; otherwise the last norm's scale goes into a head of its own, which that norm then rides in."""
    source = checkpoint("cuda_pre_norm")
    vocab, hidden = source.config.vocab_size, source.config.hidden_size
    held = {}
    for name, sharding in EMBEDDINGS.items():
        graph, _ = planned(source, sharding, 1)
        matrices = [node.outputs[0].shape for node in graph.weights if node.outputs[0].rank == 2]
        held[name] = sum(1 for shape in matrices if set(shape) & {vocab, vocab // 2})
        assert [node.op for node in graph.nodes if node.op == "layer_norm" and len(node.inputs) > 1] == (
            ["layer_norm"] if name == "vocabulary" else []
        )
    assert (
        held == {"none": 2, "vocabulary": 1, "hidden": 2}
        and vocab % 2 == 0
        and hidden not in (vocab, vocab // 2)
    )


VIEWS = {"input", "weight", "reshape", "split", "cast"}


def test_a_decode_step_of_a_rank_has_seven_kernels_a_layer(checkpoint) -> None:
    """The five of one rank and two sums: nothing is added outside of a product or a norm, and norms without weights stay
    inside of products, others in the sums before them."""
    for rank, how in product(range(2), (None, WeightFormat("int8"))):
        linear, summed, norm = (
            ("linear", "all_reduce", [])
            if how is None
            else ("quantized_linear", "all_reduce_norm", ["layer_norm"])
        )  # before there are integers, a norm has weights of its own
        layer = [linear, "attention", linear, summed, linear, linear, summed]
        graph, _ = planned(checkpoint("cuda_pre_norm"), EMBEDDINGS["none"], rank, how)
        decode = rank_graph(decode_graph(graph, rows=1, capability=90), first=rank == 0, residuals=True)
        work = [node.op for node in decode.nodes if node.op not in VIEWS]
        last = [*layer[:-1], "all_reduce"]  # before the head, which is no integers and norms its input
        assert work == ["embedding", *norm, *layer, *last, "linear", "all_gather"]
        sums = [node for node in decode.nodes if node.op.startswith("all_reduce")]
        parts = [decode.producers[node.used[0]] for node in sums]
        weights = 1 if how is None else 2
        # Bias and residual; but a residual goes into the norm that follows, if there is one.
        added = [2, 2, 2, 2] if how is None else [1, 1, 1, 2]
        expected = [1 + weights + (count if rank == 0 else 0) for count in added]
        assert [len(part.used) for part in parts] == expected


def test_ranks_sum_alike_where_two_blocks_read_one_tensor() -> None:
    """x + attention(x) + mlp(x), of which the first sum is read by the second alone: a rank that leaves out what the first one
    adds would leave out a collective. Oracle: the same sums, written out."""
    rows = weight_rows(table=(11, 8), out=(8, 8), fc2=(8, 8), bias=(8,))
    g = GraphBuilder(DType.FLOAT32, rows)
    x = total = g.add("embedding", "token_ids", g.weight("table"), name="x", offset=0)
    for name in ("out", "fc2"):
        part = g.add("linear", x, g.weight(name), name=f"{name}.part")
        whole = g.add("all_reduce", part, name=f"{name}.sum", tp_size=2)
        biased = g.add("add", whole, g.weight("bias"), name=f"{name}.biased")
        total = g.add("add", total, biased, name=f"{name}.total")
    graph = g.finish(total)
    weights = [random_weights(graph), {k: 2 * v for k, v in random_weights(graph).items()}]
    shared = {name: weights[0][name] for name in ("table", "bias")}
    inputs = PagedSequences(16, 4).step({"a": [3, 1, 4]})

    ranks = [rank_graph(graph, first=rank == 0, residuals=True) for rank in range(2)]
    for one in ranks:  # before they wait for each other
        assert [node.name for node in one.nodes if node.op == "all_reduce"] == ["out.sum", "fc2.sum"]

    def run(rank: int, group: RankCommunicator) -> torch.Tensor:
        return interpret(ranks[rank], {**weights[rank], **shared, **inputs}, ReferenceContext((), group))

    x_value = shared["table"][inputs["token_ids"].long()]
    products = sum(x_value @ w[name].T for w in weights for name in ("out", "fc2"))
    for found in run_ranks(2, run):
        assert max_error(found, x_value + products + 2 * shared["bias"]) <= FLOAT64_ABS


def test_sums_of_more_rows_are_made_with_the_norms_behind_them(checkpoint) -> None:
    """Where no product norms its rows: residual, sum and norm are one kernel; and so after every layer of a post-norm model."""
    for variant, rows, before in (
        ("cuda_pre_norm", 32, ["embedding", "embedding", "all_reduce_norm"]),
        ("cuda_pre_norm", 128, ["embedding", "embedding", "all_reduce_norm"]),
        ("cuda_post_norm_projected", 32, ["embedding", "all_reduce", "embedding", "linear"]),
    ):
        graph, _ = planned(checkpoint(variant), EMBEDDINGS["vocabulary"], 1)
        decode = decode_graph(graph, rows=rows, capability=90, fuse_residuals=rows <= 64)
        work = [
            node.op
            for node in rank_graph(decode, first=False, residuals=rows <= 64).nodes
            if node.op not in VIEWS
        ]
        layer = ["linear", "attention", "linear", "all_reduce_norm", "linear", "linear", "all_reduce_norm"]
        last = ["linear"] * (len(work) - len(before) - 2 * len(layer) - 1)
        assert work == [*before, *layer * 2, *last, "all_gather"] and len(last) in (1, 2)


def reference_norm(x, scale, shift, *, out, residual, total, kind: str, epsilon: float) -> None:
    """In place of the launcher of the norm kernels."""
    if residual is not None:
        total.copy_(x + residual)
        x = total
    out.copy_(NORMS[kind](x, scale, shift, epsilon))


@pytest.mark.parametrize("variant", ["cuda_post_norm_projected", "cuda_pre_norm"])
@pytest.mark.parametrize("norming", [False, True], ids=["sum, then norm", "in one kernel"])
def test_the_program_exchanges_through_its_communicator(
    norming: bool, variant: str, checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real program of every rank, its kernels replaced by references: prompts, through the collectives."""
    monkeypatch.setattr(program_module, "LayerNorm", lambda _: reference_norm)
    source = checkpoint(variant)
    fused: list[tuple[bool, bool, bool]] = []
    parts = [planned(source, EMBEDDINGS["vocabulary"], rank) for rank in range(2)]
    overwritten: list[bool] = []

    class Watching:
        def __init__(self, group: RankCommunicator) -> None:
            self.all_gather, self._group = group.all_gather, group

        def all_reduce(self, x: torch.Tensor, *, overwrite: bool = False) -> torch.Tensor:
            overwritten.append(overwrite)
            total = self._group.all_reduce(x.clone())  # threads hand each other their very tensors
            return x.copy_(total) if overwrite else total

    class Norming(Watching):
        """As one kernel: what it is given is what it may write."""

        def norms(self, x: torch.Tensor) -> bool:
            return True

        def all_reduce_norm(self, x, scale, shift, *, out, residual, total, kind, epsilon) -> None:
            fused.append((residual is not None, total is not None, total is x))
            found = self._group.all_reduce(x.clone())
            found = found if residual is None else found + residual
            out.copy_(NORMS[kind](found, scale, shift, epsilon))
            if total is not None:
                total.copy_(found)

    def run(rank: int, group: RankCommunicator) -> torch.Tensor:
        graph, weights = parts[rank]
        cache = filled_cache(graph, 16, 32, torch.float64)
        context = ReferenceContext(cache)
        computed = op_names() - {"input", "weight", "all_reduce", "all_reduce_norm", "all_gather"}
        program = CudaProgram(
            graph,
            weights,
            cache,
            KernelLibrary(),
            accumulation="float32",
            max_kv_length=128,
            kernels={
                op: lambda node: partial(get_op(node.op).reference, context, node.attrs) for op in computed
            },
            communicator=(Norming if norming else Watching)(group),
            rank=rank,
        )
        sequences = PagedSequences(16, 32)
        steps = [sequences.step(PROMPT), sequences.step(TOKEN)]
        return torch.cat([program.prefill(step, None, None) for step in steps])

    expected = torch.cat(expected_logits(source))
    for found in run_ranks(2, run):
        assert max_error(found, expected) <= FLOAT64_ABS
    # Of products and lookups of their own, which nobody reads again.
    assert all(overwritten) and bool(overwritten) == (not norming or variant != "cuda_pre_norm")
    # Of a layer's two, and of the lookup where a norm follows it: with a residual, the sum kept where it is one in turn.
    kept = [(True, True, True)] * 4 if variant == "cuda_pre_norm" else [(True, False, False)] * 3
    assert Counter(fused) == Counter([*kept, (True, False, False)] * 2 * len(parts) if norming else [])


@pytest.mark.parametrize("embedding", EMBEDDINGS)
def test_an_engine_carries_the_kernels_of_all_its_ranks(embedding: str, checkpoint, tmp_path: Path) -> None:
    """Odd sizes: three heads over two ranks, 101 tokens of the vocabulary."""
    source, sharding = checkpoint("cuda_head_dim_80_odd_vocabulary"), EMBEDDINGS[embedding]
    model = dataclasses.replace(source.config, dtype=DType.FLOAT16)
    build = dataclasses.replace(BUILD, tp_size=2, **CUDA)
    folder = tmp_path / "engine"
    build_engine(source.family, model, source.weights(DType.FLOAT16, sharding), build, folder)
    engine = Engine.open(folder)
    contents = engine.ranks[0].artifacts["code"]["sm_90"]
    carried = {entry for one, _, _ in read_code(contents, "sm_90", folder) for entry in one.entries}
    for part in engine.ranks:
        shape = CacheShape.of(part.graph, build.page_size)
        assert shape.num_kv_heads == 2
        wanted = kernel_sources(part.graph, shape, build.max_batch_size, "sm_90", "float16")
        assert {entry for one in wanted for entry in one.entries} <= carried
    for name in engine.ranks[0].weights:  # rank 1 needs its own weights and the kernels, and no other file
        (folder / name).unlink()
    Engine.open(folder, rank=1)
    (folder / code_file("sm_90")).unlink()
    with pytest.raises(EngineError, match=code_file("sm_90")):
        Engine.open(folder, rank=1)


def test_a_split_that_the_kernels_do_not_take_is_refused(checkpoint) -> None:
    """Of 256 features of the feed-forward layer, three ranks have 86 each."""
    with pytest.raises(BuildError, match="target cuda: linear: in_features=86 is not a multiple of 8"):
        planned(checkpoint("cuda_head_dim_80_odd_vocabulary"), ShardingOptions(3), 0)


def test_every_stage_of_a_pipeline_has_the_kernels_of_its_layers(checkpoint, tmp_path: Path) -> None:
    """The head is in the last stage alone, the lookup in the first; ranks of a stage share a file."""
    source = checkpoint("cuda_post_norm_projected")
    model = dataclasses.replace(source.config, dtype=DType.FLOAT16)
    build = dataclasses.replace(BUILD, tp_size=2, pp_size=2, **CUDA)
    weights = source.weights(DType.FLOAT16, ShardingOptions(2, pp_size=2))
    folder = tmp_path / "engine"
    build_engine(source.family, model, weights, build, folder)
    engine = Engine.open(folder)
    assert {code_file("sm_90"), code_file("sm_90", 1)} == {n for n in engine.files if n.startswith("kernels")}
    for rank, part in enumerate(engine.ranks):
        stage = rank // 2
        contents = engine.ranks[2 * stage].artifacts["code"]["sm_90"]
        carried = {
            entry for one, _, _ in read_code(contents, "sm_90", folder, stage) for entry in one.entries
        }
        shape = CacheShape.of(part.graph, build.page_size)
        wanted = kernel_sources(part.graph, shape, build.max_batch_size, "sm_90", "float16")
        assert {entry for one in wanted for entry in one.entries} <= carried
        assert ADVANCE_ENTRY in carried and shape.layers == 1
        assert (STAGE_INPUT in part.graph.specs) == (stage == 1)


def test_a_build_reads_every_weight_once(checkpoint, tmp_path: Path) -> None:
    """Norms go into weights and biases of the layers behind them, each made of the same matrix."""
    source = checkpoint("cuda_pre_norm")
    model = dataclasses.replace(source.config, dtype=DType.FLOAT16)
    weights = source.weights(DType.FLOAT16)
    read, counts = weights.read, Counter[str]()

    def counting(rank: int, name: str) -> torch.Tensor:
        counts[name] += weights.weight(name).shape[1:] != ()
        return read(rank, name)

    weights.read = counting  # type: ignore[method-assign]
    build_engine(source.family, model, weights, dataclasses.replace(BUILD, **CUDA), tmp_path / "engine")
    assert "layers.0.mlp.fc1.bias.normed" in Engine.open(tmp_path / "engine").ranks[0].graph.specs
    assert (
        counts["layers.0.mlp.fc1.weight"] == 1 and max(counts.values()) == 2
    )  # the embedding is the head, too


@pytest.mark.parametrize("variant", ["cuda_pre_norm", "cuda_post_norm_projected"])
def test_stages_compute_what_one_rank_does(variant: str, checkpoint) -> None:
    """Prefill and decode graphs as each of two stages rewrites them, one after the other, in float64."""
    source = checkpoint(variant)
    sharding = ShardingOptions(pp_size=2)
    parts = [planned(source, sharding, rank) for rank in range(2)]
    caches = [filled_cache(graph, 16, 32, torch.float64) for graph, _ in parts]
    sequences = PagedSequences(16, 32)
    found = []
    for step, rewrite in (
        (PROMPT, prefill_graph),
        (TOKEN, partial(decode_graph, rows=1, capability=90)),
    ):
        inputs = sequences.step(step)
        for (graph, weights), cache in zip(parts, caches, strict=True):
            x = interpret(rewrite(graph), weights | inputs, ReferenceContext(cache))
            inputs = inputs | {STAGE_INPUT: x}
        found.append(x)
    assert max_error(torch.cat(found), torch.cat(expected_logits(source))) <= FLOAT64_ABS
