"""trtc beside a peer over several ranks. Oracles: a peer made by the test, an engine of target cpu, numbers by hand."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from trtc.bench import opt_sizes, ranks_vs_vllm
from trtc.bench.ranks_vs_vllm import Plan, markdown, ours, plan, results, theirs

VLLM = """
from types import SimpleNamespace as Bag
__version__ = "0"
SamplingParams = Bag
class LLM:
    def __init__(self, **options):
        self.options = options
        scheduler = Bag(max_num_seqs=8, max_num_batched_tokens=options["max_num_batched_tokens"])
        cache = Bag(num_gpu_blocks=3, block_size=16)
        compilation = Bag(cudagraph_mode=options["tensor_parallel_size"])
        self.llm_engine = Bag(vllm_config=Bag(
            scheduler_config=scheduler, cache_config=cache, compilation_config=compilation))
    def generate(self, prompts, params, use_tqdm):
        return [Bag(outputs=[Bag(token_ids=[7] * params.max_tokens)]) for _ in prompts]
"""
TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 64, "vocab_size": 100,
        "word_embed_proj_dim": 32, "max_position_embeddings": 1024}  # fmt: skip
SHORT = Plan(("1x8x3", "2x8x1"), 16384, 1 << 24, tight=True)
GIB = 1 << 30


@pytest.fixture
def args(tmp_path: Path) -> argparse.Namespace:
    (tmp_path / "site" / "vllm").mkdir(parents=True)
    (tmp_path / "site" / "vllm" / "__init__.py").write_text(VLLM)
    return argparse.Namespace(peer=tmp_path, arch="sm_90", tp_size=1, repeat=2, keep=False, build_only=False, peer_limit_s=60,
                              commit="c" * 40, json=tmp_path / "result.json")  # fmt: skip


def for_cpu(command: list[str], *rest: Any, **more: Any) -> Any:
    words = [word for word in command if word not in ("--cuda-arch", "sm_90")]
    return RUN(["cpu" if word == "cuda" else word for word in words], *rest, **more)


RUN = ranks_vs_vllm.run


def test_both_sides_are_timed(
    tmp_path: Path, args: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(opt_sizes.SIZES, "125m", TINY)  # type: ignore[misc]
    monkeypatch.setattr(ranks_vs_vllm, "run", for_cpu)
    mine = list(ours("125m", SHORT, tmp_path, args))
    assert [record["kind"] for record in mine] == ["build", "start", "setup", "batch", "batch"], mine
    assert mine[3]["out_len"] == 3 and len(mine[3]["total_all"]) == 2
    # Of so small a model the difference may be anything, on a machine that has other work even less than 0.
    step_ms = 1e3 * (mine[3]["total_s"] - mine[3]["prefill_s"]) / 2
    assert mine[3]["decode_ms_per_token"] == pytest.approx(step_ms, abs=2e-3)
    assert (mine[4]["batch"], mine[4]["in_len"]) == (2, 8) and "decode_ms_per_token" not in mine[4]
    assert not (tmp_path / "engine").exists()
    other = list(theirs("125m", SHORT, tmp_path, args))
    assert [record["kind"] for record in other] == ["setup", "batch", "batch"], other
    assert (other[0]["max_num_batched_tokens"], other[0]["cache_tokens"], other[0]["tp_size"]) == (
        16384,
        48,
        1,
    )
    assert "decode_ms_per_token" in other[1] and "decode_ms_per_token" not in other[2]


def test_a_side_that_fails_is_on_record(tmp_path: Path, args: argparse.Namespace) -> None:
    args.arch = "sm_1"
    (failed,) = ours("125m", SHORT, tmp_path, args)
    assert failed["kind"] == "error" and "sm_1" in failed["message"]
    (args.peer / "site" / "vllm" / "__init__.py").write_text("raise SystemExit('no GPU')")
    (failed,) = theirs("125m", SHORT, tmp_path, args)
    assert failed["kind"] == "error" and failed["message"] == "no GPU"


def test_what_a_side_has_timed_is_kept_when_its_time_is_up(tmp_path: Path, args: argparse.Namespace) -> None:
    """With as much time as this machine takes to come to the second case, where the peer stays."""
    hangs = VLLM.replace(
        "use_tqdm):\n", "use_tqdm):\n        import time; time.sleep(600 * (len(prompts) == 9))\n"
    )
    (args.peer / "site" / "vllm" / "__init__.py").write_text(hangs)
    planned = dataclasses.replace(SHORT, cases=("1x8x1", "9x8x1"))
    for limit_s in (1, 4, 16, 64):
        args.peer_limit_s = limit_s
        found = list(theirs("125m", planned, tmp_path, args))
        if len(found) == 3:
            break
    assert [record["kind"] for record in found] == ["error", "setup", "batch"], found
    assert found[0]["message"] == f"not done after {limit_s} s" and found[2]["batch"] == 1


def test_what_fits() -> None:
    """By hand: 66B has 131 GB of weights and 2.36 MB of cache a token, over the ranks."""
    small, large = plan("66b", 2, 80 * GIB), plan("66b", 2, 140 * GIB)
    assert small.tight and small.cases == ("1x512x128", "8x512x128", "64x64x64", "64x512x1")
    assert not large.tight and large.cases[2:] == ("64x512x128",)
    token = 2 * 2 * 64 * 9216 // 2
    assert 8 * 640 * token <= small.cache_bytes < 10 * GIB and 64 * 640 * token <= large.cache_bytes
    assert plan("13b", 2, 80 * GIB).cache_bytes == 64 * 1024 * 2 * 2 * 40 * 5120 // 2
    with pytest.raises(SystemExit, match="66b does not fit 1 GPUs of 81920 MiB"):
        plan("66b", 1, 80 * GIB)


def batch(batch: int, tokens_in: int, tokens_out: int, step: float | None, prefill: float) -> dict[str, Any]:
    times = {} if step is None else {"decode_ms_per_token": step, "decode_percent_of_read_limit": 90.0}
    return {
        "kind": "batch", "batch": batch, "in_len": tokens_in, "out_len": tokens_out, "prefill_s": prefill, **times
    }  # fmt: skip


def test_the_table() -> None:
    """Ratios, aims that are not reached, and a side that is missing."""
    mine = [{"kind": "setup", "trtc": "1", "device": "GPU", "torch": "2"}, batch(1, 512, 128, 20.0, 0.1),
            batch(64, 64, 32, 30.0, 0.5), batch(64, 512, 1, None, 4.0)]  # fmt: skip
    other = [{"kind": "setup", "vllm": "0.9"}, batch(1, 512, 128, 25.0, 0.1), batch(64, 64, 32, 30.0, 0.5),
             batch(64, 512, 1, None, 6.0)]  # fmt: skip
    models = {
        "66b": {"cases": [], "tight": True, "trtc": mine, "vllm": other},
        "13b": {"cases": [], "tight": False, "trtc": mine[:2]},
    }
    data = {"models": models, "tp_size": 2, "driver": "5", "commit": "abc", "date": "today"}
    text = markdown(data)
    assert text.splitlines()[2:7] == [
        "| OPT-66B | decode step, 1 x 512 in, 128 out | 20.000 ms | 25.000 ms | 1.25 | 1.2 | 90.0 |",
        "| OPT-66B | decode step, 64 x 64 in, 32 out | 30.000 ms | 30.000 ms | 1.00 | 1.05 (short) | 90.0 |",
        "| OPT-66B | prefill, 64 x 512 | 4000.0 ms | 6000.0 ms | 1.50 | 1.05 |  |",
        "| OPT-13B | decode step, 1 x 512 in, 128 out | 20.000 ms |  |  |  | 90.0 |",
        "| OPT-13B | prefill, 1 x 512 | 100.0 ms |  |  |  |  |",
    ]
    assert "2 x GPU, driver 5" in text and "OPT-66B: 64 sequences of 640 tokens do not fit" in text


def test_numbers_of_another_commit_are_not_mixed_in(
    args: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks_vs_vllm, "nvidia_smi", lambda field: "580")
    data = results(args)
    assert data["models"] == {} and data["tp_size"] == 1
    args.json.write_text(json.dumps(data))
    assert results(args) == data
    args.tp_size = 2
    with pytest.raises(SystemExit, match="is of tp_size 1, this is 2"):
        results(args)
