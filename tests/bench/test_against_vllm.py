"""The script that times trtc beside a peer. Oracle: a peer made by the test, and an engine of target cpu."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest
from trtc.bench import against_vllm, opt_sizes, table

PEER = """
import json, os, sys
assert os.environ["PYTHONPATH"].split(os.pathsep)[0].endswith("site")
print("a line of a log")
print(json.dumps({"kind": "setup", "vllm": "0", "import_s": 1.5, "init_s": 2.0}))
print(json.dumps({"kind": "batch", "batch": 1, "arguments": sys.argv[1:]}))
"""
TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 64, "vocab_size": 100,
        "word_embed_proj_dim": 32, "max_position_embeddings": 1024}  # fmt: skip


@pytest.fixture
def args(tmp_path: Path) -> argparse.Namespace:
    peer = tmp_path / "peer"
    peer.mkdir()
    (peer / "bench_vllm.py").write_text(PEER)
    return argparse.Namespace(peer=peer, arch="sm_90", mixed=2, json=tmp_path / "result.json",
                              peer_memory=0.9)  # fmt: skip


def test_both_sides_are_timed(
    tmp_path: Path, args: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(opt_sizes.SIZES, "125m", TINY)  # type: ignore[misc]
    build = [word if word != "cuda" else "cpu" for word in against_vllm.BUILD]
    monkeypatch.setattr(against_vllm, "BUILD", build)
    monkeypatch.setattr(against_vllm, "BATCHES", ("1", "2"))
    run = against_vllm.run
    monkeypatch.setattr(
        against_vllm, "run", lambda command, *rest, **more: run(for_cpu(command), *rest, **more)
    )
    assert against_vllm.build("125m", tmp_path, args) is None
    ours = list(against_vllm.ours(tmp_path, args))
    kinds = [record["kind"] for record in ours]
    assert kinds == ["process", "start", "setup", "batch", "batch", "continuous", "continuous"], ours
    assert 0 < ours[0]["start_to_first_token_s"] < ours[0]["start_to_end_s"]
    config = tmp_path / "model"
    theirs = list(against_vllm.theirs(config, args))
    assert [record["kind"] for record in theirs] == ["setup", "process", "batch"]
    assert theirs[1]["start_s"] == 3.5
    assert theirs[2]["arguments"][:2] == ["--config-dir", str(config)]


def for_cpu(command: list[str]) -> list[str]:
    """Without what only target cuda knows, and with short prompts."""
    if "--cuda-arch" in command:
        command = command[: command.index("--cuda-arch")]
    if "bench" in command:
        command = [*command, "--input-len", "8", "--output-len", "2", "--repeat", "1"]
    return command


def test_a_side_that_fails_is_on_record(tmp_path: Path, args: argparse.Namespace) -> None:
    """Oracle: what the command said."""
    args.arch = "sm_1"
    failed = against_vllm.build("125m", tmp_path, args)
    assert failed is not None and failed["kind"] == "error" and "sm_1" in failed["message"]
    (tmp_path / "none").mkdir()
    first, second = against_vllm.ours(tmp_path / "none", args)
    assert first["kind"] == second["kind"] == "error" and "no such folder" in second["message"]
    config = tmp_path / "model"
    (args.peer / "bench_vllm.py").write_text("raise SystemExit('no GPU')")
    (failed,) = against_vllm.theirs(config, args)
    assert failed["kind"] == "error" and failed["message"] == "no GPU"


def test_the_table_marks_what_falls_short() -> None:
    """Oracle: the bars."""
    short = table.row("6.7b", "decode", 1, "4 ms", "5 ms", 1.25, 90.0)
    reached = table.row("6.7b", "process", 1, "5 s", "49 s", 9.8, None)
    assert short[5] == "1.3 (short)" and reached[5] == "8.0"
    assert json.dumps(reached[1]) == '"process start to first token, batch 1"'


def test_what_the_file_holds_is_added_to(args: argparse.Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same commit and driver; numbers of another machine or code are not mixed in."""
    monkeypatch.setattr(against_vllm, "nvidia_smi", lambda field: "580")
    args.commit = "c" * 40
    assert against_vllm.earlier_results(args) == {}
    data = {"commit": "c" * 12, "driver": "580", "peer_memory": 0.9, "models": {"125m": {"trtc": []}}}
    args.json.write_text(json.dumps(data))
    assert against_vllm.earlier_results(args) == data
    args.commit = "d" * 40
    with pytest.raises(SystemExit, match="is of commit cccccccccccc, this is dddddddddddd"):
        against_vllm.earlier_results(args)


def test_an_engine_that_is_there_is_taken(args: argparse.Namespace, tmp_path: Path) -> None:
    """No build could write it: there is no such architecture."""
    args.arch = "sm_1"
    with opt_sizes.work_folder(tmp_path / "work") as folder:
        (folder / "125m" / "engine").mkdir(parents=True)
        assert against_vllm.build("125m", folder / "125m", args) is not None
        (folder / "125m" / "engine" / "engine.json").write_text("{}")
        assert against_vllm.build("125m", folder / "125m", args) is None
    assert folder.exists()
    with opt_sizes.work_folder(None) as folder:
        assert folder.exists()
    assert not folder.exists()


def test_a_benchmark_keeps_the_last_line_of_a_command_that_failed() -> None:
    failed = against_vllm.run([sys.executable, "-c", "raise ValueError('no such thing')"])
    assert failed is not None and failed["message"] == "ValueError: no such thing"


def test_rows_of_other_runs_say_of_which() -> None:
    """The line below the table names the run of the models that were measured in it, and that of each other."""

    def sides(bandwidth: int) -> dict[str, object]:
        setup = {"kind": "setup", "torch": "2.11", "vllm": "0.24", "read_bandwidth_gb_s": bandwidth}
        batch = {
            "kind": "batch",
            "batch": 64,
            "decode_ms_per_token": 1.0,
            "decode_percent_of_read_limit": 50.0,
        }
        return {side: [setup, {**batch, "prefill_s": 0.1}] for side in ("trtc", "vllm")}

    data = {
        "commit": "newer", "date": "day 2", "dirty": False, "device": "a GPU", "driver": "5", "note": "Alone",
        "models": {"125m": sides(4100), "6.7b": sides(4200)},
    }  # fmt: skip
    assert "4100 to 4200 GB/s" in table.table(data)
    data["other_runs"] = {"125m": {"commit": "older", "date": "day 1", "read_bandwidth_gb_s": 4100}}
    text = table.table(data)
    assert "trtc at newer" in text and "4200 GB/s; a step" in text
    assert "OPT-125M in a run of day 1 at older (4100 GB/s). Alone. Samples" in text
