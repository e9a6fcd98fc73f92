"""The CPU target: whole programs, over every schedule of steps, with kernels of plugins; its cache and its options. Its own
kernels are tested one by one in test_cpu_kernels.py.

Oracle: the interpreter, which runs the op references node by node, in float64.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from trtc.core import layers
from trtc.core.config import BuildConfig
from trtc.core.dtypes import DType, to_torch
from trtc.core.errors import ConfigError
from trtc.core.graph import Graph, GraphBuilder, Node
from trtc.core.interpreter import interpret
from trtc.core.ops import ReferenceContext
from trtc.core.passes.cache import cache_type
from trtc.core.targets.base import CacheShape, get_target
from trtc.core.targets.cpu import CpuProgram, allocate_cache
from trtc.core.targets.cpu_attention import CompiledAttention
from trtc.core.targets.cpu_step import DecodeLimits
from trtc.kernels import cpu_step
from trtc.tests.packed_steps import PagedSequences, filled_cache
from trtc.tests.tolerances import logits_tolerance, max_error
from trtc.tests.toy_decoder import (
    HEAD_DIM,
    KV_HEADS,
    LAYERS,
    VOCAB,
    random_weights,
    toy_decoder,
    weight_rows,
)

NUM_PAGES = 24
Step = Mapping[str, Sequence[int]]


def tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


class Pair:
    """The program and the interpreter side by side, each with a cache of its own that starts full of NaN."""

    def __init__(
        self,
        page_size: int,
        dtype: DType = DType.FLOAT32,
        fill: float = float("nan"),
        *,
        compiled: bool = False,
        cache_dtype: DType | None = None,
    ) -> None:
        graph = cache_type(toy_decoder(dtype), cache_dtype)
        weights = {name: value.to(to_torch(dtype)) for name, value in random_weights(graph).items()}
        self.sequences = PagedSequences(page_size, NUM_PAGES)
        self._graph, self._dtype = graph, dtype
        cache = filled_cache(graph, page_size, NUM_PAGES, to_torch(cache_dtype or dtype), fill)
        limits = DecodeLimits(max_tokens=8, max_len=100) if compiled else None
        self._program = CpuProgram(graph, weights, cache, decode_limits=limits)
        assert self._program.decodes_greedily == compiled
        self._wide = {name: value.double() for name, value in weights.items()}
        self._context = ReferenceContext(filled_cache(graph, page_size, NUM_PAGES, torch.float64, fill))

    def check(self, work: Step, *, last_rows_only: bool = False) -> None:
        inputs = self.sequences.step(work, last_rows_only=last_rows_only)
        expected = interpret(self._graph, {**self._wide, **inputs}, self._context)
        logits = self._program.run(inputs)
        assert logits.dtype == torch.float32
        assert max_error(logits, expected) <= logits_tolerance(self._dtype, expected)


def schedules(page_size: int) -> dict[str, list[Step]]:
    """What a scheduler can ask for, with lengths on both sides of a page boundary."""
    p = page_size
    return {
        "prefill": [{"a": tokens(1)}, {"b": tokens(p - 1)}, {"c": tokens(p)}, {"d": tokens(2 * p + 1)}],
        "prefill together": [{"a": tokens(3), "b": tokens(p + 1, 1), "c": tokens(2 * p, 2)}],
        "chunked prefill": [
            {"a": tokens(p - 2)},
            {"a": tokens(5, 1)},
            {"a": tokens(p, 2)},
            {"a": tokens(2, 3)},
        ],
        "decode one": [{"a": tokens(p - 2)}, *({"a": tokens(1, i)} for i in range(5))],
        "decode together": [
            {"a": tokens(p - 2), "b": tokens(2 * p - 1, 1), "c": tokens(1, 2)},
            *({"c": tokens(1, i), "a": tokens(1, i + 1), "b": tokens(1, i + 2)} for i in range(5)),
        ],
        "mixed": [
            {"a": tokens(4)},
            {"a": tokens(1), "b": tokens(p + 3, 1)},
            {"b": tokens(p - 3, 2), "c": tokens(2, 3), "a": tokens(1, 4)},
            {"d": tokens(1, 5), "c": tokens(p, 6), "b": tokens(1, 7), "a": tokens(1, 8)},
            {"d": tokens(1, 9), "b": tokens(1, 10)},
        ],
    }


@pytest.fixture(params=["compiled", "torch"])
def attention(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways that attention may run; where there are no compiled kernels, the second one twice."""
    if request.param == "torch":
        monkeypatch.setattr(CompiledAttention, "compiles", staticmethod(lambda cache: False))


@pytest.mark.usefixtures("attention")
@pytest.mark.parametrize("page_size", [16, 32, 64])
@pytest.mark.parametrize("schedule", list(schedules(16)))
def test_every_schedule_agrees_with_the_interpreter(schedule: str, page_size: int) -> None:
    """Grouped heads, shuffled pages; slots never written hold NaN, so that reading one shows in both."""
    pair = Pair(page_size)
    for work in schedules(page_size)[schedule]:
        pair.check(work)


@pytest.mark.usefixtures("attention")
@pytest.mark.parametrize("dtype", [DType.FLOAT16, DType.BFLOAT16])
def test_16_bit_types_agree_within_their_tolerance(dtype: DType) -> None:
    pair = Pair(16, dtype)
    for work in schedules(16)["mixed"]:
        pair.check(work)


@pytest.mark.parametrize("schedule", list(schedules(16)))
def test_a_cache_of_fp8_agrees_with_the_interpreter(schedule: str) -> None:
    """Float32, so that what is rounded to eight bits is the same but for numbers next to the middle of two. Oracle: the
    interpreter, whose cache holds the rounded numbers in float64."""
    pair = Pair(16, cache_dtype=DType.FLOAT8_E4M3)
    for work in schedules(16)[schedule]:
        pair.check(work)


needs_kernels = pytest.mark.skipif(
    cpu_step.library() is None,
    reason="step.c is not compiled (setup.py build_ext --inplace) or needs AVX-512",
)


@needs_kernels
@pytest.mark.parametrize("dtype", [DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16])
@pytest.mark.parametrize("schedule", list(schedules(16)))
def test_compiled_decode_steps_agree_with_the_interpreter(schedule: str, dtype: DType) -> None:
    """Steps of one token a sequence run as one call, the others node by node, over one cache that starts full of NaN."""
    pair = Pair(16, dtype, compiled=True)
    for work in schedules(16)[schedule]:
        pair.check(work)


def guesses(page_size: int) -> list[Step]:
    """Several tokens of one sequence in a step, over page boundaries, beside sequences with one; the first have no past."""
    p = page_size
    return [
        {"a": tokens(4), "b": tokens(3, 1)},
        {"a": tokens(3, 2), "b": tokens(5, 3)},
        {"c": tokens(1, 4), "a": tokens(2, 5), "b": tokens(4, 6)},
        {"a": tokens(1, 7), "b": tokens(1, 8), "c": tokens(6, 9)},
        *({"a": tokens(8, i)} for i in range(p // 4)),
    ]


@needs_kernels
@pytest.mark.parametrize("dtype", [DType.FLOAT32, DType.FLOAT16])
@pytest.mark.parametrize("threads", [1, 3])
def test_compiled_steps_verify_several_tokens_of_a_sequence(dtype: DType, threads: int) -> None:
    """Oracles: the interpreter; and, to the last bit, the same tokens in steps of one token each. The caches start full of
    NaN, so that a token that sees one of those behind it, or that comes before one ahead of it, shows."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)  # with which compiled steps will run
    together, alone = Pair(16, dtype, compiled=True), Pair(16, dtype, compiled=True)
    torch.set_num_threads(before)
    for work in guesses(16):
        inputs = together.sequences.step(work)
        assert together._program.decodes_greedily and together._program._decodes(inputs)
        logits = together._program.run(inputs).clone()
        chosen = logits.argmax(-1)
        one_by_one = [
            alone._program.run(alone.sequences.step({name: [token]}))[0].clone()
            for name, new in work.items()
            for token in new
        ]
        assert torch.equal(logits, torch.stack(one_by_one))
        expected = interpret(together._graph, {**together._wide, **inputs}, together._context)
        assert max_error(logits, expected) <= logits_tolerance(dtype, expected)
        assert torch.equal(
            together._program.next_tokens(inputs).long(), chosen
        )  # which writes the same again


@needs_kernels
@pytest.mark.parametrize("op", ["layer_norm", "rms_norm", "split"])
def test_steps_with_ops_on_heads_are_not_taken_for_ones_on_rows(op: str) -> None:
    """Norms of q and k are over each head, and heads can be split: the compiled kernels know rows of a token only. Oracle: the
    interpreter."""
    width = 16 if op == "split" else 24
    rows = weight_rows(embed__weight=(VOCAB, 24), norm__weight=(8,), lm_head__weight=(VOCAB, width))
    g = GraphBuilder(DType.FLOAT32, rows)
    q = k = g.add("reshape", layers.embedding(g, "token_ids", "embed"), name="heads", shape=("T", 3, 8))
    if op == "split":
        q, k = g.add_many("split", q, name="parts", axis=1, sizes=(2, 1))
        g.weight("norm.weight")
    else:
        q = g.add(op, q, g.weight("norm.weight"), name="normed", eps=1e-5)
    starts = ("query_start", "kv_length", "page_table")
    context = g.add("attention", q, k, k, *starts, name="attention", layer=0, scale=1.0)
    graph = g.finish(layers.lm_head(g, g.add("reshape", context, name="context", shape=("T", width))))
    weights, sequences = random_weights(graph), PagedSequences(16, 4)
    program = CpuProgram(
        graph,
        {name: value.float() for name, value in weights.items()},
        filled_cache(graph, 16, 4, torch.float32),
        decode_limits=DecodeLimits(max_tokens=8, max_len=32),
    )
    context_of_oracle = ReferenceContext(filled_cache(graph, 16, 4, torch.float64))
    for work in ({"a": tokens(5)}, {"a": tokens(1, 2)}, {"a": tokens(1, 3)}):
        inputs = sequences.step(work)
        expected = interpret(graph, {**weights, **inputs}, context_of_oracle)
        assert max_error(program.run(inputs), expected) <= logits_tolerance(DType.FLOAT32, expected)


@needs_kernels
def test_compiled_steps_choose_the_token_with_the_largest_logit() -> None:
    """Oracle: the largest of all logits, in batches of every size up to the limit."""
    pair = Pair(16, compiled=True)
    names = "abcdefgh"
    pair.check({name: tokens(17 + i, i) for i, name in enumerate(names)})
    for i in range(1, len(names) + 1):
        inputs = pair.sequences.step({name: tokens(1, i) for name in names[:i]})
        logits = pair._program.run(inputs).clone()
        assert torch.equal(pair._program.next_tokens(inputs).long(), logits.argmax(-1))


def test_the_oracle_sees_a_wrong_page() -> None:
    """A check of the check: two sequences that swap their pages do not agree with the interpreter."""
    pair = Pair(16)
    pair.check({"a": tokens(20), "b": tokens(30, 1)})
    pages = pair.sequences._pages
    inputs = pair.sequences.step({"a": [1], "b": [2]})
    expected = interpret(pair._graph, {**pair._wide, **inputs}, pair._context)
    assert len(pages["a"]) == len(pages["b"]) == 2
    swapped = inputs | {"page_table": inputs["page_table"].flip(0)}
    assert max_error(pair._program.run(swapped), expected) > 0.1


def test_only_the_rows_asked_for_and_none() -> None:
    pair = Pair(16)
    pair.check({"a": tokens(18), "b": tokens(7)}, last_rows_only=True)
    inputs = pair.sequences.step({"c": tokens(4)})
    logits = pair._program.run(inputs | {"logits_index": inputs["logits_index"][:0]})
    assert logits.shape == (0, VOCAB)


def test_what_another_request_left_in_a_page_does_not_leak() -> None:
    """A request whose keys and values are not finite ends; its pages go to others. Oracle: the interpreter, which never
    looks at slots beyond a sequence's length."""
    pair = Pair(16, fill=0.0)
    pair.check({"bad": tokens(40), "a": tokens(3, 1)})
    for cache in (pair._program._attention._cache, pair._context.kv_cache):
        for part in (tensor for layer in cache for tensor in layer):
            part[pair.sequences._pages["bad"]] = float("inf")
    pair.sequences.release("bad")
    pair.check({"a": tokens(1), "b": tokens(5, 2), "c": tokens(33, 3)})
    for i in range(3):
        pair.check({"a": tokens(1, i), "b": tokens(1, i + 1), "c": tokens(1, i + 2)})


def test_a_kernel_of_a_plugin_takes_precedence() -> None:
    """Oracle: the graph with its activation replaced by the one the kernel computes."""
    graph = toy_decoder()
    weights = {name: value.float() for name, value in random_weights(graph).items()}
    seen: list[str] = []

    def relu(node: Node) -> Callable[..., torch.Tensor]:
        seen.append(node.name)
        return torch.relu

    def program(graph: Graph, **rest: Any) -> torch.Tensor:
        run = CpuProgram(graph, weights, filled_cache(graph, 16, 4, torch.float32), **rest).run
        return run(PagedSequences(16, 4).step({"a": tokens(9)}))

    changed = Graph(tuple(relu_node(node) for node in graph.nodes), graph.outputs).verify()
    result = program(graph, kernels={"activation": relu})
    assert seen == ["0.mlp.activation", "1.mlp.activation"]
    assert torch.equal(result, program(changed))
    assert not torch.equal(result, program(graph))


def test_what_a_kernel_raises_says_in_which_node() -> None:
    graph = toy_decoder()
    weights = {name: value.float() for name, value in random_weights(graph).items()}
    cache = filled_cache(graph, 16, 4, torch.float32)
    program = CpuProgram(graph, weights, cache, kernels={"activation": lambda node: lambda x: x.nothing})
    with pytest.raises(AttributeError) as error:
        program.run(PagedSequences(16, 4).step({"a": tokens(9)}))
    assert error.value.__notes__ == ["in activation '0.mlp.activation'"]


def relu_node(node: Node) -> Node:
    return (
        Node(node.name, node.op, node.inputs, {"kind": "relu"}, node.outputs)
        if node.op == "activation"
        else node
    )


def test_a_kernel_of_a_plugin_replaces_the_target_own() -> None:
    """Oracle: attention that gives zeros is attention over values of zero."""
    graph = toy_decoder()
    weights = {name: value.float() for name, value in random_weights(graph).items()}
    silent = {name: value * (".attention.v." not in name) for name, value in weights.items()}
    inputs = PagedSequences(16, 4).step({"a": tokens(9)})

    def zeros(node: Node) -> Callable[..., torch.Tensor]:
        return lambda q, *rest: torch.zeros_like(q)

    def result(weights: Mapping[str, torch.Tensor], **rest: Any) -> torch.Tensor:
        return CpuProgram(graph, weights, filled_cache(graph, 16, 4, torch.float32), **rest).run(inputs)

    assert torch.equal(result(weights, kernels={"attention": zeros}), result(silent))
    assert not torch.equal(result(weights), result(silent))


def test_the_program_forgets_tensors_that_nothing_reads_any_more() -> None:
    """Oracle: weak references: while the head runs, no activation of an earlier layer is alive."""
    graph = toy_decoder()
    weights = {name: value.float() for name, value in random_weights(graph).items()}
    alive: list[weakref.ref[torch.Tensor]] = []
    at_head: list[int] = []

    def gate(node: Node) -> Callable[..., torch.Tensor]:
        def silu(x: torch.Tensor) -> torch.Tensor:
            alive.append(weakref.ref(y := torch.nn.functional.silu(x)))
            return y

        return silu

    def select(node: Node) -> Callable[..., torch.Tensor]:
        def rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            at_head.append(sum(ref() is not None for ref in alive))
            return x.index_select(0, index)

        return rows

    kernels = {"activation": gate, "select_rows": select}
    program = CpuProgram(graph, weights, filled_cache(graph, 16, 4, torch.float32), kernels=kernels)
    program.run(PagedSequences(16, 4).step({"a": tokens(9)}))
    assert len(alive) == LAYERS
    assert at_head == [0]


def test_the_cache_has_the_shape_of_the_graph() -> None:
    graph = toy_decoder(DType.BFLOAT16)
    shape = CacheShape.of(graph, 32)
    assert shape == CacheShape(LAYERS, KV_HEADS, HEAD_DIM, DType.BFLOAT16, 32)
    assert shape.bytes_per_page == 2 * LAYERS * 32 * KV_HEADS * HEAD_DIM * 2
    cache = allocate_cache(shape, 5)
    assert len(cache) == LAYERS
    for part in (tensor for layer in cache for tensor in layer):
        assert part.shape == (5, 32, KV_HEADS, HEAD_DIM) and part.dtype == torch.bfloat16
        assert not part.any()


def test_a_cache_of_fp8_takes_half_the_memory() -> None:
    half, fp8 = (
        CacheShape.of(cache_type(toy_decoder(DType.FLOAT16), dtype), 32)
        for dtype in (None, DType.FLOAT8_E4M3)
    )
    assert 2 * fp8.bytes_per_page == half.bytes_per_page
    for part in allocate_cache(fp8, 5)[0]:
        assert part.shape == (5, 32, KV_HEADS, HEAD_DIM) and part.dtype is torch.float8_e4m3fn
        assert not part.view(torch.uint8).any()


def test_options_of_the_target_are_refused() -> None:
    build = BuildConfig(max_input_len=8, max_seq_len=16, target_options={"sm": 90})
    with pytest.raises(ConfigError, match="target cpu has no options, found: sm"):
        get_target("cpu").capabilities(build)


def test_targets_by_name() -> None:
    assert get_target("cpu").name == "cpu"
    with pytest.raises(ConfigError, match=r"target 'tpu' is unknown; accepted: cpu"):
        get_target("tpu")
