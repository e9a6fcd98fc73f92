"""`trtc lm-eval`. Oracle: the lm-evaluation-harness itself with its model `hf` on the same weights, in float32.

The harness brings some forty packages, so that it is no part of the default environment: `pip install '.[lm-eval,serve]'
accelerate` makes all of these tests run.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from trtc.cli.main import main
from trtc.tests.server.running import RunningServer
from trtc.tests.tiny_opt import TINY_OPT, build_tiny_opt

ROOT = Path(__file__).parents[2]
TASKS = ("news_choice", "news_summary", "news_text", "news_generate")
MAX_LENGTH = 160
"""Below the length of the texts of news_text, which take several windows."""


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_opt(tmp_path_factory.mktemp("lm-eval") / "engine")


def test_without_the_harness(
    engine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["lm-eval", "--engine-dir", str(engine), "--tasks", "news_choice"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "pip install lm-eval" in err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--json /nonexistent-folder/x.json", ("--json", "nonexistent-folder")),
        ("--include-path /nonexistent", ("--include-path", "/nonexistent")),
    ],
)
def test_bad_paths_are_one_line(
    engine: Path, options: str, says: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["lm-eval", "--engine-dir", str(engine), "--tasks", "news_choice", *options.split()]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and all(text in err for text in says), err


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Any:
    lm_eval = pytest.importorskip("lm_eval", reason="needs the extra [lm-eval]")
    pytest.importorskip("lm_eval.models")  # fills the harness's registry
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(ROOT)  # where the paths in the task files begin
    return lm_eval


Responses = dict[str, list[Any]]


def responses(
    harness: Any, model: Any, model_args: str | None = None, device: str | None = None
) -> Responses:
    """Task -> what the model answered to every request of every document."""
    from lm_eval.tasks import TaskManager

    found = harness.simple_evaluate(
        model=model,
        model_args=model_args,
        tasks=list(TASKS),
        task_manager=TaskManager(include_path="examples/lm-eval"),
        limit=12,
        batch_size=1,
        device=device,
        bootstrap_iters=0,
    )
    return {task: [sample["resps"] for sample in found["samples"][task]] for task in TASKS}


@pytest.fixture
def hf_responses(harness: Any) -> Responses:
    pytest.importorskip("accelerate", reason="the harness's model hf imports it")
    return responses(harness, "hf", f"pretrained={TINY_OPT},dtype=float32,max_length={MAX_LENGTH}", "cpu")


def values(nested: Any) -> Iterator[Any]:
    if isinstance(nested, list | tuple):
        for item in nested:
            yield from values(item)
    else:
        yield nested


def assert_alike(ours: Responses, theirs: Responses) -> None:
    """Texts and the answers to `would greedy decoding write this` equal, log-likelihoods to 1e-3 nats."""
    assert ours.keys() == theirs.keys()
    for task in ours:
        pairs = list(zip(values(ours[task]), values(theirs[task]), strict=True))
        assert len(pairs) >= 12
        for mine, other in pairs:
            if isinstance(other, float):
                assert math.isclose(float(mine), other, abs_tol=1e-3), (task, mine, other)
            elif isinstance(other, str):
                assert mine.strip() == other.strip(), task
            else:
                assert mine == other, task


def test_the_harness_has_nothing_to_say_of_the_examples(
    harness: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """It warns of every metric whose task file leaves something out, before it shows a result."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path="examples/lm-eval")
    assert harness.tasks.get_task_dict(list(TASKS), manager).keys() == set(TASKS)
    assert [record.message for record in caplog.records if record.name.startswith("lm_eval")] == []


def test_the_engine_answers_as_the_harness_s_own_model(
    harness: Any, hf_responses: Responses, engine: Path
) -> None:
    """Multiple choice, log-likelihood, rolling windows and generation, request by request."""
    from trtc.runtime.evaluation import harness as ours  # registers the model

    assert ours.EngineLM is harness.api.registry.get_model("trtc")
    assert_alike(responses(harness, "trtc", f"engine_dir={engine},max_length={MAX_LENGTH}"), hf_responses)


def test_scoring_between_two_generations_changes_neither(harness: Any, engine: Path) -> None:
    """Scoring writes over pages of the cache, which the generation before it had filled."""
    from lm_eval.api.instance import Instance
    from trtc.runtime.evaluation.harness import EngineLM

    def asked(kind: str, *arguments: Any) -> Any:
        return Instance(kind, {}, arguments, 0)

    model = EngineLM(engine)
    prompt = asked(
        "generate_until", "The council met on Monday to speak about the river. " * 4, {"max_gen_toks": 16}
    )
    first = model.generate_until([prompt])
    model.loglikelihood(
        [asked("loglikelihood", "A storm took the roof of the school. " * 8, "Nobody was hurt.")]
    )
    assert model.generate_until([prompt]) == first
    model.close()


def test_over_http(harness: Any, hf_responses: Responses, engine: Path) -> None:
    """The harness's model local-completions on `trtc serve`; it keeps two of its max_length tokens for itself."""
    pytest.importorskip("tenacity", reason="the harness's local-completions imports it")
    server = RunningServer(engine, "--served-model-name", "tiny")
    args = (
        f"model=tiny,base_url={server.url}/v1/completions,tokenizer={TINY_OPT},tokenizer_backend=huggingface,"
        f"tokenized_requests=True,add_bos_token=True,num_concurrent=4,max_length={MAX_LENGTH + 2}"
    )
    try:
        assert_alike(responses(harness, "local-completions", args), hf_responses)
    finally:
        assert server.stop() == 0


def test_the_command(harness: Any, engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = (
        f"lm-eval --engine_dir {engine} --tasks news_summary news_generate --include_path examples/lm-eval"
    )
    assert main([*command.split(), "--limit", "8", "--json", str(tmp_path / "r.json")]) == 0
    out = capsys.readouterr().out
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["n-samples"]["news_summary"]["effective"] == 8
    perplexity = result["results"]["news_summary"]["perplexity,none"]
    assert 1 < perplexity < 20 and f"{perplexity:.4f}" in out and "news_generate" in out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--tasks nonsense", ("--tasks", "nonsense", "--include-path")),
        ("--tasks news_choice --max-length 5000", ("max_length", "5000", "1024")),
        ("--tasks news_generate --limit 1 --max-length 40", ("48 tokens to generate", "40")),
    ],
)
def test_what_the_harness_cannot_do_is_one_line(
    harness: Any, engine: Path, options: str, says: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    command = f"lm-eval --engine-dir {engine} --include-path examples/lm-eval {options}"
    assert main(command.split()) == 1
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("trtc lm-eval: error: ")]
    assert len(err) == 1 and all(text in err[0] for text in says), err


def test_generation_settings(harness: Any) -> None:
    """Oracle: normalize_gen_kwargs of the harness: greedy unless sampling or a temperature is asked for."""
    from trtc.core.errors import ConfigError
    from trtc.runtime.evaluation.harness import sampling_params

    greedy = sampling_params({"until": ["\n", ""], "do_sample": False, "temperature": 0.7}, 256)
    assert greedy.greedy and greedy.max_tokens == 256 and greedy.stop_strings == ("\n",)
    drawn = sampling_params({"until": "x", "temperature": 0.7, "top_p": 0.9, "max_new_tokens": 5}, 256)
    assert (drawn.temperature, drawn.top_p, drawn.max_tokens) == (0.7, 0.9, 5)
    with pytest.raises(ConfigError, match="num_beams"):
        sampling_params({"num_beams": 4}, 256)
