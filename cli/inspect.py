"""`trtc inspect`: what an engine holds."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.dtypes import DType
from ..core.errors import ConfigError
from .common import human_bytes
from .output_files import check_output_file, write_bytes

if TYPE_CHECKING:
    from ..core.engine import Engine
    from ..core.graph import Graph

NAME = "inspect"
HELP = "show what an engine holds, after checking that it is sound"
FORMATS = ("dot", "html", "onnx")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("engine_dir", type=Path, metavar="ENGINE", help="folder written by `trtc build`")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--graph", action="store_true", help="print the graph of every rank")
    form.add_argument("--json", action="store_true", help="print configuration and files as JSON")
    form.add_argument("--format", choices=FORMATS,
                      help="a picture of the graph: Graphviz text, one HTML page, or an ONNX model for viewers")  # fmt: skip
    parser.add_argument("--rank", type=int, metavar="N", help="of --format (default: 0)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="of --format (default: standard output)")


def main(args: argparse.Namespace) -> int:
    from ..core.engine import Engine

    for option in ("rank", "output"):
        if getattr(args, option) is not None and not args.format:
            raise ConfigError(f"--{option} goes with --format")
    check_output_file(args.output, "--output")
    engine = Engine.open(args.engine_dir)
    if args.format:
        return _draw(engine, args)
    if args.graph:
        for rank, part in enumerate(engine.ranks):
            print(f"# rank {rank}\n{part.graph}\n")
        return 0
    if args.json:
        data = {"trtc_version": engine.trtc_version, "model": engine.model.to_json(), "build": engine.build.to_json(),
                "files": dict(engine.files)}  # fmt: skip
        print(json.dumps(data, indent=2))
        return 0
    for key, value in facts(engine).items():
        print(f"{key:<10}  {value}")
    return 0


def facts(engine: Engine) -> dict[str, str]:
    """Label -> text."""
    from ..core.targets.base import CacheShape

    model, build = engine.model, engine.build
    cache = CacheShape.of(engine.ranks[0].graph, build.page_size)
    weights = {name for part in engine.ranks for name in part.weights}
    return {
        "model": f"{model.family}, {model.architecture}, {model.num_layers} layers, hidden {model.hidden_size}, "
        f"{model.num_heads} heads, vocabulary {model.vocab_size}, {model.dtype}",
        "target": build.target,
        "limits": f"batch {build.max_batch_size}, prompt {build.max_input_len}, sequence {build.max_seq_len}, "
        f"{build.max_num_tokens} tokens a step",
        "ranks": f"{build.num_ranks}: tp {build.tp_size} x pp {build.pp_size}",
        "weights": f"{human_bytes(sum(int(engine.files[name]['bytes']) for name in weights)) if weights else 'in the plan'}, "
        f"{weight_precision(engine.ranks[0].graph)}",
        "KV cache": f"{human_bytes(cache.bytes_per_page / build.page_size)} a token and rank, {cache.dtype}, "
        f"pages of {build.page_size}",
        "tokenizer": "yes" if "tokenizer.json" in engine.files else "no: works with token ids",
        "graph": f"{len(engine.ranks[0].graph.nodes)} nodes, sha256 {engine.ranks[0].graph.hash[:16]}",
        **dict(_target_facts(engine)),
        "written by": f"trtc {engine.trtc_version}",
    }  # fmt: skip


def _target_facts(engine: Engine) -> Iterator[tuple[str, str]]:
    """What an engine of target cuda says of its machine code, and one of target tensorrt of its plans."""
    artifacts = engine.ranks[0].artifacts
    if "code" in artifacts:
        yield "for GPUs", ", ".join(artifacts["code"])
    if "plan" not in artifacts:
        return
    bytes_of = [human_bytes(int(engine.files[part.artifacts["plan"]]["bytes"])) for part in engine.ranks]
    yield "plan", f"{artifacts['flavour']} {artifacts['version']}, {', '.join(bytes_of)}"
    takes = artifacts["compute_capabilities"]
    yield "for GPUs", ", ".join(takes) if takes else "those that the flavour builds for when none is named"
    yield "plugins", ", ".join(artifacts.get("plugins", ())) or "none needed"
    ends = f"{len(artifacts['inputs'])} inputs, {len(artifacts['outputs'])} outputs"
    yield "network", f"{artifacts.get('layers', '?')} layers, {ends}"
    for profile in artifacts["profiles"]:
        sizes = [(what, size) for what, size in profile.items() if what != "name"]
        yield (
            profile["name"],
            "profile: " + ", ".join(f"{what} {size[0]} to {size[-1]}" for what, size in sizes),
        )


def _draw(engine: Engine, args: argparse.Namespace) -> int:
    from ..core.picture import FORMATS as DRAW

    rank = args.rank or 0
    if not 0 <= rank < len(engine.ranks):
        raise ConfigError(f"--rank {rank}: the engine has ranks 0 to {len(engine.ranks) - 1}")
    title = f"{engine.path.resolve().name}, rank {rank}"
    content = DRAW[args.format](engine.ranks[rank].graph, title, facts(engine))
    if args.output is None:
        sys.stdout.buffer.write(content)
        sys.stdout.flush()
        return 0
    write_bytes(args.output, content)
    print(f"{args.output}: {human_bytes(len(content))}")
    return 0


def weight_precision(graph: Graph) -> str:
    """`float16`, or what the integers of a quantized engine are beside it."""
    weights = {node.outputs[0].dtype for node in graph.weights}
    names = {DType.INT8: "int8", DType.UINT8: "int4", DType.FLOAT8_E4M3: "fp8"}
    activations = " with fp8 activations" if any("activations" in node.attrs for node in graph.nodes) else ""
    return " and ".join(sorted(names.get(dtype, dtype.value) for dtype in weights)) + activations
