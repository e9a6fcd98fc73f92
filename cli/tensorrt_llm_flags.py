"""Flags of TensorRT-LLM's programs, most of them of `trtllm-build`, that have no option of their own in trtc.

Scripts written for TensorRT-LLM pass them. Each either sets an option of trtc, or changes nothing and says why on stderr,
or is refused with the reason; docs/migrating-from-tensorrt-llm.md has the whole list.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

from ..core.errors import ConfigError

_PLUGIN_VALUES = ("auto", "float16", "bfloat16", "float32", "disable")


@dataclass(frozen=True)
class _PluginFlag:
    """A plugin of TensorRT-LLM.

    built_in: what targets cpu and cuda have in its place, always
    instead:  what target tensorrt has in its place where there is no such plugin
    option:   what turns it on in target tensorrt; None: no flavour has such a plugin
    """

    built_in: str
    instead: str
    option: str | None


_PLUGINS = {
    "gemm_plugin": _PluginFlag(
        "matrix products of its own, in the model's dtype", "TensorRT's own matrix products", None
    ),
    "gpt_attention_plugin": _PluginFlag(
        "fused attention over the paged KV cache of its own",
        "TensorRT's own attention layers",
        "attention_plugin",
    ),
    "lookup_plugin": _PluginFlag(
        "a masked embedding lookup of its own",
        "gather and select, in TensorRT's own layers",
        "lookup_plugin",
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "flags of trtllm-build",
        "accepted where they change nothing, with a note; refused where they would have to",
    )
    for name in _PLUGINS:
        group.add_argument(f"--{name.replace('_', '-')}", choices=_PLUGIN_VALUES, metavar="DTYPE",
                           help=f"{', '.join(_PLUGIN_VALUES)}; see docs/migrating-from-tensorrt-llm.md")  # fmt: skip
    group.add_argument("--enable-context-fmha", action="store_true", help="as --context-fmha enable")
    group.add_argument(
        "--enable-context-fmha-fp32-acc", action="store_true", help="as --context-fmha fp32_acc"
    )
    group.add_argument("--context-fmha-fp32-acc", choices=("enable", "disable"),
                       help="enable: as --context-fmha fp32_acc")  # fmt: skip
    group.add_argument("--fp8-kv-cache", action="store_true", help="as --kv-cache-dtype fp8")
    group.add_argument("--max-output-len", type=int, metavar="N",
                       help="as --max-seq-len of --max-input-len and N together")  # fmt: skip


def add_tokenizer_dir(parser: argparse.ArgumentParser) -> None:
    """The flag that every command line of run.py has."""
    parser.add_argument(
        "--tokenizer-dir", metavar="DIR", help="changes nothing: the tokenizer is in the engine"
    )


def note_tokenizer_dir(args: argparse.Namespace) -> None:
    """Notes on stderr that `--tokenizer-dir` changes nothing."""
    if args.tokenizer_dir is not None:
        given = f"--tokenizer-dir {args.tokenizer_dir}"
        print(
            f"trtc {args.command}: note: {given} changes nothing: the tokenizer is in the engine",
            file=sys.stderr,
        )


def handle_plugins(args: argparse.Namespace) -> None:
    """Notes on stderr what a plugin flag does not change. Raises ConfigError where the target cannot do what it asks."""
    for name, flag in _PLUGINS.items():
        value = getattr(args, name)
        if value in (None, "disable"):
            continue
        given = f"--{name.replace('_', '-')} {value}"
        if args.target == "tensorrt":
            _require_plugins(given, flag, args.flavour)
            continue
        print(
            f"trtc build: note: {given} changes nothing: target {args.target} has {flag.built_in}",
            file=sys.stderr,
        )


def _require_plugins(given: str, flag: _PluginFlag, flavour_name: str | None) -> None:
    from ..core.targets.tensorrt.flavour import find_flavour

    if flag.option is None:
        raise ConfigError(f"{given}: target tensorrt has no such plugin in either flavour and uses {flag.instead}; "
                          f"leave the flag out")  # fmt: skip
    flavour = find_flavour(flavour_name)
    if not flavour.plugins:
        raise ConfigError(f"{given}: {flavour} takes no custom plugins and uses {flag.instead}; leave the flag out, or "
                          f"build with --flavour tensorrt on the GPU that the engine is for")  # fmt: skip


def plugin_options(args: argparse.Namespace, dtype: str) -> dict[str, bool]:
    """Options of target tensorrt for the plugins that were asked for. dtype: the model's.

    Raises ConfigError for a plugin of another dtype: they compute in the model's.
    """
    options = {}
    for name, flag in _PLUGINS.items():
        value = getattr(args, name)
        if args.target != "tensorrt" or value in (None, "disable") or flag.option is None:
            continue
        if value not in ("auto", dtype):
            raise ConfigError(f"--{name.replace('_', '-')} {value}: the model is {dtype}, in which its plugins compute; "
                              f"give auto, or --dtype {value}")  # fmt: skip
        options[flag.option] = True
    return options


_ONE_ATTENTION = {"cpu": "it has one implementation of attention"}


def context_fmha(args: argparse.Namespace) -> str | None:
    """The value of `--context-fmha`, in whichever spelling it was given.

    Raises ConfigError for two that contradict each other, and where the target has no choice of attention kernels.
    """
    given = {} if args.context_fmha is None else {f"--context-fmha {args.context_fmha}": args.context_fmha}
    if args.enable_context_fmha:
        given["--enable-context-fmha"] = "enable"
    if args.enable_context_fmha_fp32_acc:
        given["--enable-context-fmha-fp32-acc"] = "fp32_acc"
    if args.context_fmha_fp32_acc == "enable":
        given["--context-fmha-fp32-acc enable"] = "fp32_acc"
    if given and args.target in _ONE_ATTENTION:
        reason = _ONE_ATTENTION[args.target]
        raise ConfigError(
            f"{' '.join(given)}: target {args.target} has no such choice: {reason}; leave it out, or use --target cuda "
            f"or tensorrt"
        )
    values = set(given.values())
    if values == {"enable", "fp32_acc"}:  # TensorRT-LLM's pair: fused, and with float32 sums
        return "fp32_acc"
    if len(values) > 1:
        raise ConfigError(f"{' and '.join(given)} contradict each other; give one of them")
    return values.pop() if values else None


def max_seq_len(args: argparse.Namespace) -> int | None:
    """The value of `--max-seq-len`, or the sum that stands for it in scripts for TensorRT-LLM 0.10 and before.

    Raises ConfigError for `--max-output-len` beside `--max-seq-len` or without `--max-input-len`.
    """
    given: int | None = args.max_seq_len
    if args.max_output_len is None:
        return given
    if given is not None or args.max_input_len is None:
        raise ConfigError(
            "--max-output-len goes with --max-input-len and without --max-seq-len, which is both together"
        )
    return int(args.max_input_len + args.max_output_len)


def kv_cache_dtype(args: argparse.Namespace) -> str:
    """The value of `--kv-cache-dtype`, in whichever spelling it was given."""
    return "fp8" if args.fp8_kv_cache else str(args.kv_cache_dtype)
