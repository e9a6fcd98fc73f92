"""The plugin through a really built engine. Oracle: transformers' LlamaForCausalLM with the same random weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from trtc.core.build import build_folder
from trtc.core.errors import ConfigError
from trtc.core.plugin_registry import plugins
from trtc.runtime.evaluation.perplexity import engine_logits
from trtc.runtime.llm import LLM
from trtc.runtime.load import load_executor
from trtc.runtime.sampling_params import SamplingParams

TINY: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "intermediate_size": 88,
    "max_position_embeddings": 96,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "grouped queries": {},
    "one kv head, odd vocabulary": {"num_key_value_heads": 1, "vocab_size": 77, "hidden_act": "gelu"},
    "tied": {"tie_word_embeddings": True, "num_key_value_heads": 4},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "own head_dim, another theta": {
        "head_dim": 20,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
}
PROMPTS = [[5, 6, 7], [9, 10, 11, 12, 13, 14, 15, 16, 20, 3], [44]]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The tensors here are tiny: threads cost more than they give."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=list(VARIANTS.values()), ids=list(VARIANTS))
def model(request: pytest.FixtureRequest) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TINY | request.param, initializer_range=0.2))
    for parameter in model.parameters():
        if parameter.dim() == 1:  # biases start at 0 and norms at 1, which would hide a mix-up
            torch.nn.init.normal_(parameter, std=0.5)
    return model.train(False)


@pytest.fixture(scope="module")
def engine_dir(model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder / "hf")
    build_folder(folder / "hf", folder / "engine", max_input_len=16, max_seq_len=96)
    return folder / "engine"


def test_logits_are_those_of_transformers(model: LlamaForCausalLM, engine_dir: Path) -> None:
    with torch.no_grad():
        expected = model(torch.tensor([PROMPTS[1]])).logits[0]
    logits = engine_logits(load_executor(engine_dir))(PROMPTS[1])
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_greedy_tokens_are_those_of_transformers(model: LlamaForCausalLM, engine_dir: Path) -> None:
    """64 tokens for each of three prompts that run as one batch.

    Each must be the oracle's most probable one after those before it, which makes the sequences equal.
    """
    params = SamplingParams(max_tokens=64, temperature=0, ignore_eos=True)
    for prompt, output in zip(PROMPTS, LLM(engine_dir).generate(PROMPTS, params), strict=True):
        tokens = output.outputs[0].token_ids
        with torch.no_grad():
            expected = model(torch.tensor([prompt + tokens])).logits[0].argmax(-1).tolist()
        assert len(tokens) == 64
        assert tokens == expected[len(prompt) - 1 : -1]


def test_old_checkpoints_with_rotary_buffers_and_without_prefix_are_understood() -> None:
    """Names of the first files: `inv_freq` buffers. Oracle: the table matches the model's own names."""
    family = plugins().family("llama")
    hf_config = LlamaConfig(**TINY, tie_word_embeddings=True)
    config = family.config(hf_config.to_dict())
    state = LlamaForCausalLM(hf_config).model.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    buffers = {f"layers.{i}.self_attn.rotary_emb.inv_freq": (6,) for i in range(3)}
    plan = family.weight_table(config).match(config, shapes | buffers, "first-files")
    assert set(plan.sources.values()) == set(shapes)


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_parameters": None, "rope_theta": 5e5, "rope_scaling": None},
    ],
    ids=["transformers 5", "transformers 4"],
)
def test_theta_is_found_where_each_transformers_version_writes_it(fields: dict[str, Any]) -> None:
    config = plugins().family("llama").config(LlamaConfig(**TINY).to_dict() | fields)
    assert config.to_json()["rope_theta"] == 5e5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
            "rope_type is 'llama3'; accepted: default",
        ),
        (
            {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_type is 'linear'",
        ),
        ({"rope_parameters": "linear"}, "rope_type is 'linear'"),
        ({"hidden_act": "swish"}, "'swish'; accepted: silu"),
        ({"num_key_value_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
    ],
)
def test_what_is_not_supported_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plugins().family("llama").config(LlamaConfig(**TINY).to_dict() | fields)
