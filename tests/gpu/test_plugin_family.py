"""A family that is a package of its own, on GPUs, with what OPT has not: rotary positions, RMS norms, fewer heads of keys than
of queries, gated MLPs. Oracle: transformers in float32 on the CPU, on the same weights.

    python -m pip install --no-deps -e examples/trtc-llama
    python -m pytest -m "gpu or multi_gpu" tests/gpu/test_plugin_family.py
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from trtc.core.build import build_folder
from trtc.core.dtypes import DType, to_torch
from trtc.kernels.launch import architecture
from trtc.runtime.llm import LLM
from trtc.runtime.sampling_params import SamplingParams
from trtc.tests.engine_steps import TOKENS, engine_logits
from trtc.tests.rank_jobs import finish
from trtc.tests.tolerances import logits_tolerance, max_error

pytest.importorskip("trtc_llama", reason="not installed: pip install --no-deps -e examples/trtc-llama")
PROMPTS = [TOKENS[:9], TOKENS[5:40], TOKENS[:1], TOKENS[20:36]]
NEW_TOKENS = 32


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_hidden_layers=3,
        intermediate_size=512,
        max_position_embeddings=256,
        initializer_range=0.05,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norms start at 1, which would hide one that is left out
            torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
        parameter.data = parameter.data.bfloat16().float()  # what a checkpoint of either type holds
    return model.train(False)


def built(model: LlamaForCausalLM, dtype: DType, folder: Path, tp_size: int = 1) -> Path:
    copy.deepcopy(model).to(to_torch(dtype)).save_pretrained(folder / "hf")
    build_folder(
        folder / "hf", folder / "engine", max_input_len=96, max_seq_len=128, max_batch_size=8, tp_size=tp_size,
        target="cuda", target_options={"architectures": [architecture()]},
    )  # fmt: skip
    return folder / "engine"


def reference(model: LlamaForCausalLM, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0]


def assert_follows(model: LlamaForCausalLM, dtype: DType, prompt: list[int], new: list[int]) -> None:
    """Each token is the best by the float32 logits for what came before it, or within the type's error of it."""
    logits = reference(model, prompt + new)[len(prompt) - 1 : -1]
    chosen = logits[torch.arange(len(new)), torch.tensor(new)]
    assert len(new) == NEW_TOKENS
    assert (logits.max(-1).values - chosen).max() <= 2 * logits_tolerance(dtype, logits)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [DType.FLOAT16, DType.BFLOAT16])
def test_logits_and_tokens_are_those_of_transformers(
    dtype: DType, model: LlamaForCausalLM, tmp_path: Path
) -> None:
    """Of prompts, chunks and CUDA graphs; tokens of prompts that run together."""
    engine = built(model, dtype, tmp_path)
    expected = reference(model, TOKENS)
    for chunks in ([len(TOKENS)], [33, 3, 20, *[1] * (len(TOKENS) - 56)]):
        error = max_error(engine_logits(engine, TOKENS, chunks), expected)
        assert error <= logits_tolerance(dtype, expected), f"chunks {chunks[:3]}"
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
    with LLM(engine) as llm:
        for prompt, output in zip(PROMPTS, llm.generate(PROMPTS, params), strict=True):
            assert_follows(model, dtype, prompt, list(output.outputs[0].token_ids))


@pytest.mark.multi_gpu
def test_two_ranks_say_what_transformers_says(model: LlamaForCausalLM, tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 CUDA GPUs")
    engine = built(model, DType.FLOAT16, tmp_path, tp_size=2)
    words = [sys.executable, "-P", "-m", "trtc.cli", "run", "--nproc", "2", "--engine-dir", str(engine)]
    words += [
        "--input-ids",
        ",".join(map(str, PROMPTS[1])),
        "--ignore-eos",
        "--max-output-len",
        str(NEW_TOKENS),
    ]
    code, _, err = finish([*words, "--output-json", str(tmp_path / "out.json")])
    assert code == 0, err
    (found,) = json.loads((tmp_path / "out.json").read_text())
    assert_follows(model, DType.FLOAT16, PROMPTS[1], found["token_ids"])
