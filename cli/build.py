"""`trtc build`: a checkpoint -> an engine."""

from __future__ import annotations

import argparse
import dataclasses
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..core.config import KV_CACHE_DTYPES, PAGE_SIZES, TARGETS, BuildConfig, ModelConfig
from ..core.dtypes import parse_model_dtype
from ..core.errors import ConfigError
from . import tensorrt_llm_flags
from .common import (
    add_model_source,
    add_workers,
    check_tokenizer,
    find_family,
    folder_bytes,
    human_bytes,
    open_checkpoint,
    progress_bar,
    sharding_options,
)
from .quantization import QUANTIZATION_OPTIONS, add_quantization, quantize_options, quantizer

if TYPE_CHECKING:
    from ..core.checkpoint import WeightSource
    from ..core.graph import Graph
    from ..core.plugin_registry import Family

NAME = "build"
HELP = (
    "build an engine from a Hugging Face folder or a trtc checkpoint; needs no GPU, but for flavour tensorrt"
)

_SOURCE_OPTIONS = {
    "dtype": "auto",
    "tp_size": 1,
    "pp_size": 1,
    "use_parallel_embedding": False,
    "embedding_sharding_dim": 0,
    **QUANTIZATION_OPTIONS,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model-dir", type=Path, help="Hugging Face folder, converted on the way")
    source.add_argument("--checkpoint-dir", type=Path, help="trtc checkpoint, written by `trtc convert`")
    parser.add_argument("--output-dir", type=Path, help="folder to write; an older engine is replaced")
    parser.add_argument("--dummy-weights", action="store_true",
                        help="random weights: only config.json of --model-dir is read")  # fmt: skip
    parser.add_argument("--target", default=default("target"), choices=TARGETS, help="default: %(default)s")
    limits = parser.add_argument_group("limits of the engine")
    limits.add_argument("--max-batch-size", type=int, default=default("max_batch_size"), metavar="N",
                        help="sequences in one step (default: %(default)s)")  # fmt: skip
    limits.add_argument(
        "--max-input-len", type=int, metavar="N", help="longest prompt (default: max-seq-len - 1)"
    )
    limits.add_argument("--max-seq-len", type=int, metavar="N",
                        help="longest prompt and output together (default: the model's positions)")  # fmt: skip
    limits.add_argument("--max-num-tokens", type=int, default=default("max_num_tokens"), metavar="N",
                        help="tokens of all sequences in one step (default: %(default)s)")  # fmt: skip
    limits.add_argument("--max-beam-width", type=int, default=default("max_beam_width"), metavar="N",
                        help="beams of one prompt; 1: no beam search (default: %(default)s)")  # fmt: skip
    limits.add_argument("--page-size", type=int, choices=PAGE_SIZES, default=default("page_size"),
                        help="tokens of one page of the KV cache (default: %(default)s)")  # fmt: skip
    limits.add_argument("--kv-cache-dtype", choices=tuple(KV_CACHE_DTYPES), default=default("kv_cache_dtype"),
                        help="what the KV cache holds. auto: keys and values in the model's dtype; fp8: rounded to e4m3, half "
                        "the memory, targets cuda and cpu (default: %(default)s)")  # fmt: skip
    cuda = parser.add_argument_group("target cuda")
    cuda.add_argument("--cuda-arch", nargs="+", metavar="ARCH",
                      help="GPUs to compile for: sm_80, sm_89, sm_90, sm_120 (default: all of them)")  # fmt: skip
    tensorrt = parser.add_argument_group("target tensorrt")
    tensorrt.add_argument(
        "--flavour", choices=("tensorrt", "tensorrt_rtx"), help="default: the one that is installed"
    )
    tensorrt.add_argument("--compute-capability", nargs="+", metavar="C.C",
                          help="GPUs that the plan is for, as 8.9 (default: all that the flavour builds for)")  # fmt: skip
    tensorrt.add_argument("--optimization-level", type=int, metavar="0-5", help="default: 3")
    tensorrt.add_argument("--context-fmha", choices=("disable", "enable", "fp32_acc"),
                          help="targets cuda and tensorrt, attention over prompts. cuda: unfused, fused with float16 sums, "
                          "fused with float32 sums (default: fp32_acc). tensorrt: layers of its own for every product, "
                          "fused or no plan, layers with float32 sums (default: TensorRT decides)")  # fmt: skip
    for flag, text in (
        ("--tf32", "let float32 products round their inputs to 10 bits of mantissa"),
        ("--fused-attention-only", "refuse a model that TensorRT has no fused attention kernel for"),
        ("--weight-streaming", "a plan whose weights may stay in host memory"),
        ("--strip-plan", "a plan without weights, to be refitted where it runs"),
        ("--refit", "a plan whose weights can be replaced"),
    ):
        tensorrt.add_argument(flag, action="store_true", default=None, help=text)
    tensorrt.add_argument(
        "--timing-cache", metavar="FILE", help="kernel timings of earlier builds, read and written"
    )
    tensorrt_llm_flags.add_arguments(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the graph and its cost, write nothing")
    parser.add_argument(
        "--trace-passes", action="store_true", help="with --dry-run: the graph after every pass"
    )
    add_model_source(parser)
    add_quantization(parser)
    add_workers(parser)


def default(name: str) -> Any:
    """The default of a BuildConfig field."""
    return next(f.default for f in dataclasses.fields(BuildConfig) if f.name == name)


class Source(NamedTuple):
    """What is built from."""

    family: Family
    model: ModelConfig
    weights: WeightSource
    text_files: Path


def main(args: argparse.Namespace) -> int:
    if args.dry_run:
        args.output_dir = None  # which calibration would make, to keep its integers beside
    elif args.output_dir is None:
        raise ConfigError("--output-dir is missing; give a folder for the engine, or --dry-run")
    tensorrt_llm_flags.handle_plugins(args)
    start = time.perf_counter()
    with ExitStack() as stack:
        source = _open_source(args, stack)
        build = build_config(args, source)
        if args.dry_run:
            _print_plan(args, source, build)
            return 0
        from ..core.build import build_engine

        check_tokenizer(source.text_files)
        build_engine(
            source.family,
            source.model,
            source.weights,
            build,
            args.output_dir,
            text_files=source.text_files,
            workers=args.workers,
            progress=stack.enter_context(progress_bar("building")),
        )
    size = human_bytes(folder_bytes(args.output_dir))
    quantization = source.weights.quantization
    stored = source.model.dtype if quantization is None else f"{source.model.dtype}, weights {quantization}"
    print(f"{args.output_dir}: {source.family.name} engine for {build.target}, {stored}, {size}, "
          f"{time.perf_counter() - start:.1f} s")  # fmt: skip
    return 0


def build_config(args: argparse.Namespace, source: Source) -> BuildConfig:
    return BuildConfig.for_model(
        source.model,
        max_seq_len=tensorrt_llm_flags.max_seq_len(args),
        max_input_len=args.max_input_len,
        target=args.target,
        max_batch_size=args.max_batch_size,
        max_num_tokens=args.max_num_tokens,
        max_beam_width=args.max_beam_width,
        page_size=args.page_size,
        kv_cache_dtype=tensorrt_llm_flags.kv_cache_dtype(args),
        tp_size=source.weights.sharding.tp_size,
        pp_size=source.weights.sharding.pp_size,
        target_options=_target_options(args)
        | tensorrt_llm_flags.plugin_options(args, source.model.dtype.value),
    )


def _target_options(args: argparse.Namespace) -> dict[str, Any]:
    """Options of the target that were given; every target refuses those it does not know."""
    options = {
        "architectures": args.cuda_arch,
        "context_fmha": tensorrt_llm_flags.context_fmha(args),
        "flavour": args.flavour,
        "compute_capabilities": args.compute_capability,
        "optimization_level": args.optimization_level,
        "tf32": args.tf32,
        "fused_attention_only": args.fused_attention_only,
        "weight_streaming": args.weight_streaming,
        "strip_plan": args.strip_plan,
        "refit": args.refit,
        "timing_cache": args.timing_cache,
    }
    return {name: value for name, value in options.items() if value is not None}


def _open_source(args: argparse.Namespace, stack: ExitStack) -> Source:
    if args.checkpoint_dir is not None:
        return _from_trtc_checkpoint(args, stack)
    if args.dummy_weights:
        return _dummy(args)
    from ..core.checkpoint import HFWeights

    source = stack.enter_context(open_checkpoint(args.model_dir))
    family, model = find_family(args, source.config, args.model_dir)
    table = family.weight_table(model)
    weights = HFWeights(source, table, model, dtype=model.dtype, sharding=sharding_options(args))
    quantize = quantizer(args, family, model, source, stack)
    return Source(family, model, weights if quantize is None else quantize(weights), args.model_dir)


def _dummy(args: argparse.Namespace) -> Source:
    from ..core.checkpoint import DummyWeights
    from ..core.hf import read_config
    from ..core.quantize.dummy import DummyQuantizedWeights

    family, model = find_family(args, read_config(args.model_dir), args.model_dir)
    weights = DummyWeights(
        family.weight_table(model), model, dtype=model.dtype, sharding=sharding_options(args)
    )
    options = quantize_options(args)
    if options is None:
        return Source(family, model, weights, args.model_dir)
    if args.calibrate is not None:
        raise ConfigError("--calibrate does not go with --dummy-weights: they are random")
    return Source(family, model, DummyQuantizedWeights(weights, options), args.model_dir)


def _from_trtc_checkpoint(args: argparse.Namespace, stack: ExitStack) -> Source:
    from ..core.checkpoint import TrtcCheckpoint
    from ..core.plugin_registry import plugins

    for option, unset in _SOURCE_OPTIONS.items():
        if getattr(args, option) != unset:
            flag = "--" + option.replace("_", "-")
            raise ConfigError(
                f"{flag} is decided when a checkpoint is converted; leave it out with --checkpoint-dir"
            )
    if args.dummy_weights:
        raise ConfigError("--dummy-weights goes with --model-dir: a trtc checkpoint has weights")
    checkpoint = TrtcCheckpoint.open(args.checkpoint_dir)
    stack.callback(checkpoint.close)
    checkpoint.verify()
    where = str(args.checkpoint_dir / "config.json: model")
    dtype = parse_model_dtype(checkpoint.config["model"].get("dtype", ""), where)
    family = plugins().family(args.model or str(checkpoint.config["model"].get("family")))
    model = dataclasses.replace(family.config(checkpoint.config["hf_config"]), dtype=dtype)
    checkpoint.check_model(model)
    return Source(family, model, checkpoint, args.checkpoint_dir)


def _print_plan(args: argparse.Namespace, source: Source, build: BuildConfig) -> None:
    from ..core.build import plan

    def show(name: str, graph: Graph) -> None:
        print(f"# after {name}\n{graph}\n")

    planned = plan(source.family, source.model, source.weights, build, 0, show if args.trace_passes else None)
    for name, recipe in planned.recipes.items():
        print(f"# weight %{name}, made at build time\n{recipe}\n")
    print(f"# rank 0 of {build.num_ranks}\n{planned.graph}\n")
    context = build.max_seq_len // 2
    batch = build.max_batch_size
    pages = -(-build.max_seq_len // build.page_size)
    cost = planned.graph.cost(
        {"T": batch, "B": batch, "B+1": batch + 1, "R": batch, "P": pages, "C": context}
    )
    print(f"# a decode step of {batch} sequences with {context} tokens each: {cost.flops / 1e9:.3f} GFLOP, "
          f"{cost.bytes / 1e6:.1f} MB moved at least")  # fmt: skip
