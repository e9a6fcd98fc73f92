"""Evaluation of engines on text. Oracles: transformers, rouge-score's definition by hand, and closed formulas."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from trtc.core.config import BuildConfig
from trtc.core.dtypes import DType
from trtc.core.engine import Engine
from trtc.core.errors import CheckpointError, ConfigError, RequestError, TargetError
from trtc.runtime.evaluation import perplexity, report, summarize
from trtc.runtime.evaluation.dataset import Pair, load_pairs
from trtc.runtime.evaluation.hf import HFModel
from trtc.runtime.llm import LLM
from trtc.runtime.load import load_executor
from trtc.runtime.tokenizer import Tokenizer
from trtc.tests.tiny_opt import NEWS, TINY_OPT, build_tiny_opt

ROOT = Path(__file__).parents[2]
WINDOW = 128


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(dtype) -> engine of the tiny OPT whose sequences are shorter than the texts of the tests."""
    folder = tmp_path_factory.mktemp("engines")

    def built(dtype: str, max_num_tokens: int = 8192) -> Path:
        path = folder / f"{dtype}-{max_num_tokens}"
        if not path.exists():
            options = f"--dtype {dtype} --max-seq-len {WINDOW} --max-num-tokens {max_num_tokens}"
            build_tiny_opt(path, *options.split())
        return path

    return built


@pytest.fixture(scope="module")
def hf() -> HFModel:
    return HFModel.load(TINY_OPT, DType.FLOAT32)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    found = Tokenizer.from_dir(TINY_OPT)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def text_ids(tokenizer: Tokenizer) -> list[int]:
    """Four windows and a bit."""
    pairs = load_pairs(str(NEWS), 8)
    token_ids = tokenizer.encode("\n".join(f"{p.article} TL;DR: {p.highlights}" for p in pairs))[:600]
    assert len(token_ids) > 4 * WINDOW
    return token_ids


def documented_perplexity(model: Any, token_ids: list[int], size: int, stride: int) -> float:
    """The procedure of transformers' page "Perplexity of fixed-length models", with the model's own loss."""
    ids = torch.tensor([token_ids])
    total, count, previous_end = 0.0, 0, 0
    for begin in range(0, len(token_ids), stride):
        end = min(begin + size, len(token_ids))
        window = ids[:, begin:end]
        labels = window.clone()
        labels[:, : -(end - previous_end)] = -100
        with torch.no_grad():
            loss = model(window, labels=labels).loss
        valid = int((labels[:, 1:] != -100).sum())
        total, count, previous_end = total + float(loss) * valid, count + valid, end
        if end == len(token_ids):
            break
    assert count == len(token_ids) - 1
    return math.exp(total / count)


@pytest.mark.parametrize("stride", [1 + WINDOW // 4, WINDOW // 2, WINDOW - 1])
def test_perplexity_is_that_of_transformers(
    build: Callable[..., Path], text_ids: list[int], stride: int
) -> None:
    """Oracle: `documented_perplexity`; 4 digits and more, over a text longer than max_seq_len."""
    from transformers import OPTForCausalLM

    model = OPTForCausalLM.from_pretrained(TINY_OPT).float().eval()
    expected = documented_perplexity(model, text_ids, WINDOW, stride)
    executor = load_executor(build("float32"))
    scores = perplexity.score(text_ids, perplexity.engine_logits(executor), WINDOW, stride)
    assert executor.max_seq_len == WINDOW < len(text_ids)
    assert scores.perplexity == pytest.approx(expected, rel=2e-5)
    assert len(scores.nll) == len(text_ids) - 1


def test_steps_smaller_than_the_window_change_nothing(
    build: Callable[..., Path], text_ids: list[int]
) -> None:
    """Oracle: the same engine with a whole window in one step. 17 tokens a step: page borders are crossed."""
    whole = perplexity.engine_logits(load_executor(build("float32")))(text_ids[:WINDOW])
    parts = perplexity.engine_logits(load_executor(build("float32", 17)))(text_ids[:WINDOW])
    assert whole.shape == (WINDOW, 1920)
    torch.testing.assert_close(parts, whole, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("tokens", "size", "stride"), [(10, 4, 2), (9, 4, 3), (4, 8, 4), (2, 2, 1), (100, 7, 1)]
)
def test_windows_score_every_token_but_the_first_once(tokens: int, size: int, stride: int) -> None:
    """Oracle: by counting."""
    scored: list[int] = []
    for window in perplexity.windows(tokens, size, stride):
        assert window.begin < window.first < window.end <= window.begin + size
        scored += range(window.first, window.end)
    assert scored == list(range(1, tokens))


@pytest.mark.parametrize(
    ("tokens", "size", "stride", "says"), [(9, 4, 4, "stride"), (9, 4, 0, "stride"), (1, 4, 2, "text")]
)
def test_windows_that_cannot_be(tokens: int, size: int, stride: int, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        list(perplexity.windows(tokens, size, stride))


def test_distance_by_hand() -> None:
    """Oracle: the definition of KL divergence on two distributions of two tokens; (0.8, 0.2) against (0.5, 0.5)."""
    ours = torch.zeros(3, 2)
    theirs = torch.tensor([[math.log(4), 0.0]]).repeat(3, 1)
    found = perplexity.compare([0, 1, 1], lambda ids: ours[: len(ids)], lambda ids: theirs[: len(ids)], 3, 1)
    kl = 0.8 * math.log(0.8 / 0.5) + 0.2 * math.log(0.2 / 0.5)
    np.testing.assert_allclose(found.distance.kl, [kl, kl], rtol=1e-6)
    np.testing.assert_allclose(found.distance.max_abs, [math.log(4)] * 2, rtol=1e-6)
    np.testing.assert_allclose(found.distance.mean_abs, [math.log(4) / 2] * 2, rtol=1e-6)
    assert found.engine.perplexity == pytest.approx(2) and found.reference.perplexity == pytest.approx(5)
    assert found.agrees.tolist() == [True, True]  # of equal logits the first counts


def test_the_distance_grows_with_the_rounding(
    build: Callable[..., Path], text_ids: list[int], hf: HFModel
) -> None:
    """Oracle: transformers in float32. float32 agrees everywhere; float16 is further away, bfloat16 further still."""
    found = {}
    for dtype in ("float32", "float16", "bfloat16"):
        ours = perplexity.engine_logits(load_executor(build(dtype)))
        found[dtype] = perplexity.compare(text_ids[:300], ours, hf.logits, WINDOW, WINDOW // 2)
    exact = found["float32"]
    assert exact.agrees.all() and exact.distance.max_abs.max() < 1e-3 and exact.distance.kl.max() < 1e-7
    kl = [comparison.distance.kl.mean() for comparison in found.values()]
    assert 1000 * kl[0] < kl[1] and 10 * kl[1] < kl[2] < 0.1
    assert found["float16"].agrees.mean() > 0.95


def test_prompts_are_cut_as_by_the_protocol(tokenizer: Tokenizer) -> None:
    """Oracle: the tokenizer of transformers, truncating on the left as examples/summarize.py of TensorRT-LLM does."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(TINY_OPT, truncation_side="left")
    pairs = [Pair(f"  {pair.article} It did n't end.", "") for pair in load_pairs(str(NEWS), 5)]
    for limit in (8, 20, 60, 900):
        prompts = summarize.encode_prompts(pairs, tokenizer, limit)
        texts = [(pair.article + " TL;DR: ").strip().replace(" n't", "n't") for pair in pairs]
        assert prompts == [theirs(text, truncation=True, max_length=limit).input_ids for text in texts]
        assert max(map(len, prompts)) == limit or limit == 900
    with pytest.raises(RequestError, match="TL;DR"):
        summarize.encode_prompts(pairs, tokenizer, 2)


def test_input_limit_leaves_room_for_the_output() -> None:
    build = BuildConfig(max_seq_len=100, max_input_len=80)
    assert [summarize.input_limit(build, length) for length in (1, 20, 21, 99)] == [80, 80, 79, 1]
    with pytest.raises(RequestError, match=r"output_len 100 .*max_seq_len is 100"):
        summarize.input_limit(build, 100)


def test_transformers_pads_without_a_trace(hf: HFModel, tokenizer: Tokenizer) -> None:
    """Oracle: transformers, one prompt at a time. A padded batch must not change a token."""
    pairs = load_pairs(str(NEWS), 4)
    prompts = summarize.encode_prompts(pairs, tokenizer, 100)
    assert len(set(map(len, prompts))) > 1
    batch = hf.generate(prompts, 40, (2,))
    assert batch == [hf.generate([prompt], 40, (2,))[0] for prompt in prompts]
    assert all(ids[-1] == 2 and 2 not in ids[:-1] for ids in batch)


def test_perplexity_of_summaries(build: Callable[..., Path], hf: HFModel, tokenizer: Tokenizer) -> None:
    """Oracle: transformers' loss over prompt and output; the two sides' outputs are equal in float32."""
    prompts = summarize.encode_prompts(load_pairs(str(NEWS), 3), tokenizer, 90)
    with LLM(build("float32")) as llm:
        outputs = summarize.engine_generate(llm, 30)(prompts)
        ours = summarize.engine_perplexity(llm, prompts, 30)
    assert outputs == hf.generate(prompts, 30, (2,))
    assert ours == pytest.approx(summarize.hf_perplexity(hf, prompts, outputs), rel=1e-5)


def test_run_keeps_the_order_and_times_every_batch() -> None:
    """Oracle: by hand. The first batch is run once more, for warm-up, and its result is not kept."""
    calls: list[int] = []

    def generate(prompts: list[list[int]]) -> list[list[int]]:
        calls.append(len(prompts))
        return [[*prompt, 7] for prompt in prompts]

    side = summarize.run(generate, [[1], [2], [3, 3]], 2)
    assert (side.token_ids, calls) == ([[1, 7], [2, 7], [3, 3, 7]], [2, 2, 1])
    assert side.num_tokens == 7 and len(side.batch_seconds) == 2
    fixed = replace(side, batch_seconds=[1.0, 2.5])
    assert (fixed.tokens_per_s, fixed.latency_s) == (2.0, 1.75)
    with pytest.raises(ConfigError, match="batch size is 0"):
        summarize.run(generate, [[1]], 0)


def test_rouge_by_hand() -> None:
    """Oracle: Lin 2004. 'a b c d' and 'a b d': 3 of 4 and 3 of 3 words, 1 of 3 and 1 of 2 pairs; then the mean with 0."""
    pytest.importorskip("rouge_score")
    found = summarize.rouge(["a b c d", "x"], ["a b d", "y"])
    assert found == pytest.approx(
        {"rouge1": 600 / 14, "rouge2": 20.0, "rougeL": 600 / 14, "rougeLsum": 600 / 14}
    )


def test_rouge_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(TargetError, match="pip install rouge-score"):
        summarize.rouge(["a"], ["a"])


def test_jsonl(tmp_path: Path) -> None:
    file = tmp_path / "news.jsonl"
    file.write_text(
        '{"article": "a", "highlights": "b", "id": 1}\n\n{"article": "c", "highlights": "\u2028d"}\n'
    )
    assert load_pairs(str(file), 9) == load_pairs(str(file), 10**20) == [Pair("a", "b"), Pair("c", "\u2028d")]
    assert load_pairs(str(file), 1) == [Pair("a", "b")]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"article": "a"}\n', "line 1.*article and highlights"),
        ('{"article": "a", "highlights": 3}\n', "line 1"),
        ('{"article": "a", "highlights": "b"}\nnews\n', "line 2: not valid JSON"),
        ("[1]\n", "line 1: not a pair"),
        (
            '{"article": "\\ud800", "highlights": "b"}\n',
            "line 1: not a pair; accepted: texts, that UTF-8 can encode",
        ),
        ("\n", "holds no article"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_bad_jsonl(tmp_path: Path, text: str | bytes, says: str) -> None:
    file = tmp_path / "news.jsonl"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=says):
        load_pairs(str(file), 5)


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.jsonl: no such file"):
        load_pairs("nowhere.jsonl", 1)


def test_saved_datasets(tmp_path: Path) -> None:
    """Oracle: the library's own writer."""
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list(
        [{"article": "a", "highlights": "b"}, {"article": "c", "highlights": "d"}]
    )
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"test": rows, "train": rows.select([1])}).save_to_disk(tmp_path / "two")
    assert load_pairs(str(tmp_path / "one"), 9) == [Pair("a", "b"), Pair("c", "d")]
    assert load_pairs(str(tmp_path / "two"), 1) == [Pair("a", "b")]
    assert load_pairs(str(tmp_path / "two"), 9, split="train") == [Pair("c", "d")]
    with pytest.raises(ConfigError, match="no split validation; accepted: test, train"):
        load_pairs(str(tmp_path / "two"), 9, split="validation")
    with pytest.raises(ConfigError, match="not a folder written by"):
        load_pairs(str(TINY_OPT), 9)


class FakeHub:
    """Stands for the package `datasets`: what is asked of it is what the real one documents."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.asked: list[Any] = []

    def load_dataset(self, name: str, config: str | None, *, split: str) -> list[dict[str, str]]:
        self.asked.append((name, config, split))
        if self.error is not None:
            raise self.error
        return [{"article": "a", "highlights": "b"}]


def test_hub_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub()
    monkeypatch.setitem(sys.modules, "datasets", hub)
    assert load_pairs("abisee/cnn_dailymail", 3) == [Pair("a", "b")]
    load_pairs("someone/news", 3, split="train")
    load_pairs("cnn_dailymail", 3, config="1.0.0")
    assert hub.asked == [
        ("abisee/cnn_dailymail", "3.0.0", "test"),
        ("someone/news", None, "train"),
        ("cnn_dailymail", "1.0.0", "test"),
    ]


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library says a missing network in several types; the user gets one line with what works instead."""
    monkeypatch.setitem(sys.modules, "datasets", FakeHub(ConnectionError("Couldn't reach\nthe Hub")))
    with pytest.raises(
        ConfigError, match=r"abisee/cnn_dailymail: neither.*Couldn't reach the Hub.*jsonl"
    ) as caught:
        load_pairs("abisee/cnn_dailymail", 3)
    assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TargetError, match="pip install datasets"):
        load_pairs("abisee/cnn_dailymail", 3)


def test_not_a_hugging_face_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no config"):
        HFModel.load(tmp_path, DType.FLOAT32)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "opt"}))
    with pytest.raises(CheckpointError, match="transformers cannot load it"):
        HFModel.load(tmp_path, DType.FLOAT32)


def test_truncated_weights(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        data = (TINY_OPT / name).read_bytes()
        (tmp_path / name).write_bytes(data if name == "config.json" else data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="transformers cannot load it"):
        HFModel.load(tmp_path, DType.FLOAT32)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ({"vocab_size": 96}, "96 tokens.*vocabulary of 1920"),
        ({"max_position_embeddings": 127}, "127 positions.*max_seq_len of 128"),
        ({"max_position_embeddings": 128}, None),
    ],
)
def test_the_checkpoint_of_another_model(
    build: Callable[..., Path], model: dict[str, int], says: str | None
) -> None:
    """Oracle: the sizes that the model is made with."""
    from transformers import AutoModelForCausalLM, OPTConfig

    config = OPTConfig.from_pretrained(TINY_OPT, num_hidden_layers=1, **model)
    reference = HFModel(AutoModelForCausalLM.from_config(config))
    engine = Engine.open(build("float32"))
    if says is None:
        reference.check_fits(engine)
        return
    with pytest.raises(CheckpointError, match=says):
        reference.check_fits(engine)


class Page(HTMLParser):
    """Counts elements, checks nesting, and finds what a browser would load from elsewhere."""

    VOID = frozenset({"meta", "br", "link", "img"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}
        self.outside: list[str] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.outside += [name for name, _ in attrs if name in ("src", "href", "xlink:href", "srcset")]
        if tag not in self.VOID and not self.get_starttag_text().endswith("/>"):  # type: ignore[union-attr]
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def report_data(count: int) -> report.ReportData:
    rng = np.random.default_rng(0)
    top = rng.integers(0, 9, count)
    other = top.copy()
    other[count // 2] += 1
    values = rng.random(count)
    values[0] = 0.0  # a logarithmic axis has no zero
    comparison = perplexity.Comparison(
        perplexity.Scores(values, top),
        perplexity.Scores(values, other),
        perplexity.Distance(values, values / 2, values / 3),
    )
    return report.ReportData(
        engine_name="<engine> & co",
        reference_name="transformers",
        facts={"perplexity": "1.2345"},
        tokens=[f"<t{i}>" for i in range(count + 1)],
        engine_choices=[f"e{i}" for i in top],
        reference_choices=[f"r{i}" for i in other],
        comparison=comparison,
        continuations=[report.Continuation("p", "same", "same"), report.Continuation("p", "a<b", "a>b")],
    )


@pytest.mark.parametrize("count", [1, 50, 3000])
def test_the_report_is_one_sound_page_without_outside_assets(count: int) -> None:
    """Oracle: an HTML parser. Text of the model is shown, never taken for markup."""
    text = report.render(report_data(count))
    page = Page(text)
    assert page.outside == [] and "url(" not in text and "@import" not in text and "http" not in text
    assert page.counts["svg"] == 3 and "script" not in page.counts
    shown = "".join(page.texts)
    assert "<engine> & co" in shown and "1.2345" in shown and "a<b" in shown and "<t1>" in shown
    assert ("equal" in shown) and ("different" in shown)
    assert page.counts.get("mark", 0) == (1 if count // 2 < report.MAX_TEXT_TOKENS - 1 else 0)
    assert page.counts["tr"] == 1 + 1 + min(count, report.MAX_ROWS)
    assert "nan" not in text and "inf" not in text.replace("info", "")
    assert len(text) < 200_000


def test_the_report_marks_texts_from_where_they_part() -> None:
    """Oracle: by hand. Whole words are marked; equal texts and the beginning both share are not."""
    data = report_data(3)
    pairs = [("one two three", "one twin three"), ("same", "same"), ("a b", "a b c")]
    text = report.render(replace(data, continuations=[report.Continuation("p", *pair) for pair in pairs]))
    parted = re.findall(r'<p>([^<]*)<span class="parted">([^<]*)</span></p>', text)
    assert parted == [("one ", "two three"), ("one ", "twin three"), ("a ", "b"), ("a ", "b c")]


@pytest.mark.parametrize(
    ("low", "high", "count", "ticks"),
    [
        (0, 15.9, 5, [0, 5, 10, 15]),
        (1, 3034, 8, [500, 1000, 1500, 2000, 2500, 3000]),
        (0, 0.07, 5, [0, 0.02, 0.04, 0.06]),
        (1, 1, 8, [1]),
    ],
)
def test_ticks_are_round(low: float, high: float, count: int, ticks: list[float]) -> None:
    """Oracle: by hand."""
    assert report._round_ticks(low, high, count) == pytest.approx(ticks)


def test_engines_keep_the_names_that_the_protocol_needs(build: Callable[..., Path]) -> None:
    """The protocol reads limits and end-of-sequence tokens off the engine; oracle: how it was built."""
    engine = Engine.open(build("float32"))
    assert engine.build.max_seq_len == WINDOW and engine.model.eos_token_ids == (2,)
