"""Tokenizers made on the spot: byte-level BPE as OPT and GPT-2 have it, and byte fallback as Llama has it. Engines of ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from trtc.core.build import build_engine
from trtc.core.config import BuildConfig
from trtc.core.sharding import ShardingOptions
from trtc.runtime.tokenizer import Tokenizer
from trtc.tests.opt_models import BUILD, OptCheckpoint

from .rank_engines import Case, RanksEngine

CORPUS = [
    "the cat sat on the mat",
    "stop and go, stop and rest",
    "ünïcödé 漢字 and emoji 🙂🙂 over the end",
] * 3
SPECIALS = ["</s>", "<s>", "<pad>"]  # </s> has id 0, as the toy model's end of sequence


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as `transformers` saves it: byte-level BPE whose post-processor puts <s> first."""
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.enable_truncation(3)  # as left behind by a training run: must not cut prompts
    tokenizer.enable_padding(length=16)
    tokenizer.save(str(path / "tokenizer.json"))
    names = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>"}
    (path / "tokenizer_config.json").write_text(json.dumps(names))
    return path


@pytest.fixture(scope="session")
def byte_level(tokenizer_dir: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_dir(tokenizer_dir)
    assert tokenizer is not None
    return tokenizer


@pytest.fixture(scope="session")
def byte_fallback() -> Tokenizer:
    """Llama's way: words with a leading ▁, single bytes as <0xE2>, the first space dropped on decoding."""
    words = ["▁the", "▁cat", "▁sat", "é", "▁"]
    vocab = {
        name: index
        for index, name in enumerate(["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *words])
    }
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(tokenizer, bos_token=None, eos_token=None)


@pytest.fixture(scope="session")
def ranks_engine(
    family_checkpoint: Callable[[str], OptCheckpoint], tmp_path_factory: pytest.TempPathFactory
) -> RanksEngine:
    """Case -> folder of its engine, built once."""
    folder = tmp_path_factory.mktemp("ranks")

    @cache
    def engine(case: Case) -> Path:
        source = family_checkpoint(case.variant)
        sharding = ShardingOptions(case.tp_size, case.dim is not None, case.dim or 0, case.pp_size)
        build = BuildConfig(
            **{**vars(BUILD), "tp_size": case.tp_size, "pp_size": case.pp_size, "max_beam_width": 2}
        )
        path = folder / "-".join(map(str, case))
        build_engine(source.family, source.config, source.weights(sharding=sharding), build, path)
        return path

    return engine
