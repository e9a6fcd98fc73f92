"""What each rank of an engine holds, with the token embedding whole on every rank, split by vocabulary and by hidden size.

    python -m trtc.bench.rank_memory            # builds, runs and measures; writes bench/results/cpu-rank-memory.json
    python -m trtc.bench.rank_memory --models OPT-125M --tp-sizes 2    # these rows of it, the others stay
    python -m trtc.bench.rank_memory --table    # writes its table into docs/parallel.md, as `make docs` does

The ranks are processes that generate a few tokens. Weights are files mapped into memory, of which Linux counts what was
touched; every page is, once, as after a while of service (a lookup touches few rows of its table).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from datetime import date
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .markdown import table_of, with_table
from .provenance import commit_of_tree

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results" / "cpu-rank-memory.json"
PAGE = ROOT / "docs" / "parallel.md"
MODELS = {"OPT-125M": (768, 12, 12), "OPT-1.3B": (2048, 24, 32)}
"""Hidden size, layers, heads of the published models."""
EMBEDDINGS = {"off": (), "dim 0": (0,), "dim 1": (1,)}
MIB = 1 << 20
TOKENS = 4


def hf_config(model: str) -> dict[str, Any]:
    hidden, layers, heads = MODELS[model]
    return {
        "architectures": ["OPTForCausalLM"],
        "torch_dtype": "float16",
        "vocab_size": 50272,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "ffn_dim": 4 * hidden,
        "max_position_embeddings": 2048,
        "word_embed_proj_dim": hidden,
    }


def build(model: str, tp_size: int, embedding: str, folder: Path) -> Path:
    """An engine with dummy weights."""
    from ..cli.main import main

    (folder / "config.json").write_text(json.dumps(hf_config(model)))
    options = ["--use-parallel-embedding", "--embedding-sharding-dim", *map(str, EMBEDDINGS[embedding])]
    words = ["build", "--dummy-weights", "--model-dir", str(folder), "--output-dir", str(folder / "engine")]
    words += ["--tp-size", str(tp_size), "--max-seq-len", "256", "--workers", "2"]
    assert main(words + (options if EMBEDDINGS[embedding] else [])) == 0
    return folder / "engine"


def measure(engine: Path, tp_size: int, folder: Path) -> list[dict[str, int]]:
    """What every rank wrote down about itself."""
    from ..runtime.launcher import launch_ranks

    command = [sys.executable, "-m", "trtc.bench.rank_memory", "--rank", str(engine), str(folder)]
    assert launch_ranks(command, tp_size) == 0
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(tp_size)]


def run_rank(engine: Path, folder: Path) -> None:
    """One rank: generates, then writes down its memory."""
    import torch

    from ..core.engine import Engine
    from ..runtime.llm import LLM
    from ..runtime.placement import placement
    from ..runtime.sampling_params import SamplingParams

    class Touched(Engine):
        def map_weights(self, rank: int) -> dict[str, torch.Tensor]:
            weights = super().map_weights(rank)
            sizes = [
                len(w.flatten().view(torch.uint8)[::4096].clone()) and w.nbytes for w in weights.values()
            ]
            found["weights"] = sum(sizes)
            return weights

    from ..runtime import follower

    follower.Engine = Touched  # type: ignore[misc]
    found = {"before": _peak()}
    try:
        with LLM(engine, verify=False) as llm:
            params = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True)
            llm.generate([[2, *range(10 * i, 10 * i + 30)] for i in range(1, 5)], params)
    except SystemExit:  # a rank that has followed rank 0 to the end
        pass
    found["peak"] = _peak()
    (folder / f"{placement().rank}.json").write_text(json.dumps(found))


def _peak() -> int:
    """Bytes of this process that were in memory at once, at most."""
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM:")]
    return int(line.split()[1]) << 10


def run(models: list[str], tp_sizes: list[int]) -> dict[str, Any]:
    import torch

    rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    rows = [row for row in rows if row["model"] not in models or row["tp_size"] not in tp_sizes]
    for model, tp_size, embedding in product(models, tp_sizes, EMBEDDINGS):
        with TemporaryDirectory(prefix="trtc-memory-") as name:
            folder = Path(name)
            ranks = measure(build(model, tp_size, embedding, folder), tp_size, folder)
        rows.append({"model": model, "tp_size": tp_size, "embedding": embedding, "ranks": ranks})
        print(json.dumps(rows[-1]), flush=True)
    return {
        **commit_of_tree(),
        "date": date.today().isoformat(),
        "device": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "rows": sorted(rows, key=lambda row: (list(MODELS).index(row["model"]), row["tp_size"])),
    }


def table(data: dict[str, Any]) -> str:
    """The largest rank of every row, and the line below that says what was measured."""
    header = (
        "model",
        "tp",
        "parallel embedding",
        "weights of a rank",
        "beside off",
        "peak beyond an empty process",
    )
    lines: list[tuple[str, ...]] = []
    whole: dict[tuple[str, int], int] = {}
    for row in data["rows"]:
        weights = max(rank["weights"] for rank in row["ranks"])
        peak = max(rank["peak"] - rank["before"] for rank in row["ranks"])
        key = (row["model"], row["tp_size"])
        share = weights / whole.setdefault(key, weights)
        cells = (row["model"], str(row["tp_size"]), row["embedding"], f"{weights / MIB:.0f} MiB")
        lines.append((*cells, f"{100 * share:.0f}%", f"{peak / MIB:.0f} MiB"))
    text = table_of(header, lines)
    return (
        f"{text}\nTarget cpu, float16, dummy weights, {data['device']}, trtc at {data['commit']}"
        f"{' with local changes' if data['dirty'] else ''}, torch {data['torch']}, {data['date']}. The largest rank of each "
        f"row; the peak is that of the process (VmHWM) once every weight was touched, less what it had before it loaded the "
        f"engine. Every rank: `bench/results/{RESULTS.name}`.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rank", nargs=2, type=Path, metavar=("ENGINE", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--tp-sizes", nargs="+", type=int, default=[2, 4])
    args = parser.parse_args()
    if args.rank:
        run_rank(*args.rank)
        return
    if not args.table:
        RESULTS.write_text(json.dumps(run(args.models, args.tp_sizes), indent=1) + "\n")
    PAGE.write_text(with_table(PAGE.read_text(), RESULTS.stem, table(json.loads(RESULTS.read_text()))))


if __name__ == "__main__":
    main()
