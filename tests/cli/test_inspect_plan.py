"""`trtc build` and `trtc inspect` of TensorRT engines, from the command line to what the engine says."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from trtc.cli.main import main
from trtc.core.engine import Engine
from trtc.core.sharding import ShardingOptions
from trtc.core.targets.tensorrt import TARGET
from trtc.core.targets.tensorrt.flavour import find_flavour
from trtc.core.targets.tensorrt.lower import LoweringOptions, lower_graph
from trtc.tests.core.targets.tensorrt_opt import CAPACITY, Session, ranks_of
from trtc.tests.opt_models import OptCheckpoint, save_hf
from trtc.tests.tolerances import LOGITS_FLOAT32_ABS, max_error
from trtc.tests.trt_interpreter import NetworkInterpreter

pytestmark = pytest.mark.tensorrt_rtx
Checkpoints = Callable[[str], OptCheckpoint]


@pytest.fixture(autouse=True)
def rtx() -> None:
    pytest.importorskip("tensorrt_rtx")


def build(folder: Path, variant: str, *options: str) -> Engine:
    model = save_hf(variant, folder / "model")
    words = ["build", "--model", "opt", "--model-dir", str(model), "--output-dir", str(folder / "engine")]
    target = [
        "--target",
        "tensorrt",
        "--flavour",
        "tensorrt_rtx",
        "--max_batch_size",
        "2",
        "--max-seq-len",
        "64",
    ]
    assert main([*words, *target, *options]) == 0
    return Engine.open(folder / "engine")


def test_options_reach_the_plan_and_inspect_tells_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = build(
        tmp_path, "pre_norm", "--dtype", "float16", "--compute-capability", "8.0", "12.0", "--optimization_level", "0",
        "--weight-streaming", "--context-fmha", "fp32_acc",
    )  # fmt: skip
    assert engine.build.target_options == {
        "flavour": "tensorrt_rtx", "compute_capabilities": ["8.0", "12.0"], "optimization_level": 0,
        "weight_streaming": True, "context_fmha": "fp32_acc",
    }  # fmt: skip
    capsys.readouterr()
    assert main(["inspect", str(engine.path)]) == 0
    text = capsys.readouterr().out
    for line in (
        r"plan +tensorrt_rtx 1\.\d.*, [\d.]+ [KM]iB", r"for GPUs +8\.0, 12\.0", r"plugins +none needed",
        r"network +\d+ layers, 8 inputs, 5 outputs", r"decode +profile: batch 1 to 2, length 1 to 1",
        r"prefill +profile: batch 1 to 2, length 1 to 63", r"weights +in the plan, float16",
    ):  # fmt: skip
        assert re.search(f"^{line}$", text, re.MULTILINE), (line, text)
    picture = tmp_path / "graph.html"
    assert main(["inspect", str(engine.path), "--format", "html", "--output", str(picture)]) == 0
    assert "tensorrt_rtx 1." in picture.read_text() and "layers.1" in picture.read_text()
    capsys.readouterr()
    assert main(["inspect", str(engine.path), "--format", "dot", "--rank", "1"]) == 1
    assert "--rank 1: the engine has ranks 0 to 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("embedding", "options"),
    [
        ((), {}),
        (("--use-parallel-embedding",), {"use_parallel_embedding": True, "embedding_sharding_dim": 0}),
        (("--use_parallel_embedding", "--embedding_sharding_dim", "1"),
         {"use_parallel_embedding": True, "embedding_sharding_dim": 1}),
    ],
    ids=["whole", "by rows", "by columns"],
)  # fmt: skip
def test_ranks_of_a_build_together_compute_what_one_does(
    embedding: tuple[str, ...], options: dict[str, int], tmp_path: Path, opt_checkpoint: Checkpoints
) -> None:
    """A plan for each of two ranks, made by two workers. The graphs that the engine keeps, lowered again and interpreted
    together with real collectives, give the logits of the network of one rank."""
    engine = build(tmp_path, "pre_norm", "--dtype", "float32", "--tp_size", "2", "--workers", "2", "--compute-capability",
                   "8.9", *embedding)  # fmt: skip
    assert [part.artifacts["plan"] for part in engine.ranks] == ["rank0.plan", "rank1.plan"]
    assert all(int(engine.files[f"rank{r}.plan"]["bytes"]) > 0 for r in range(2))
    checkpoint = opt_checkpoint("pre_norm")
    ranks, (whole,) = ranks_of(checkpoint, sharding=ShardingOptions(2, **options)), ranks_of(checkpoint)
    assert [rank.graph.hash for rank in ranks] == [part.graph.hash for part in engine.ranks]
    lowering, flavour = LoweringOptions(kv_capacity=CAPACITY), find_flavour("tensorrt_rtx")
    networks = [lower_graph(rank.graph, rank.weights, flavour, lowering) for rank in (*ranks, whole)]
    *parts, one = [NetworkInterpreter(network.definition, flavour.trt) for network in networks]
    sharded, alone = Session(parts, 2), Session([one], 2)
    for new in ([[5, 6, 7], [8]], [[1], [2]], [[3], [4]]):
        found, expected = sharded.step(new), alone.step(new)
        assert max_error(found, expected) <= LOGITS_FLOAT32_ABS
        assert torch.equal(found.argmax(-1), expected.argmax(-1))


def test_workers_build_ranks_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With two workers, neither of two ranks is compiled before the other has begun; with one, they follow each other."""
    running, most = set[int](), list[int]()
    together = threading.Barrier(2, timeout=30)

    def compile_rank(
        graph: object, build: object, directory: Path, rank: int, weights: object
    ) -> dict[str, object]:
        running.add(rank)
        if parallel:
            together.wait()
        most.append(len(running))
        running.discard(rank)
        (directory / f"rank{rank}.plan").write_bytes(b"plan")
        return {"plan": f"rank{rank}.plan"}

    monkeypatch.setattr(TARGET, "compile", compile_rank)
    for workers, parallel in (("2", True), ("1", False)):
        most.clear()
        build(tmp_path, "pre_norm", "--dtype", "float32", "--tp_size", "2", "--workers", workers)
        assert max(most) == (2 if parallel else 1)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--compute-capability 9.0", "makes no plan for compute capability 9.0; accepted: 7.5, 8.0"),
        ("--timing-cache cache", "times no kernels while it builds; leave timing_cache out"),
        ("--gpt_attention_plugin auto", "takes no custom plugins and uses TensorRT's own attention layers"),
        ("--lookup-plugin auto", "takes no custom plugins and uses gather and select"),
        ("--gemm_plugin auto", "has no such plugin in either flavour"),
    ],
)
def test_what_the_flavour_does_not_have_is_refused_in_one_line(
    words: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_hf("pre_norm", tmp_path / "model")
    command = [
        "build",
        "--model-dir",
        str(model),
        "--output-dir",
        str(tmp_path / "engine"),
        "--target",
        "tensorrt",
    ]
    capsys.readouterr()
    assert main([*command, "--flavour", "tensorrt_rtx", *words.split()]) == 1
    err = capsys.readouterr().err
    assert says in err and err.strip().count("\n") == 0
    assert not (tmp_path / "engine").exists()
