"""`trtc inspect`: what an engine holds."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .common import human_bytes

NAME = "inspect"
HELP = "show what an engine holds, after checking that it is sound"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("engine_dir", type=Path, metavar="ENGINE", help="folder written by `trtc build`")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--graph", action="store_true", help="print the graph of every rank")
    form.add_argument("--json", action="store_true", help="print configuration and files as JSON")


def main(args: argparse.Namespace) -> int:
    from ..core.engine import Engine
    from ..core.plugin_registry import plugins
    from ..core.targets.base import CacheShape

    plugins()  # the graph may hold ops that a plugin registers
    engine = Engine.open(args.engine_dir)
    if args.graph:
        for rank, part in enumerate(engine.ranks):
            print(f"# rank {rank}\n{part.graph}\n")
        return 0
    if args.json:
        data = {"trtc_version": engine.trtc_version, "model": engine.model.to_json(), "build": engine.build.to_json(),
                "files": dict(engine.files)}  # fmt: skip
        print(json.dumps(data, indent=2))
        return 0
    model, build = engine.model, engine.build
    cache = CacheShape.of(engine.ranks[0].graph, build.page_size)
    weights = {name for part in engine.ranks for name in part.weights}
    rows = {
        "model": f"{model.family}, {model.architecture}, {model.num_layers} layers, hidden {model.hidden_size}, "
        f"{model.num_heads} heads, vocabulary {model.vocab_size}, {model.dtype}",
        "target": build.target,
        "limits": f"batch {build.max_batch_size}, prompt {build.max_input_len}, sequence {build.max_seq_len}, "
        f"{build.max_num_tokens} tokens a step",
        "ranks": f"{build.num_ranks}: tp {build.tp_size} x pp {build.pp_size}",
        "weights": human_bytes(sum(int(engine.files[name]["bytes"]) for name in weights)),
        "KV cache": f"{human_bytes(cache.bytes_per_page / build.page_size)} a token and rank, pages of {build.page_size}",
        "tokenizer": "yes" if "tokenizer.json" in engine.files else "no: works with token ids",
        "graph": f"{len(engine.ranks[0].graph.nodes)} nodes, sha256 {engine.ranks[0].graph.hash[:16]}",
        "written by": f"trtc {engine.trtc_version}",
    }
    for key, value in rows.items():
        print(f"{key:<10}  {value}")
    return 0
