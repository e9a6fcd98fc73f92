"""Flags of `trtllm-build` that have no option of their own in `trtc build`.

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
    instead:  what target tensorrt has in its place: it has no custom plugins
    """

    built_in: str
    instead: str


_PLUGINS = {
    "gemm_plugin": _PluginFlag(
        "matrix products of its own, in the model's dtype", "TensorRT's own matrix products"
    ),
    "gpt_attention_plugin": _PluginFlag(
        "fused attention over the paged KV cache of its own", "TensorRT's own attention layers"
    ),
    "lookup_plugin": _PluginFlag(
        "a masked embedding lookup of its own", "gather and select, in TensorRT's own layers"
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


def handle_plugins(args: argparse.Namespace) -> None:
    """Notes on stderr what a plugin flag does not change. Raises ConfigError where the target cannot do what it asks."""
    for name, flag in _PLUGINS.items():
        value = getattr(args, name)
        if value in (None, "disable"):  # no target uses these plugins
            continue
        given = f"--{name.replace('_', '-')} {value}"
        if args.target == "tensorrt":
            raise ConfigError(
                f"{given}: target tensorrt has no such plugin and uses {flag.instead}, in the flavour tensorrt_rtx because it "
                f"takes no custom plugins, in tensorrt because none is written yet; leave the flag out"
            )
        print(
            f"trtc build: note: {given} changes nothing: target {args.target} has {flag.built_in}",
            file=sys.stderr,
        )


_ONE_ATTENTION = {
    "cpu": "it has one implementation of attention",
    "tensorrt": "TensorRT chooses the kernel itself, in both flavours",
}


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
            f"{' '.join(given)}: target {args.target} has no such choice: {reason}; leave it out, or use --target cuda"
        )
    values = set(given.values())
    if values == {"enable", "fp32_acc"}:  # TensorRT-LLM's pair: fused, and with float32 sums
        return "fp32_acc"
    if len(values) > 1:
        raise ConfigError(f"{' and '.join(given)} contradict each other; give one of them")
    return values.pop() if values else None
