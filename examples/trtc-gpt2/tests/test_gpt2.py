"""The plugin through a really built engine. Oracle: transformers' GPT2LMHeadModel with the same random weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from trtc.core.build import build_folder
from trtc.core.errors import ConfigError
from trtc.core.plugin_registry import plugins
from trtc.runtime.evaluation.perplexity import engine_logits
from trtc.runtime.llm import LLM
from trtc.runtime.load import load_executor
from trtc.runtime.sampling_params import SamplingParams

TINY: dict[str, Any] = {"vocab_size": 101, "n_embd": 48, "n_head": 4, "n_layer": 3, "n_positions": 96}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "odd sizes": {"vocab_size": 77, "n_embd": 40, "n_head": 5, "n_inner": 56},
    "untied, exact gelu": {"tie_word_embeddings": False, "activation_function": "gelu"},
    "unscaled scores": {"scale_attn_weights": False},
    "scaled by layer, upcast": {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
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
def model(request: pytest.FixtureRequest) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**TINY | request.param, initializer_range=0.2))
    for parameter in model.parameters():
        if parameter.dim() == 1:  # biases start at 0 and norms at 1, which would hide a mix-up
            torch.nn.init.normal_(parameter, std=0.5)
    return model.train(False)


@pytest.fixture(scope="module")
def engine_dir(model: GPT2LMHeadModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    model.save_pretrained(folder / "hf")
    build_folder(folder / "hf", folder / "engine", max_input_len=16, max_seq_len=96)
    return folder / "engine"


def test_logits_are_those_of_transformers(model: GPT2LMHeadModel, engine_dir: Path) -> None:
    with torch.no_grad():
        expected = model(torch.tensor([PROMPTS[1]])).logits[0]
    logits = engine_logits(load_executor(engine_dir))(PROMPTS[1])
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_greedy_tokens_are_those_of_transformers(model: GPT2LMHeadModel, engine_dir: Path) -> None:
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


def test_old_checkpoints_with_mask_buffers_and_without_prefix_are_understood() -> None:
    """Names of the files of 2019: no `transformer.`, no head, `attn.bias` buffers. Oracle: the table matches."""
    family = plugins().family("gpt2")
    config = family.config(GPT2Config(**TINY).to_dict())
    state = GPT2LMHeadModel(GPT2Config(**TINY)).transformer.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    masks = {f"h.{i}.attn.{name}": (1, 1, 96, 96) for i in range(3) for name in ("bias", "masked_bias")}
    plan = family.weight_table(config).match(config, shapes | masks, "gpt2-2019")
    assert set(plan.sources.values()) == set(shapes)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"n_head": 5}, "n_embd 48 is not a multiple of n_head 5"),
        ({"activation_function": "swish"}, "'swish'; accepted: gelu_new"),
        ({"n_layer": None}, "'n_layer' is missing"),
    ],
)
def test_what_is_not_supported_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plugins().family("gpt2").config(GPT2Config(**TINY).to_dict() | fields)
