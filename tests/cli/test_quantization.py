"""Quantization from the command line, on the trained tiny OPT. Oracle: perplexity of held-out news, and the float engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from math import exp
from pathlib import Path

import pytest
from trtc.bench.quantization import NEWS, TINY_OPT, held_out_nll, training_news
from trtc.cli.main import main
from trtc.core.checkpoint import TrtcCheckpoint
from trtc.runtime.evaluation.dataset import load_pairs
from trtc.runtime.tokenizer import Tokenizer

INT4 = ("--use_weight_only", "--weight_only_precision=int4", "--group_size", "128")
ARTICLES, CALIBRATION = 12, 24


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("calibration") / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in training_news(CALIBRATION)))
    return file


@pytest.fixture(scope="module")
def perplexity(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., float]:
    """Of the engine that these options build, in float16."""
    tokenizer = Tokenizer.from_dir(TINY_OPT)
    assert tokenizer is not None
    texts = [f"{pair.article} TL;DR: {pair.highlights}" for pair in load_pairs(str(NEWS), ARTICLES)]

    @cache
    def measure(*options: str) -> float:
        engine = tmp_path_factory.mktemp("quantized") / "engine"
        assert main(["build", "--model-dir", str(TINY_OPT), "--output-dir", str(engine), *options]) == 0
        nll, tokens = held_out_nll(engine, texts, tokenizer)
        return exp(nll / tokens)

    return measure


def test_int8_keeps_the_perplexity(perplexity: Callable[..., float]) -> None:
    assert abs(perplexity("--use-weight-only") / perplexity() - 1) < 0.005


@pytest.mark.parametrize("flag", [("--quantization", "fp8"), ("--use_fp8_rowwise",)], ids=str)
def test_fp8_activations_keep_the_perplexity(flag: tuple[str, ...], perplexity: Callable[..., float]) -> None:
    """By either of their names; they are rounded, so that it is another one than with the weights alone."""
    weights = perplexity("--use-weight-only", "--weight-only-precision", "fp8")
    assert perplexity(*flag) != weights and abs(perplexity(*flag) / perplexity() - 1) < 0.005


def test_fp8_activations_are_in_the_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What `convert` was told, the engine that is built from it does, and `inspect` says."""
    checkpoint, engine = tmp_path / "checkpoint", tmp_path / "engine"
    options = ("--quantization", "fp8", "--quantize-lm-head")
    assert main(["convert", "--model-dir", str(TINY_OPT), "--output-dir", str(checkpoint), *options]) == 0
    assert "weights fp8 with fp8 activations, nearest" in capsys.readouterr().out
    stored = TrtcCheckpoint.open(checkpoint).quantization
    assert stored is not None and stored.activations == "fp8" and "lm_head.weight" in stored.weights
    assert main(["build", "--checkpoint-dir", str(checkpoint), "--output-dir", str(engine)]) == 0
    assert main(["inspect", str(engine)]) == 0
    assert "float16 and fp8 with fp8 activations" in capsys.readouterr().out


@pytest.mark.parametrize("flag", [("--kv-cache-dtype", "fp8"), ("--fp8_kv_cache",)], ids=str)
def test_an_fp8_cache_keeps_the_perplexity(flag: tuple[str, ...], perplexity: Callable[..., float]) -> None:
    """By either of its names; it is rounded, so that the perplexity is another one."""
    assert 0 < abs(perplexity(*flag) / perplexity() - 1) < 0.005


def test_gptq_is_better_than_rounding_to_nearest(perplexity: Callable[..., float], calibration: Path) -> None:
    """At four bits, on articles that are not among those it was calibrated with. Measured with few of both: 0.58 of what
    rounding loses; bench/quantization.py takes more."""
    lost = perplexity(*INT4) - perplexity()
    assert lost > 0.005
    assert perplexity(*INT4, "--calibrate", str(calibration)) - perplexity() < 0.8 * lost


def test_a_dry_run_that_calibrates_writes_nothing(tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"token_ids": [5, 6, 7]}')
    options = [*INT4, "--calibrate", str(texts), "--output-dir", str(tmp_path / "new" / "engine")]
    assert main(["build", "--model-dir", str(TINY_OPT), "--dry-run", *options]) == 0
    assert list(tmp_path.iterdir()) == [texts]


def test_convert_says_what_it_made_and_leaves_nothing_behind(
    calibration: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also for two ranks, in a folder that is not there yet; an engine is built from it, and `inspect` knows its integers."""
    checkpoint, engine = tmp_path / "new" / "checkpoint", tmp_path / "engine"
    options = [
        *INT4[:2],
        "--group-size",
        "64",
        "--quantize-lm-head",
        "--calibrate",
        str(calibration),
        "--tp-size",
        "2",
    ]
    assert main(["convert", "--model-dir", str(TINY_OPT), "--output-dir", str(checkpoint), *options]) == 0
    assert "opt in float16, weights int4, group size 64, gptq, 2 rank(s)" in capsys.readouterr().out
    stored = TrtcCheckpoint.open(checkpoint).quantization
    assert stored is not None
    assert "lm_head.weight" in stored.weights
    assert {path.name for path in checkpoint.parent.iterdir()} == {"checkpoint"}
    assert main(["build", "--checkpoint-dir", str(checkpoint), "--output-dir", str(engine)]) == 0
    assert main(["inspect", str(engine)]) == 0
    assert "float16 and int4" in capsys.readouterr().out
