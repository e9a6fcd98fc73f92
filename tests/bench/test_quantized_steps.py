"""The script that times engines with weights in fewer bits. Oracle: numbers made by the test, and engines of target cpu."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from trtc.bench import opt_sizes, quantized_steps
from trtc.core.engine import Engine

from .test_against_vllm import TINY, for_cpu


def test_every_format_is_built_and_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        opt_sizes.SIZES, "125m", {**TINY, "hidden_size": 128, "word_embed_proj_dim": 128, "ffn_dim": 128}
    )  # type: ignore[misc]
    monkeypatch.setattr(
        quantized_steps, "BUILD", [word if word != "cuda" else "cpu" for word in quantized_steps.BUILD]
    )
    run = quantized_steps.run
    monkeypatch.setattr(quantized_steps, "run", lambda command: run(for_cpu(command)))
    args = argparse.Namespace(arch="sm_90", repeat=1, batch=[1, 2])
    for name in ("float16", "fp8-kv8"):
        records = quantized_steps.measure("125m", name, tmp_path, args)
        assert [record["kind"] for record in records] == ["start", "setup", "batch", "batch"], records
        nodes = Engine.open(tmp_path / f"125m-{name}").ranks[0].graph.nodes
        assert any(node.name.endswith(".scale") for node in nodes) == (name != "float16")
        assert any("cache_dtype" in node.attrs for node in nodes) == name.endswith("kv8")


def test_steps_stand_beside_those_of_float16() -> None:
    """Oracle: by hand. A model without float16 has nothing to stand beside."""

    def one(model: str, name: str, step: float) -> dict[str, object]:
        batch = {"kind": "batch", "batch": 1, "decode_ms_per_token": step, "prefill_s": 0.01}
        return {"model": model, "format": name, "records": [{"kind": "start"}, batch]}

    runs = [one("6.7b", "float16", 4.0), one("6.7b", "int8", 2.0), one("66b", "int8", 20.0)]
    assert [row[4] for row in quantized_steps.rows(runs)] == ["1.00", "2.00", ""]
    assert next(quantized_steps.rows(runs)) == (
        "OPT-6.7B",
        "float16",
        "1",
        "4.000 ms",
        "1.00",
        "",
        "10.0 ms",
    )
