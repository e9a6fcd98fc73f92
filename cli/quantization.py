"""Options for weight-only quantization, which `convert` and `build --model-dir` have in common."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from ..core.config import ModelConfig
from ..core.errors import ConfigError
from ..core.quantize.scheme import FP8_ACTIVATIONS, GROUP_SIZES, PRECISIONS, QuantizeOptions, WeightFormat
from .common import progress_bar

if TYPE_CHECKING:
    from ..core.hf import HFCheckpoint
    from ..core.plugin_registry import Family
    from ..core.quantize.source import Quantizer

_GROUP_SIZE = 128


def add_quantization(parser: argparse.ArgumentParser) -> None:
    """By the names of TensorRT-LLM's convert_checkpoint, and vLLM's `--quantization`."""
    group = parser.add_argument_group("quantization")
    group.add_argument(
        "--use-weight-only", action="store_true", help="store the weights of linear layers as integers"
    )
    group.add_argument("--weight-only-precision", choices=PRECISIONS,
                       help="int8, fp8 (e4m3): a scale for every row; int4: one for every group (default: int8)")  # fmt: skip
    group.add_argument("--quantization", choices=(FP8_ACTIVATIONS,),
                       help="fp8: weights in e4m3, and activations in products of many rows, with a scale a row")  # fmt: skip
    group.add_argument("--use-fp8-rowwise", action="store_true", help="as --quantization fp8")
    sizes = ", ".join(map(str, GROUP_SIZES))
    group.add_argument("--group-size", type=int, metavar="N",
                       help=f"int4: columns that share a scale, {sizes} (default: {_GROUP_SIZE})")  # fmt: skip
    group.add_argument("--quantize-lm-head", action="store_true",
                       help="the language-model head too; it then shares nothing with the embedding")  # fmt: skip
    group.add_argument("--calibrate", type=Path, metavar="FILE",
                       help="jsonl of texts: round for the inputs they give each layer (GPTQ), not to nearest")  # fmt: skip


def quantize_options(args: argparse.Namespace) -> QuantizeOptions | None:
    """What `add_quantization`'s options ask for. Raises ConfigError for options that do not go together."""
    precision, group_size = args.weight_only_precision, args.group_size
    if args.quantization is not None or args.use_fp8_rowwise:
        return _fp8_options(args)
    if not args.use_weight_only:
        for option, unset in QUANTIZATION_OPTIONS.items():
            if getattr(args, option) != unset:
                raise ConfigError(f"--{option.replace('_', '-')} needs --use-weight-only")
        return None
    if precision == "int4":
        return QuantizeOptions(
            WeightFormat("int4", _GROUP_SIZE if group_size is None else group_size), args.quantize_lm_head
        )
    if precision == "fp8" and args.calibrate is not None:
        raise ConfigError("--calibrate does not go with fp8: GPTQ rounds to integers")
    return QuantizeOptions(WeightFormat(precision or "int8", group_size), args.quantize_lm_head)


def _fp8_options(args: argparse.Namespace) -> QuantizeOptions:
    """Weights and activations in e4m3."""
    own = ("quantization", "use_fp8_rowwise", "quantize_lm_head")
    for option, unset in QUANTIZATION_OPTIONS.items():
        if option not in own and getattr(args, option) != unset:
            raise ConfigError(f"--{option.replace('_', '-')} does not go with --quantization fp8")
    return QuantizeOptions(WeightFormat("fp8"), args.quantize_lm_head, FP8_ACTIVATIONS)


QUANTIZATION_OPTIONS = {
    "quantization": None,
    "use_fp8_rowwise": False,
    "use_weight_only": False,
    "weight_only_precision": None,
    "group_size": None,
    "quantize_lm_head": False,
    "calibrate": None,
}
"""The options by name, with what they are when they are not given."""


def quantizer(
    args: argparse.Namespace, family: Family, model: ModelConfig, source: HFCheckpoint, stack: ExitStack
) -> Quantizer | None:
    """What makes quantized weights of those of `source`; None where they stay floating point.

    stack: closes what the result needs. Raises ConfigError for options that do not go together or do not fit `source`.
    """
    from ..core.quantize.hub import PackedCheckpoint, import_packed
    from ..core.quantize.source import nearest
    from ..core.quantize.store import calibrated

    options = quantize_options(args)
    if isinstance(source, PackedCheckpoint):
        if options is not None:
            raise ConfigError(
                f"quantization: {source.path} is quantized already, by {source.scheme.method}; leave it out"
            )
        packed = source
        return lambda floats: import_packed(floats, packed)
    if options is None:
        return None
    if args.calibrate is None:
        return nearest(options)
    texts = _texts(args.calibrate, source.path, model.max_positions, stack)
    beside = args.output_dir and args.output_dir.parent
    if beside is not None:
        beside.mkdir(parents=True, exist_ok=True)
    folder = Path(stack.enter_context(TemporaryDirectory(prefix="trtc-gptq-", dir=beside)))
    progress = stack.enter_context(progress_bar("calibrating"))
    return lambda floats: calibrated(floats, options, family.compose(model), texts, folder, progress)


def _texts(file: Path, model_dir: Path, max_length: int, stack: ExitStack) -> list[list[int]]:
    from ..core.quantize.calibrate import read_texts
    from ..core.text_files import copy_text_files
    from ..runtime.tokenizer import Tokenizer

    scratch = Path(stack.enter_context(TemporaryDirectory(prefix="trtc-tokenizer-")))
    copy_text_files(model_dir, scratch)
    tokenizer = Tokenizer.from_dir(scratch)

    def no_tokenizer(text: str) -> list[int]:
        raise ConfigError(f"--calibrate {file}: {model_dir} has no tokenizer: give lines with token_ids")

    encode: Callable[[str], list[int]] = no_tokenizer if tokenizer is None else tokenizer.encode
    return read_texts(file, encode, max_length)
