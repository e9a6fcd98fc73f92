"""Lowered networks compute what the model computes, shown by executing the network definition in torch.

Oracle: `OPTForCausalLM` of transformers with the same random weights, in float32, each sequence alone and without
padding; the batch has three prompts of different lengths, then decodes 16 tokens through the KV-cache updates. The
graph comes from the plugin and has gone through the passes of a build.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from trtc.core.dtypes import DType
from trtc.core.graph import Graph, Node
from trtc.core.interpreter import interpret
from trtc.core.ops import ReferenceContext
from trtc.core.sharding import ShardingOptions
from trtc.core.targets.tensorrt import attend
from trtc.core.targets.tensorrt.flavour import find_flavour
from trtc.core.targets.tensorrt.lower import LoweringOptions, lower_graph
from trtc.core.targets.tensorrt.options import TensorRTOptions
from trtc.tests.core.targets.tensorrt_opt import CAPACITY, Rank, Session, ranks_of
from trtc.tests.opt_models import OptCheckpoint, hf_logits
from trtc.tests.packed_steps import PagedSequences, filled_cache
from trtc.tests.tolerances import LOGITS_FLOAT32_ABS, logits_tolerance, max_error
from trtc.tests.toy_decoder import VOCAB, random_weights, toy_decoder
from trtc.tests.trt_interpreter import NetworkInterpreter

trt = pytest.importorskip("tensorrt_rtx")
pytestmark = pytest.mark.tensorrt_rtx

Checkpoints = Callable[[str], OptCheckpoint]
PROMPT_LENGTHS = (5, 1, 9)
NEW_TOKENS = 16
SMALLEST_VOCABULARY = 96


def logits_of_steps(
    ranks: Sequence[Rank], variant: str, fmha: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [steps, B, V] of the ranks' networks and of the oracle, whose tokens both go on with."""
    options, flavour = lowering_options(fmha), find_flavour("tensorrt_rtx")
    networks = [lower_graph(rank.graph, rank.weights, flavour, options) for rank in ranks]
    session = Session([NetworkInterpreter(n.definition, trt) for n in networks], len(PROMPT_LENGTHS))
    generator = torch.Generator().manual_seed(1)
    new = [
        torch.randint(SMALLEST_VOCABULARY, (length,), generator=generator).tolist()
        for length in PROMPT_LENGTHS
    ]
    texts, found, wanted = [list(ids) for ids in new], [], []
    for _ in range(1 + NEW_TOKENS):
        found.append(session.step(new))
        wanted.append(torch.stack([hf_logits(variant, text)[-1] for text in texts]))
        new = [[token] for token in wanted[-1].argmax(-1).tolist()]
        texts = [text + token for text, token in zip(texts, new, strict=True)]
    expected = torch.stack(wanted)
    return torch.stack(found)[..., : expected.shape[-1]], expected


def lowering_options(fmha: str | None) -> LoweringOptions:
    return LoweringOptions(kv_capacity=CAPACITY, attend=attend(TensorRTOptions(context_fmha=fmha)))


@pytest.mark.parametrize(
    "variant",
    [
        "pre_norm",
        "post_norm_projected",
        "bias_free_non_affine_gelu",
        "head_dim_80",
        "five_heads",
        "untied_head",
    ],
)
def test_float32_logits_equal_transformers(variant: str, opt_checkpoint: Checkpoints) -> None:
    found, expected = logits_of_steps(ranks_of(opt_checkpoint(variant)), variant)
    assert max_error(found, expected) <= LOGITS_FLOAT32_ABS


@pytest.mark.parametrize("dtype", [DType.FLOAT16, DType.BFLOAT16], ids=str)
def test_16_bit_logits_are_close_to_transformers(dtype: DType, opt_checkpoint: Checkpoints) -> None:
    found, expected = logits_of_steps(ranks_of(opt_checkpoint("head_dim_80"), dtype), "head_dim_80")
    assert max_error(found, expected) <= logits_tolerance(dtype, expected)


@pytest.mark.parametrize("fmha", ["disable", "fp32_acc"])
def test_layered_attention(fmha: str, opt_checkpoint: Checkpoints) -> None:
    """--context-fmha in native attention: float32 logits; in float16, the type that scores and sums have."""
    found, expected = logits_of_steps(ranks_of(opt_checkpoint("five_heads")), "five_heads", fmha)
    assert max_error(found, expected) <= LOGITS_FLOAT32_ABS
    (rank,) = ranks_of(opt_checkpoint("head_dim_80"), DType.FLOAT16)
    network = lower_graph(rank.graph, rank.weights, find_flavour("tensorrt_rtx"), lowering_options(fmha))
    layers = {
        network.definition.get_layer(i).name: network.definition.get_layer(i)
        for i in range(network.definition.num_layers)
    }
    assert not [name for name, layer in layers.items() if "ATTENTION" in layer.type.name]
    parts = ("scores", "weights", "sums")
    types = {layers[f"layers.1.attention.attention/padded/{part}"].get_output(0).dtype.name for part in parts}
    assert types == {"FLOAT" if fmha == "fp32_acc" else "HALF"}
    found, expected = logits_of_steps([rank], "head_dim_80", fmha)
    assert max_error(found, expected) <= logits_tolerance(DType.FLOAT16, expected)


@pytest.mark.parametrize(
    "sharding",
    [
        ShardingOptions(2),
        ShardingOptions(2, use_parallel_embedding=True, embedding_sharding_dim=0),
        ShardingOptions(2, use_parallel_embedding=True, embedding_sharding_dim=1),
    ],
    ids=["whole embedding", "embedding split by rows", "embedding split by columns"],
)
def test_two_ranks_together_give_the_logits_of_one(
    sharding: ShardingOptions, opt_checkpoint: Checkpoints
) -> None:
    """Both ranks' networks are executed in lockstep, with real collectives. The odd vocabulary is padded."""
    ranks = ranks_of(opt_checkpoint("vocabulary_odd"), sharding=sharding)
    assert any(node.op == "all_reduce" for node in ranks[0].graph.nodes)
    found, expected = logits_of_steps(ranks, "vocabulary_odd")
    assert max_error(found, expected) <= LOGITS_FLOAT32_ABS


@pytest.mark.parametrize("fmha", [None, "fp32_acc"])
def test_grouped_query_attention_rotary_positions_and_uneven_steps(fmha: str | None) -> None:
    """Prefill, then steps in which some sequences decode while others go on with their prompt in chunks.

    Oracle: the same graph by the ops' references in float64, over pages, with nothing padded.
    """
    graph = toy_decoder()
    wide = random_weights(graph)
    weights = {name: value.float() for name, value in wide.items()}
    network = lower_graph(graph, weights, find_flavour("tensorrt_rtx"), lowering_options(fmha))
    session = Session([NetworkInterpreter(network.definition, trt)], 3)
    pages = PagedSequences(page_size=16, num_pages=8)
    context = ReferenceContext(filled_cache(graph, 16, 8, torch.float64))
    generator = torch.Generator().manual_seed(2)
    for lengths in [(7, 2, 1), (1, 6, 3), (1, 1, 1), (4, 1, 9)]:
        new = [torch.randint(VOCAB, (length,), generator=generator).tolist() for length in lengths]
        inputs = pages.step(dict(zip("abc", new, strict=True)), last_rows_only=True)
        expected = interpret(graph, {**inputs, **wide}, context)
        assert max_error(session.step(new), expected) <= LOGITS_FLOAT32_ABS


def without_position_offset(graph: Graph) -> Graph:
    def changed(node: Node) -> Node:
        return replace(node, attrs={**node.attrs, "offset": 0}) if node.attrs.get("offset") else node

    return replace(graph, nodes=tuple(map(changed, graph.nodes)))


def test_a_wrong_lowering_is_seen(opt_checkpoint: Checkpoints) -> None:
    """The comparison fails, and clearly, for two weights swapped and for a dropped position offset."""
    (rank,) = ranks_of(opt_checkpoint("pre_norm"))
    one, other = "layers.0.attention.out.weight", "layers.1.attention.out.weight"
    swapped = {**rank.weights, one: rank.weights[other], other: rank.weights[one]}
    for wrong in (Rank(rank.graph, swapped), Rank(without_position_offset(rank.graph), rank.weights)):
        assert max_error(*logits_of_steps([wrong], "pre_norm")) > 100 * LOGITS_FLOAT32_ABS
