"""`trtc convert`: a Hugging Face folder -> a trtc checkpoint."""

from __future__ import annotations

import argparse
import time
from contextlib import ExitStack
from pathlib import Path

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
from .quantization import add_quantization, quantizer

NAME = "convert"
HELP = "convert a Hugging Face checkpoint into a trtc checkpoint, sharded for the ranks that will run it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model-dir", type=Path, required=True, help="folder with config.json and weights")
    parser.add_argument(
        "--output-dir", type=Path, required=True, help="folder to write; an older checkpoint is replaced"
    )
    add_model_source(parser)
    add_quantization(parser)
    add_workers(parser)


def main(args: argparse.Namespace) -> int:
    from ..core.checkpoint import TrtcCheckpoint, convert

    start = time.perf_counter()
    with ExitStack() as stack:
        source = stack.enter_context(open_checkpoint(args.model_dir))
        family, model = find_family(args, source.config, args.model_dir)
        check_tokenizer(args.model_dir)
        convert(
            source,
            family.weight_table(model),
            model,
            args.output_dir,
            dtype=model.dtype,
            sharding=sharding_options(args),
            workers=args.workers,
            progress=stack.enter_context(progress_bar("converting")),
            quantize=quantizer(args, family, model, source, stack),
        )
    size = human_bytes(folder_bytes(args.output_dir))
    ranks = sharding_options(args).num_ranks
    quantization = TrtcCheckpoint.open(args.output_dir).quantization
    stored = model.dtype if quantization is None else f"{model.dtype}, weights {quantization}"
    print(f"{args.output_dir}: {family.name} in {stored}, {ranks} rank(s), {size}, "
          f"{time.perf_counter() - start:.1f} s")  # fmt: skip
    return 0
