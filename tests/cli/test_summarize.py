"""`trtc summarize` as a user meets it. Oracle: transformers on the same prompts, and the command lines of TensorRT-LLM."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from trtc.cli import summarize, tensorrt_llm_flags
from trtc.cli.main import main, parser
from trtc.core.engine import Engine
from trtc.core.errors import ConfigError
from trtc.runtime.drafting import StepCosts
from trtc.tests.cli.tensorrt_llm_programs import PROGRAMS
from trtc.tests.rank_jobs import finish
from trtc.tests.tiny_opt import TINY_OPT, build_tiny_opt

ROOT = Path(__file__).parents[2]

pytest.importorskip("rouge_score")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_opt(tmp_path_factory.mktemp("summarize") / "engine")


def table(output: str) -> dict[str, list[float]]:
    """Side -> ROUGE-1, ROUGE-2, ROUGE-L, ROUGE-Lsum, tokens, tokens/s, ms/batch, and perplexity if it was asked for."""
    rows = re.findall(r"^(trtc|transformers) +([\d. ]+)$", output, re.M)
    return {name: [float(number) for number in numbers.split()] for name, numbers in rows}


def test_both_sides_score_alike(engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """20 held-out articles in float32: ROUGE within 0.5, as many tokens, the same perplexity. TensorRT-LLM's spelling."""
    command = (
        f"summarize --engine_dir {engine} --hf_model_dir {TINY_OPT} --test_hf --test_trt_llm --data_type fp32 "
        "--batch_size 4 --max_ite 5 --output_len 64 --eval_ppl --check_accuracy --tensorrt_llm_rouge1_threshold=90"
    )
    assert main(command.split()) == 0
    output = capsys.readouterr().out
    ours, theirs = table(output)["trtc"], table(output)["transformers"]
    assert "20 articles" in output and len(ours) == len(theirs) == 8
    assert ours[:4] == pytest.approx(theirs[:4], abs=0.5) and min(ours[0], theirs[0]) > 90
    assert ours[4] == theirs[4]
    assert ours[7] == pytest.approx(theirs[7], abs=2e-4)
    for title in ("article:", "reference:", "trtc:", "transformers:"):
        assert output.count(f"\n{title}\n") + output.startswith(f"{title}\n") == 1


def test_a_missed_threshold_is_exit_code_1(engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The score itself is not over the threshold: 100 cannot be exceeded. Without --check-accuracy nothing is judged."""
    command = ["summarize", "--engine-dir", str(engine), "--test-trtc", "--max-ite", "2", "--show", "0"]
    assert main([*command, "--check-accuracy", "--rouge1-threshold", "100"]) == 1
    out, err = capsys.readouterr()
    assert (
        re.search(r"ROUGE-1 is [\d.]+, not over the threshold of 100$", err.strip()) and err.count("\n") == 1
    )
    assert list(table(out)) == ["trtc"] and "article:" not in out
    assert main([*command, "--rouge1-threshold", "100"]) == 0


def test_prompt_lookup_has_a_side_of_its_own(
    engine: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All 200 held-out articles, in batches of which some end early. Oracle: the engine's plain greedy tokens."""
    # No step costs more than another, so that all guesses are tried.
    monkeypatch.setattr(StepCosts, "plain", lambda *_: 1.0)
    monkeypatch.setattr(StepCosts, "of", lambda *_: lambda drafted: 1.0)
    command = [
        "summarize",
        "--engine-dir",
        str(engine),
        "--test-trtc",
        "--batch-size",
        "8",
        "--max-ite",
        "25",
    ]
    assert main([*command, "--show", "0", "--prompt_lookup", "1:3"]) == 0
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith("prompt lookup 1:3: "))
    accepted, proposed, _, per_step, same, all_of = re.fullmatch(
        r".*: (\d+) of (\d+) guessed tokens accepted \(([\d.]+) %\), ([\d.]+) tokens per step of a sequence; "
        r"[\d.]+ times the tokens/s; (\d+) of (\d+) summaries have the tokens of plain decoding",
        line,
    ).groups()  # type: ignore[union-attr]
    assert same == all_of == "200" and 300 < int(accepted) < int(proposed)
    plain, looked = (re.search(rf"^{name} +([\d. ]+)$", out, re.M) for name in ("trtc", "trtc, lookup"))
    assert plain and looked and plain[1].split()[:5] == looked[1].split()[:5]  # ROUGE and tokens
    tokens = int(plain[1].split()[4])
    assert float(per_step) == pytest.approx(tokens / (tokens - int(accepted)), abs=0.01)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("", ("--test-trtc", "--test-hf")),
        ("--test-trtc --prompt-lookup 3", ("prompt_lookup is 3", "N:K")),
        ("--test-hf --hf-model-dir x --prompt-lookup 3:8", ("--prompt-lookup", "--test-trtc")),
        ("--test-hf", ("--hf-model-dir",)),
        ("--test-hf --hf-model-dir x --check-accuracy", ("--check-accuracy", "--test-trtc")),
        ("--test-trtc --num-beams 0", ("--num-beams", "0")),
        ("--test-trtc --num-beams 4", ("beam_width is 4", "--max-beam-width")),
        ("--test-trtc --num-beams 4 --eval-ppl", ("--eval-ppl", "--num-beams")),
        ("--test-trtc --batch-size 0", ("--batch-size", "0")),
        ("--test-trtc --max-ite 0", ("--max-ite",)),
        ("--test-trtc --dataset nowhere.jsonl", ("nowhere.jsonl", "no such file")),
        ("--test-trtc --output-len 5000", ("5000", "max_seq_len")),
        ("--test-hf --hf-model-dir /nonexistent", ("/nonexistent", "config.json")),
    ],
)
def test_what_cannot_work_is_one_line(
    engine: Path, options: str, says: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["summarize", "--engine-dir", str(engine), *options.split()]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("trtc summarize: error: ")
    assert all(text in err for text in says), err


def test_no_default_dataset_away_from_the_checkout(
    engine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(summarize, "NEWS", ROOT / "nowhere" / "news.jsonl")
    assert main(["summarize", "--engine-dir", str(engine), "--test-trtc"]) == 1
    err = capsys.readouterr().err
    assert "--dataset" in err and "jsonl" in err and "hub name" in err


def test_a_missing_scorer_is_missed_before_anything_runs(
    engine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    monkeypatch.setattr(summarize, "_run_engine", lambda *given: pytest.fail("the engine ran"))
    assert main(["summarize", "--engine-dir", str(engine), "--test-trtc"]) == 1
    assert "pip install rouge-score" in capsys.readouterr().err


def test_a_missing_model_is_missed_before_anything_runs(
    engine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(summarize, "_run_engine", lambda *given: pytest.fail("the engine ran"))
    command = [
        "summarize",
        "--engine-dir",
        str(engine),
        "--test-trtc",
        "--test-hf",
        "--hf-model-dir",
        "nowhere",
    ]
    assert main(command) == 1
    assert "nowhere: not a Hugging Face folder: no config.json" in capsys.readouterr().err


# Of examples/opt/README.md of TensorRT-LLM; "{...}" stands for the program alone.
ONE_GPU = """
{convert_checkpoint.py} --model_dir ./opt-125m \
                --dtype float16 \
                --output_dir ./opt/125M/trt_ckpt/fp16/1-gpu/

{trtllm-build} --checkpoint_dir ./opt/125M/trt_ckpt/fp16/1-gpu/ \
                --gemm_plugin float16 \
                --max_batch_size 8 \
                --max_input_len 924 \
                --max_seq_len 1024 \
                --output_dir ./opt/125M/trt_engines/fp16/1-gpu/

{summarize.py} --engine_dir ./opt/125M/trt_engines/fp16/1-gpu/ \
                        --test_hf \
                        --batch_size 1 \
                        --test_trt_llm \
                        --hf_model_dir opt-125m \
                        --data_type fp16 \
                        --check_accuracy \
                        --tensorrt_llm_rouge1_threshold=14
"""
TWO_GPUS = """
{convert_checkpoint.py} --model_dir ./opt-125m \
                --dtype float16 \
                --output_dir ./opt/125M/trt_ckpt/fp16/2-gpu/ \
                --tp_size 2 \
                --use_parallel_embedding \
                --embedding_sharding_dim 0

{trtllm-build} --checkpoint_dir ./opt/125M/trt_ckpt/fp16/2-gpu/ \
                --gemm_plugin float16 \
                --lookup_plugin float16 \
                --max_batch_size 8 \
                --max_input_len 924 \
                --max_seq_len 1024 \
                --output_dir ./opt/125M/trt_engines/fp16/2-gpu/ \
                --workers 2

mpirun -n 2 --allow-run-as-root \
      {summarize.py} --engine_dir ./opt/125M/trt_engines/fp16/2-gpu/ \
                        --batch_size 1 \
                        --test_trt_llm \
                        --hf_model_dir opt-125m \
                        --data_type fp16 \
                        --check_accuracy \
                        --tensorrt_llm_rouge1_threshold=14
"""
COMMANDS = {"convert_checkpoint.py": "convert", "trtllm-build": "build", "summarize.py": "summarize"}


def command_lines(script: str) -> list[list[str]]:
    """The command lines of a script, with trtc's commands for the programs of TensorRT-LLM; all flags stay as they are."""
    lines = []
    for line in script.strip().split("\n\n"):
        words = []
        for word in shlex.split(line.replace("\\\n", " ")):
            command = COMMANDS[word[1:-1]] if word.startswith("{") else None
            words += [word] if command is None else [sys.executable, "-m", "trtc.cli", command]
        lines.append(words)
    return lines


def under_mpi(words: list[str]) -> list[str]:
    """The mpirun that came with mpi4py's MPI; without them, the launcher that `trtc` has itself."""
    beside = Path(sys.executable).with_name("mpirun")
    mpirun = str(beside) if beside.exists() else shutil.which("mpirun")
    if mpirun is not None and importlib.util.find_spec("mpi4py") is not None:
        return [mpirun, *words[1:]]
    return [*words[4:], "--nproc", words[2]]


def test_the_command_lines_of_tensorrt_llm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Word for word, on the tiny OPT in the place of OPT-125M. Oracle: ROUGE-1 of transformers on its float16 weights."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "opt-125m").symlink_to(TINY_OPT)
    convert, build, run = (words[3:] for words in command_lines(ONE_GPU))
    assert main(convert) == 0 and main(build) == 0
    notes = capsys.readouterr().err
    assert notes.count("\n") == 1 and "--gemm-plugin float16 changes nothing: target cpu" in notes
    built = Engine.open(Path("opt/125M/trt_engines/fp16/1-gpu")).build
    assert (built.max_batch_size, built.max_input_len, built.max_seq_len) == (8, 924, 1024)
    assert main(run) == 0
    found = table(capsys.readouterr().out)
    assert found["trtc"][0] > 90 and found["trtc"][0] == pytest.approx(found["transformers"][0], abs=2)


def test_the_command_lines_of_tensorrt_llm_for_two_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Word for word, with the embedding split by vocabulary and the lookup plugin; only rank 0 prints."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "opt-125m").symlink_to(TINY_OPT)
    convert, build, run = command_lines(TWO_GPUS)
    assert main(convert[3:]) == 0 and main(build[3:]) == 0
    notes = capsys.readouterr().err.splitlines()
    assert [note.split()[3] for note in notes] == ["--gemm-plugin", "--lookup-plugin"]
    engine = Engine.open(Path("opt/125M/trt_engines/fp16/2-gpu"))
    lookups = [
        node for node in engine.ranks[1].graph.nodes if node.op == "embedding" and node.attrs.get("masked")
    ]
    assert len(engine.ranks) == 2 and len(lookups) == 1
    code, out, err = finish(under_mpi(run))
    assert code == 0, err
    assert out.count("20 articles") == 1 and table(out)["trtc"][0] > 90


@pytest.mark.parametrize("flag", ["--gemm_plugin", "--gpt_attention_plugin", "--lookup_plugin"])
def test_plugin_flags(flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Targets cpu and cuda have what the plugins do; flavour tensorrt_rtx would need them and says why it has none."""
    build = ["build", "--model-dir", str(TINY_OPT), "--dry-run"]
    shown = flag.replace("_", "-")
    assert main([*build, flag, "float16"]) == 0
    without = main(build)
    out, err = capsys.readouterr()
    assert f"{shown} float16 changes nothing: target cpu" in err and err.count("\n") == 1
    half = len(out) // 2
    assert without == 0 and out[:half] == out[half:]  # the graph with the flag is the graph without it
    assert main([*build, flag, "disable"]) == 0
    assert capsys.readouterr().err == ""
    if importlib.util.find_spec("tensorrt_rtx") is None:
        return
    assert main([*build, "--target", "tensorrt", "--flavour", "tensorrt_rtx", flag, "auto"]) == 1
    err = capsys.readouterr().err
    reason = "has no such plugin in either flavour" if "gemm" in flag else "takes no custom plugins"
    assert f"{shown} auto: " in err and reason in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ("", None),
        ("--context_fmha disable", "disable"),
        ("--context_fmha enable", "enable"),
        ("--enable_context_fmha", "enable"),
        ("--enable_context_fmha_fp32_acc", "fp32_acc"),
        ("--enable_context_fmha --enable_context_fmha_fp32_acc", "fp32_acc"),
        ("--context_fmha enable --context_fmha_fp32_acc enable", "fp32_acc"),
        ("--context_fmha_fp32_acc disable", None),
    ],
)
def test_spellings_of_context_fmha(words: str, value: str | None) -> None:
    """Oracle: trtllm-build, where the second flag adds float32 sums to the first."""
    args = parser().parse_args(
        [
            "build",
            "--model-dir",
            "x",
            "--target",
            "cuda",
            *words.replace("_", "-").replace("fp32-acc ", "fp32-acc ").split(),
        ]
    )
    assert tensorrt_llm_flags.context_fmha(args) == value


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--enable_context_fmha", ("--enable-context-fmha", "target cpu", "--target cuda")),
        (
            "--target tensorrt --context_fmha fp32_acc --fused_attention_only",
            ("context_fmha fp32_acc", "leave one"),
        ),
        ("--target cuda --context_fmha disable --enable_context_fmha", ("contradict",)),
    ],
)
def test_refused_context_fmha(words: str, says: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", "--model-dir", str(TINY_OPT), "--dry-run", *words.split()]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and all(text in err for text in says), err


@pytest.mark.parametrize(
    ("words", "lengths"),
    [
        ("--max_input_len 924 --max_output_len 100", (924, 1024)),  # as README of release 0.10 has it
        ("--max_input_len 924 --max_seq_len 1000", (924, 1000)),
    ],
)
def test_lengths_of_an_engine(words: str, lengths: tuple[int, int], tmp_path: Path) -> None:
    build = ["build", "--model-dir", str(TINY_OPT), "--output-dir", str(tmp_path / "engine")]
    assert main([*build, *words.split()]) == 0
    described = json.loads((tmp_path / "engine" / "engine.json").read_text())["build"]
    assert (described["max_input_len"], described["max_seq_len"]) == lengths


@pytest.mark.parametrize(
    "words", ["--max_output_len 100", "--max_output_len 9 --max_input_len 9 --max_seq_len 9"]
)
def test_refused_max_output_len(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", "--model-dir", str(TINY_OPT), "--dry-run", *words.split()]) == 1
    err = capsys.readouterr().err
    assert (
        err.count("\n") == 1 and "--max-output-len goes with --max-input-len and without --max-seq-len" in err
    )


def test_the_tokenizer_dir_of_scripts_changes_nothing(
    engine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["run", "--engine_dir", str(engine), "--max_output_len", "4", "--input_text", "The news"]
    assert main(run) == 0
    text = capsys.readouterr().out
    assert main([*run, "--tokenizer_dir", "opt-125m"]) == 0
    out, err = capsys.readouterr()
    assert out == text
    assert "trtc run: note: --tokenizer-dir opt-125m changes nothing: the tokenizer is in the engine\n" in err


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("--gpt_attention_plugin auto", {"attention_plugin": True}),
        ("--lookup_plugin float16 --gpt_attention_plugin disable", {"lookup_plugin": True}),
        ("--gemm_plugin disable", {}),
    ],
)
def test_plugin_flags_become_options_of_target_tensorrt(words: str, options: dict[str, bool]) -> None:
    args = parser().parse_args(["build", "--model-dir", "x", "--target", "tensorrt", *dashed(words)])
    assert tensorrt_llm_flags.plugin_options(args, "float16") == options
    args.gpt_attention_plugin = "bfloat16"
    with pytest.raises(
        ConfigError, match=r"--gpt-attention-plugin bfloat16: the model is float16.*--dtype bfloat16"
    ):
        tensorrt_llm_flags.plugin_options(args, "float16")


def dashed(words: str) -> list[str]:
    return [re.sub("_", "-", word) if word.startswith("--") else word for word in words.split()]


def test_the_migration_page_names_every_flag() -> None:
    """Oracle: the command line. What the page shows as trtc's is an option of trtc, and no flag is shown twice."""
    page = (ROOT / "docs" / "migrating-from-tensorrt-llm.md").read_text()
    options = {
        option
        for action in parser()._actions
        for sub in (getattr(action, "choices", None) or {}).values()
        for option in sub._option_string_actions
    }
    rows = [line.split("|")[1:-1] for line in page.splitlines() if line.startswith("| `--")]
    theirs = [flag for row in rows for flag in re.findall(r"`(--\w+)", row[0])]
    assert len(rows) > 60 and all("-" not in flag[2:] for flag in theirs)
    shown = [flag for row in rows for flag in re.findall(r"`(--[\w-]+)", row[1])]
    assert len(shown) > 25 and set(shown) <= options


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_migration_page_maps_every_flag(program: str) -> None:
    """Oracle: the options of TensorRT-LLM's own parsers. An option that several programs have may stand with any of them."""
    page = (ROOT / "docs" / "migrating-from-tensorrt-llm.md").read_text()
    sections = {part.split("\n", 1)[0].split(" (")[0]: part for part in page.split("\n## ")[1:]}
    assert program in sections
    within = sections[program] if program in ("convert_checkpoint.py", "trtllm-build") else page
    mapped = {
        flag for line in within.splitlines() if line.startswith("| `--")
        for flag in re.findall(r"`--(\w+)", line.split("|")[1])
    }  # fmt: skip
    assert set(PROGRAMS[program].split()) - mapped == set()
