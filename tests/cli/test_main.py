"""The command line as a user meets it. Oracle: the library called directly, and transformers for the text."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from trtc import __version__
from trtc.cli.inspect import facts
from trtc.cli.main import main, with_dashes
from trtc.core.engine import Engine
from trtc.runtime.tokenizer import Tokenizer
from trtc.tests.tiny_opt import NEWS, TINY_OPT

ARTICLES = [json.loads(line)["article"] + " TL;DR:" for line in NEWS.read_text().splitlines()[:3]]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built with the spelling that TensorRT-LLM's scripts have."""
    folder = tmp_path_factory.mktemp("cli") / "engine"
    command = (
        f"build --model opt --model_dir {TINY_OPT} --output_dir {folder} --dtype float32 --max_batch_size=4"
    )
    assert main(command.split()) == 0
    return folder


@pytest.mark.parametrize("converts", [False, True])
def test_an_older_tokenizer_gets_its_new_form(tmp_path: Path, converts: bool) -> None:
    """Which class it is of follows from the Hugging Face config.json alone. Oracle: the ids that tokenizer.json gives."""
    model, checkpoint, engine = (str(tmp_path / name) for name in ("hf", "checkpoint", "engine"))
    shutil.copytree(TINY_OPT, model, ignore=lambda _, names: {"tokenizer.json", "tokenizer_config.json"})
    source = ["--model-dir", model]
    if converts:
        assert main(["convert", *source, "--output-dir", checkpoint]) == 0
        source = ["--checkpoint-dir", checkpoint]
    assert main(["build", *source, "--output-dir", engine]) == 0
    made, expected = Tokenizer.from_dir(engine), Tokenizer.from_dir(TINY_OPT)
    assert made is not None and expected is not None
    ids = expected.encode(ARTICLES[0], special_tokens=False)
    assert made.encode(ARTICLES[0], special_tokens=False) == ids


@pytest.mark.parametrize("option", [["--output", "picture"], ["--rank", "0"]])
def test_options_of_a_picture_are_refused_without_one(
    engine: Path, option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(engine), *option]) == 1
    assert capsys.readouterr().err == f"trtc inspect: error: {option[0]} goes with --format\n"


def test_underscores() -> None:
    words = ["--max_batch_size", "8", "--max_seq_len=1_000", "--x", "a_b", "--", "--y_z"]
    assert with_dashes(words) == ["--max-batch-size", "8", "--max-seq-len=1_000", "--x", "a_b", "--", "--y_z"]


def test_run_takes_what_steers_sampling(
    engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the library with the same parameters."""
    from trtc.runtime.llm import LLM
    from trtc.runtime.sampling_params import SamplingParams

    output = tmp_path / "out.json"
    flags = "-n 2 --best-of 4 --seed 3 --temperature 1 --max-output-len 12 --min-tokens 4 --prompt-logprobs 2"
    flags += " --logit-bias 5=2.5 9=-100 --bad-words the --bad-words-ids 7,8 6 --stop . --include-stop-str-in-output"
    command = ["run", "--engine-dir", str(engine), "--output-json", str(output), *flags.split()]
    assert main([*command, "--show-special-tokens", "--input-text", "The city council"]) == 0
    params = SamplingParams(n=2, best_of=4, seed=3, max_tokens=12, min_tokens=4, prompt_logprobs=2,
                            logit_bias={5: 2.5, 9: -100}, bad_words=["the"], bad_words_ids=[[7, 8], [6]], stop=["."],
                            include_stop_str_in_output=True, skip_special_tokens=False)  # fmt: skip
    with LLM(engine) as llm:
        (expected,) = llm.generate("The city council", params)
    (result,) = json.loads(output.read_text())
    found = [result, *result["more"]]
    assert [each["token_ids"] for each in found] == [c.token_ids for c in expected.outputs]
    assert [each["text"] for each in found] == [c.text for c in expected.outputs]
    assert result["prompt_logprobs"][0] is None and expected.prompt_logprobs is not None
    assert [len(entry) for entry in result["prompt_logprobs"][1:]] == [
        len(entry or ()) for entry in expected.prompt_logprobs[1:]
    ]
    printed = capsys.readouterr().out
    assert all(f"Output [0.{i}]: {c.text!r}" in printed for i, c in enumerate(expected.outputs))


def test_run_gives_the_text_of_transformers(
    engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer, OPTForCausalLM

    output = tmp_path / "out.json"
    command = [
        "run",
        "--engine-dir",
        str(engine),
        "--output-json",
        str(output),
        "--max-output-len",
        "48",
        "--input-text",
    ]
    assert main(command + ARTICLES) == 0
    printed = capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(TINY_OPT)
    model = OPTForCausalLM.from_pretrained(TINY_OPT).float().eval()
    for article, result in zip(ARTICLES, json.loads(output.read_text()), strict=True):
        ids = tokenizer(article, return_tensors="pt")
        assert result["prompt_token_ids"] == ids.input_ids[0].tolist()
        expected = model.generate(**ids, max_new_tokens=48, do_sample=False)[0, ids.input_ids.shape[1] :]
        assert result["token_ids"] == expected.tolist()
        assert result["text"] == tokenizer.decode(expected, skip_special_tokens=True)
        assert result["finish_reason"] == "stop"
        assert repr(result["text"]) in printed


def test_input_files_agree(engine: Path, tmp_path: Path) -> None:
    """The same prompts as lines, as JSON and as JSON lines give the same output.

    One has the characters at which `str.splitlines` ends a line and no file does.
    """
    prompts = [*ARTICLES, "A storm\u2028\x85\x0c over"]
    files = {
        "p.txt": "\n".join(prompts),
        "p.json": json.dumps(prompts),
        "p.jsonl": "\n".join(json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts),
    }
    results = []
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        command = [
            "run",
            "--engine-dir",
            str(engine),
            "--input-file",
            str(tmp_path / name),
            "--max-output-len",
            "8",
        ]
        assert main([*command, "--output-json", str(tmp_path / "out.json")]) == 0
        results.append((tmp_path / "out.json").read_text())
    assert results[0] == results[1] == results[2]


def test_what_a_terminal_cannot_show_is_escaped(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    assert main(["run", "--engine-dir", str(engine), "--input-text", "h\xe9", "--max-output-len", "2"]) == 0
    assert b"Input [0]: 'h\\xe9'" in shown.buffer.getvalue()  # type: ignore[attr-defined]


def test_a_removed_folder_is_no_place_to_start_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tmp_path.rmdir()
    assert main(["inspect", "/none"]) == 1
    assert "error: the current folder cannot be used: No such file or directory" in capsys.readouterr().err


def test_a_device_is_written_to_and_not_replaced(engine: Path, tmp_path: Path) -> None:
    """As root, a file in the place of /dev/null would break the machine. Oracle: what the link leads to."""
    link = tmp_path / "null"
    link.symlink_to("/dev/null")
    command = ["run", "--engine-dir", str(engine), "--input-text", "x", "--max-output-len", "2"]
    assert main([*command, "--output-json", str(link)]) == 0
    assert link.is_char_device() and [path.name for path in tmp_path.iterdir()] == ["null"]


def test_a_link_to_itself_is_replaced(engine: Path, tmp_path: Path) -> None:
    """It leads to no file that could be meant."""
    loop = tmp_path / "loop.json"
    loop.symlink_to(loop.name)
    arguments = ["--input-text", "x", "--max-output-len", "4", "--output-json", str(loop)]
    assert main(["run", "--engine-dir", str(engine), *arguments]) == 0
    assert not loop.is_symlink() and json.loads(loop.read_text())


def test_stream_prints_the_same_text(engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["run", "--engine-dir", str(engine), "--max-output-len", "24", "--input-text", ARTICLES[0]]
    assert main(command) == 0
    whole = capsys.readouterr().out
    assert main([*command, "--stream"]) == 0
    streamed = capsys.readouterr().out
    text = streamed.rstrip("\n")
    assert len(text) > 20 and f"Output [0]: {text!r}" in whole
    # The first token, however long, is held back: it begins what may become a stop string.
    stops = [f"{text[:length]}no such end" for length in range(1, 12)]
    assert main([*command, "--stream", "--stop", *stops]) == 0
    assert capsys.readouterr().out == streamed


def test_prompt_lookup_writes_the_same_text(engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the command without it."""
    command = ["run", "--engine-dir", str(engine), "--max-output-len", "24", "--input-text", *ARTICLES]
    assert main(command) == 0
    plain = capsys.readouterr().out
    assert main([*command, "--prompt-lookup", "1:4"]) == 0
    out, err = capsys.readouterr()
    assert out == plain and "prompt lookup 1:4: " in err and " guessed tokens accepted" in err
    assert main([*command, "--prompt-lookup", "1:4", "--temperature", "1"]) == 1
    err = capsys.readouterr().err
    assert "prompt_lookup" in err and "temperature 0" in err and err.count("\n") == 1


def test_dry_run_prints_the_graph_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", "--model-dir", str(TINY_OPT), "--dry-run", "--trace-passes"]) == 0
    text = capsys.readouterr().out
    assert "# after compose" in text and "%logits: float32[R, " in text and "made at build time" in text
    assert not list(tmp_path.iterdir())


def test_inspect(engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(engine)]) == 0
    assert "cpu" in capsys.readouterr().out
    assert main(["inspect", "--json", str(engine)]) == 0
    assert json.loads(capsys.readouterr().out)["build"]["max_batch_size"] == 4


def test_inspect_names_the_gpus_of_machine_code(engine: Path) -> None:
    opened = Engine.open(engine)
    code = {"sm_80": "kernels.sm_80.cubins", "sm_90": "kernels.sm_90.cubins"}
    ranks = tuple(replace(part, artifacts={"code": code}) for part in opened.ranks)
    assert facts(replace(opened, ranks=ranks))["for GPUs"] == "sm_80, sm_90"
    assert "for GPUs" not in facts(opened)


def test_convert_then_build_is_build(engine: Path, tmp_path: Path) -> None:
    """Through a trtc checkpoint or straight from the Hugging Face folder: the same engine, byte for byte."""
    checkpoint, other = tmp_path / "checkpoint", tmp_path / "engine"
    options = f"convert --model-dir {TINY_OPT} --output-dir {checkpoint} --dtype float32 --workers 2"
    assert main(options.split()) == 0
    assert main(f"build --checkpoint-dir {checkpoint} --output-dir {other} --max-batch-size 4".split()) == 0
    names = sorted(path.name for path in engine.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    for name in names:
        assert (engine / name).read_bytes() == (other / name).read_bytes(), name


def test_dummy_weights_need_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "config-only"
    folder.mkdir()
    (folder / "config.json").write_text((TINY_OPT / "config.json").read_text())
    command = [
        "build",
        "--model-dir",
        str(folder),
        "--dummy-weights",
        "--output-dir",
        str(tmp_path / "engine"),
    ]
    assert main(command) == 0
    assert (
        main(
            ["run", "--engine-dir", str(tmp_path / "engine"), "--input-ids", "5,6,7", "--max-output-len", "4"]
        )
        == 0
    )
    assert "Output [0]: [" in capsys.readouterr().out


def test_as_a_program() -> None:
    """`python -m trtc.cli`: help without importing torch, the version, and an error without a traceback."""
    probe = (
        "import sys; from trtc.cli.main import parser; parser().format_help(); print('torch' in sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout
        == "False\n"
    )
    bad = subprocess.run(
        [sys.executable, "-m", "trtc.cli", "inspect", "/none"], capture_output=True, text=True, check=False
    )
    assert (
        bad.returncode == 1
        and bad.stdout == ""
        and bad.stderr.startswith("trtc inspect: error: /none: no such folder")
    )


@pytest.mark.parametrize(
    ("disposition", "says"),
    [(signal.SIG_DFL, (130, "", "trtc: interrupted\n")), (signal.SIG_IGN, (0, f"trtc {__version__}\n", ""))],
    ids=["heard", "ignored"],
)
def test_interrupted_while_it_starts(disposition: signal.Handlers, says: tuple[int, str, str]) -> None:
    """Ctrl-C before the command line is read: one line, no traceback. A script's background job ignores it."""
    probe = """
import os, signal, sys

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "trtc.cli.run":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
from trtc.cli.__main__ import run
sys.exit(run())
"""
    stopped = subprocess.run(
        [sys.executable, "-c", probe, "--version"], capture_output=True, text=True, check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, disposition),
    )  # fmt: skip
    assert (stopped.returncode, stopped.stdout, stopped.stderr) == says


def test_interrupted_while_it_ends() -> None:
    """Ctrl-C while Python cleans up behind a command that is done: no traceback of what happens to run then."""
    probe = """
import atexit, os, signal, sys
from trtc.cli.__main__ import run

signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests may run where it is ignored: behind a shell's &
atexit.register(os.kill, os.getpid(), signal.SIGINT)
sys.exit(run())
"""
    ended = subprocess.run(
        [sys.executable, "-c", probe, "--version"], capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stderr) == (-signal.SIGINT, "")


def test_a_full_disk_behind_the_output() -> None:
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "trtc.cli", "plugins"],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    says = "trtc plugins: error: standard output: No space left on device\n"
    assert (ended.returncode, ended.stderr) == (1, says)


def test_streams_that_are_closed(tmp_path: Path) -> None:
    """As `0<&- 1>&- 2>&-`: what is written to them is lost, and in no file that gets their number. Oracle: another build."""
    words = ["build", "--model-dir", str(TINY_OPT), "--output-dir"]
    command = [sys.executable, "-m", "trtc.cli", *words, str(tmp_path / "engine")]
    assert subprocess.run(command, check=False, preexec_fn=lambda: os.closerange(0, 3)).returncode == 0
    assert main([*words, str(tmp_path / "other")]) == 0
    for path in (tmp_path / "other").iterdir():
        assert (tmp_path / "engine" / path.name).read_bytes() == path.read_bytes()
