"""`trtc eval` as a user meets it. Oracle: transformers; its details are in tests/runtime/test_evaluation.py."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from trtc.cli.main import main
from trtc.tests.tiny_opt import NEWS, TINY_OPT, build_tiny_opt


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Longer than the engine's sequences."""
    file = tmp_path_factory.mktemp("eval") / "news.txt"
    lines = NEWS.read_text().splitlines()[:5]
    file.write_text("\n".join(json.loads(line)["article"] for line in lines), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_opt(tmp_path_factory.mktemp("eval") / "engine", "--max-seq-len", "96")


def printed(output: str) -> dict[str, str]:
    return dict(re.findall(r"^(\w+(?: \w+)*) {2,}(.*)$", output, re.M))


def test_perplexity_alone(engine: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: transformers, one window after another that do not share tokens but for the stride's context."""
    from transformers import AutoTokenizer, OPTForCausalLM

    assert main(["eval", "--engine-dir", str(engine), "--text", str(text), "--stride", "40"]) == 0
    shown = printed(capsys.readouterr().out)
    ids = AutoTokenizer.from_pretrained(TINY_OPT)(text.read_text(), return_tensors="pt").input_ids
    model = OPTForCausalLM.from_pretrained(TINY_OPT).float().eval()
    nll, first = [], 1
    for begin in range(0, ids.shape[1], 40):
        end = min(begin + 96, ids.shape[1])
        with torch.no_grad():
            scores = model(ids[:, begin:end]).logits[0].log_softmax(-1)
        nll += [-float(scores[i - 1 - begin, ids[0, i]]) for i in range(first, end)]
        first = end
        if end == ids.shape[1]:
            break
    assert f"{ids.shape[1]} tokens; window 96, stride 40" in shown["text"] and ids.shape[1] > 3 * 96
    assert shown["perplexity"] == f"{math.exp(sum(nll) / len(nll)):.4f}"
    assert "of transformers" not in shown


def test_comparison_json_and_report(
    engine: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: in float32 the two sides agree; the JSON holds what is printed, position by position."""
    command = f"eval --engine_dir {engine} --text {text} --hf_model_dir {TINY_OPT}"
    files = ["--json", str(tmp_path / "e.json"), "--report", str(tmp_path / "e.html")]
    assert main([*command.split(), *files]) == 0
    shown = printed(capsys.readouterr().out)
    assert shown["of transformers"] == f"{shown['perplexity']} in fp32"
    assert shown["greedy agreement"].startswith("100.00 %")
    result = json.loads((tmp_path / "e.json").read_text())
    positions = result["positions"]
    assert {len(values) for values in positions.values()} == {result["tokens"] - 1}
    assert result["perplexity"] == pytest.approx(math.exp(sum(positions["nll"]) / len(positions["nll"])))
    assert result["kl_max"] == max(positions["kl"]) < 1e-6
    assert positions["top"] == positions["reference_top"] and result["greedy_agreement"] == 1.0
    page = (tmp_path / "e.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 3 and page.count("<article>") == 4 and "http" not in page
    assert page.count('class="same"') == 4 and shown["perplexity"] in page


def test_another_checkpoint_departs(
    engine: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A reference that differs in one matrix is seen: the comparison can fail."""
    from transformers import AutoTokenizer, OPTForCausalLM

    model = OPTForCausalLM.from_pretrained(TINY_OPT).float()
    with torch.no_grad():
        model.model.decoder.layers[1].fc2.weight.mul_(0.5)
    model.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(TINY_OPT).save_pretrained(tmp_path / "other")
    command = f"eval --engine-dir {engine} --text {text} --hf-model-dir {tmp_path / 'other'} --json {tmp_path / 'e.json'}"
    assert main(command.split()) == 0
    assert not printed(capsys.readouterr().out)["greedy agreement"].startswith("100.00 %")
    assert json.loads((tmp_path / "e.json").read_text())["kl_mean"] > 1e-3


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--report x.html", ("--report", "--hf-model-dir")),
        ("--json /nonexistent-folder/x.json", ("--json", "nonexistent-folder")),
        ("--window 97", ("--window", "97", "96")),
        ("--window 32 --stride 32", ("stride", "32", "31")),
        ("--hf-model-dir /nonexistent", ("/nonexistent", "config.json")),
        ("--text /nonexistent.txt", ("--text", "/nonexistent.txt")),
    ],
)
def test_what_cannot_work_is_one_line(
    engine: Path, text: Path, options: str, says: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", "--engine-dir", str(engine), "--text", str(text), *options.split()]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("trtc eval: error: ")
    assert all(word in err for word in says), err


@pytest.mark.parametrize(("content", "says"), [(b"", "at least 2"), (b"\xff\xfe", "UTF-8")])
def test_texts_that_are_none(
    engine: Path, tmp_path: Path, content: bytes, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.txt").write_bytes(content)
    assert main(["eval", "--engine-dir", str(engine), "--text", str(tmp_path / "t.txt")]) == 1
    assert says in capsys.readouterr().err
