"""The OPT plugin, end to end: checkpoint -> engine -> LLM. Oracle: transformers, float32, on the same weights."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from trtc.bench import opt_sizes
from trtc.core import layers
from trtc.core.build import plan
from trtc.core.config import BuildConfig
from trtc.core.dtypes import DType
from trtc.core.errors import ConfigError, GraphError
from trtc.core.graph import GraphBuilder
from trtc.core.plugin_registry import plugins
from trtc.core.sharding import ShardingOptions
from trtc.core.weight_source import DummyWeights
from trtc.plugins.opt import config as opt_config
from trtc.plugins.opt import model as opt_model
from trtc.runtime.llm import LLM
from trtc.runtime.sampling_params import SamplingParams
from trtc.tests.engine_steps import engine_logits
from trtc.tests.opt_models import VARIANTS, OptCheckpoint, hf_config_fields, hf_logits, hf_model, hf_state
from trtc.tests.tolerances import LOGITS_FLOAT32_ABS, logits_tolerance, max_error

NEW_TOKENS = 64
PROMPT = [5, 17, 1, 90, 0, 23, 64, 2, 11]
"""Holds the padding, begin and end ids too: to a model they are tokens like the others."""
GREEDY = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)


def generate(engine_dir: Path, prompts: list[list[int]], params: SamplingParams = GREEDY) -> list[list[int]]:
    with LLM(engine_dir) as llm:
        return [list(output.outputs[0].token_ids) for output in llm.generate(prompts, params)]


def hf_error(engine_dir: Path, variant: str, token_ids: list[int], chunks: list[int] | None = None) -> float:
    logits = engine_logits(engine_dir, token_ids, chunks or [len(token_ids)])
    return max_error(logits, hf_logits(variant, token_ids))


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_tokens_and_logits_equal_transformers(variant: str, opt_engine: Callable[..., Path]) -> None:
    """Every one of 64 greedy tokens is what transformers puts first after the same tokens, and all logits agree, when
    the tokens come as one prompt and when they come as a prompt, a chunk and single tokens."""
    engine = opt_engine(variant)
    (new,) = generate(engine, [PROMPT])
    tokens = PROMPT + new
    logits = hf_logits(variant, tokens)
    assert logits[len(PROMPT) - 1 : -1].argmax(-1).tolist() == new
    assert len(new) == NEW_TOKENS
    assert len(set(new)) > 5, "a model that repeats itself proves little"
    in_steps = [len(PROMPT), 20, *[1] * (NEW_TOKENS - 20)]
    for chunks in ([len(tokens)], in_steps):
        assert hf_error(engine, variant, tokens, chunks) <= LOGITS_FLOAT32_ABS


@pytest.mark.parametrize("dtype", [DType.FLOAT16, DType.BFLOAT16])
@pytest.mark.parametrize(
    "variant", ["pre_norm", "post_norm_projected", "bias_free_non_affine_gelu", "head_dim_80"]
)
def test_16_bit_logits_are_close_to_float32(
    variant: str, dtype: DType, opt_engine: Callable[..., Path]
) -> None:
    """Oracle: transformers in float32. The error is above zero, too: the engine does compute in `dtype`."""
    tokens = PROMPT + list(range(30, 60))
    error = hf_error(opt_engine(variant, dtype), variant, tokens)
    assert LOGITS_FLOAT32_ABS < error <= logits_tolerance(dtype, hf_logits(variant, tokens))


@pytest.mark.parametrize("variant", ["pre_norm", "post_norm_projected"])
def test_prompts_batched_together_give_the_tokens_they_give_alone(
    variant: str, opt_engine: Callable[..., Path]
) -> None:
    """Oracles: the same engine with one prompt at a time, and transformers' own greedy search for the first prompt.
    Six prompts of different length do not fit max_batch_size 4 at once."""
    prompts = [list(range(3, 3 + size)) for size in (9, 1, 33, 16, 2, 57)]
    params = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
    together = generate(opt_engine(variant), prompts, params)
    assert together == [generate(opt_engine(variant), [prompt], params)[0] for prompt in prompts]
    searched = hf_model(variant).generate(
        torch.tensor(prompts[:1]), max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=1
    )
    assert together[0] == searched[0, 9:].tolist()


def write_checkpoint(folder: Path, source: Path, files: dict[str, dict[str, torch.Tensor]]) -> Path:
    """A checkpoint folder with the config.json of `source` and these files of tensors, with an index if several."""
    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    for name, tensors in files.items():
        if name.endswith(".safetensors"):
            safetensors.torch.save_file(
                {key: value.contiguous() for key, value in tensors.items()}, folder / name
            )
        else:
            torch.save(tensors, folder / name)
    if len(files) > 1:
        single = "model.safetensors" if next(iter(files)).endswith(".safetensors") else "pytorch_model.bin"
        places = {key: name for name, tensors in files.items() for key in tensors}
        (folder / f"{single}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def assert_same_weights(first: OptCheckpoint, second: OptCheckpoint) -> None:
    a, b = first.weights(), second.weights()
    assert a.names(0) == b.names(0)
    for name in a.names(0):
        assert torch.equal(a.read(0, name), b.read(0, name)), name


@pytest.mark.parametrize("variant", ["pre_norm", "post_norm_projected", "untied_head"])
@pytest.mark.parametrize("prefix", ["model.decoder.", "decoder.", "model.", ""])
def test_every_key_prefix_is_read(
    prefix: str, variant: str, tmp_path: Path, opt_checkpoint: Callable[[str], OptCheckpoint]
) -> None:
    """Oracle: the weights of the checkpoint as transformers saves it today, which the parity tests use."""
    original = opt_checkpoint(variant)
    state = {key.replace("model.decoder.", prefix): value for key, value in hf_state(variant).items()}
    folder = write_checkpoint(tmp_path / "hf", original.folder, {"model.safetensors": state})
    assert_same_weights(OptCheckpoint.open(folder), original)


@pytest.mark.parametrize(
    "names",
    [
        ["pytorch_model.bin"],
        ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
        ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"],
    ],
    ids=["bin", "sharded safetensors", "sharded bin"],
)
def test_every_file_layout_is_read(
    names: list[str], tmp_path: Path, opt_checkpoint: Callable[[str], OptCheckpoint]
) -> None:
    """Oracle: the weights of the same model in one safetensors file."""
    original = opt_checkpoint("untied_head")
    state = list(hf_state("untied_head").items())
    step = len(state) // len(names) + 1
    files = {name: dict(state[i * step : (i + 1) * step]) for i, name in enumerate(names)}
    assert_same_weights(
        OptCheckpoint.open(write_checkpoint(tmp_path / "hf", original.folder, files)), original
    )


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_new", "gelu_pytorch_tanh"])
def test_activation_names(activation: str) -> None:
    """Oracle: transformers' function of that name."""
    from transformers.activations import ACT2FN
    from trtc.core.ops.elementwise import ACTIVATIONS

    x = torch.linspace(-4, 4, 101, dtype=torch.float64)
    ours = ACTIVATIONS[opt_config.ACTIVATIONS[activation]](x)
    assert max_error(ours, ACT2FN[activation](x)) < 1e-12


@pytest.mark.parametrize("size", opt_sizes.SIZES)
def test_the_published_sizes_compose(size: str) -> None:
    """Graphs only. Oracles: transformers' model of the same config on the meta device has as many parameters, and so
    has about the model's name; the passes leave a graph that verifies, alone and shared by two ranks."""
    from transformers import OPTConfig, OPTForCausalLM

    fields = opt_sizes.opt_config(size)
    with torch.device("meta"):
        model: Any = OPTForCausalLM(OPTConfig(**fields))
    theirs = sum(p.numel() for p in model.parameters())
    family = plugins().family("opt")
    config = family.config(fields)
    weights = family.weight_table(config).expand(config)
    assert sum(int(np.prod(w.shape)) for w in weights if w.tied_to is None) == theirs
    named = float(size[:-1]) * {"m": 1e6, "b": 1e9}[size[-1]]
    assert 0.93 < theirs / named < 1.03
    assert family.compose(config).num_cache_layers == config.num_layers
    shallow = dataclasses.replace(config, num_layers=2)  # the passes treat every layer alike
    for tp_size in (1, 2):
        build = BuildConfig(max_input_len=1024, max_seq_len=2048, tp_size=tp_size)
        table, sharding = family.weight_table(shallow), ShardingOptions(tp_size=tp_size)
        source = DummyWeights(table, shallow, dtype=config.dtype, sharding=sharding)
        graph = plan(family, shallow, source, build, rank=tp_size - 1).graph
        # q, k, v as one, out, fc1, fc2 in every layer, and the head; 350M's projection of the output.
        assert sum(node.op == "linear" for node in graph.nodes) == 4 * 2 + 1 + (size == "350m")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "'hidden_size' is missing"),
        ({"num_attention_heads": 5}, "hidden_size 64 is not a multiple of num_attention_heads 5"),
        ({"activation_function": "swish"}, "'activation_function' is 'swish'; accepted: relu, gelu"),
        ({"ffn_dim": 0}, "'ffn_dim' is 0; accepted: a positive integer"),
        ({"do_layer_norm_before": "yes"}, "'do_layer_norm_before' is 'yes'; accepted: true or false"),
        ({"dtype": "int8"}, "dtype 'int8' is not supported"),
    ],
)
def test_config_errors_name_the_field(change: dict[str, Any], message: str) -> None:
    """Oracle: the messages' own contract: the field, its value and what is accepted."""
    fields = {**hf_config_fields("pre_norm"), **change}
    with pytest.raises(ConfigError, match=r"config.json: ") as error:
        plugins().family("opt").config(fields)
    assert message in str(error.value)


# ---- the tests above can fail: the plugin, broken on purpose, does not pass them ----------------------------------


def broken_error(variant: str, checkpoint: OptCheckpoint, folder: Path) -> float:
    tokens = PROMPT + list(range(30, 50))
    return hf_error(checkpoint.build(folder / "engine"), variant, tokens)


def test_a_wrong_position_offset_is_seen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, opt_checkpoint: Callable[[str], OptCheckpoint]
) -> None:
    monkeypatch.setattr(opt_model, "POSITION_OFFSET", 1)
    assert broken_error("pre_norm", opt_checkpoint("pre_norm"), tmp_path) > 1000 * LOGITS_FLOAT32_ABS


def test_swapped_queries_and_keys_are_seen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, opt_checkpoint: Callable[[str], OptCheckpoint]
) -> None:
    add = GraphBuilder.add

    def swapped(g: GraphBuilder, op: str, *inputs: str | None, **rest: Any) -> str:
        return add(g, op, *(inputs[1::-1] + inputs[2:] if op == "attention" else inputs), **rest)

    monkeypatch.setattr(GraphBuilder, "add", swapped)
    assert broken_error("pre_norm", opt_checkpoint("pre_norm"), tmp_path) > 1000 * LOGITS_FLOAT32_ABS


def test_a_dropped_final_norm_is_seen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, opt_checkpoint: Callable[[str], OptCheckpoint]
) -> None:
    """By the composition, which refuses to leave weights unused, and where a norm has none, by the logits."""
    layer_norm = layers.layer_norm

    def dropping(g: GraphBuilder, x: str, name: str, **rest: Any) -> str:
        return x if name == "final_norm" else layer_norm(g, x, name, **rest)

    monkeypatch.setattr(layers, "layer_norm", dropping)
    with pytest.raises(GraphError, match=r"never uses: final_norm.bias, final_norm.weight"):
        opt_checkpoint("pre_norm").build(tmp_path / "refused")
    variant = "bias_free_non_affine_gelu"
    assert broken_error(variant, opt_checkpoint(variant), tmp_path) > 1000 * LOGITS_FLOAT32_ABS
