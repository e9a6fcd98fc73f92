"""`trtc serve`: an engine behind OpenAI's HTTP interface."""

from __future__ import annotations

import argparse
import os
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.errors import TargetError
from ..runtime.server.config import ServerConfig
from .common import add_kv_cache
from .ranks import add_nproc, enter_job
from .summarize import add_prompt_lookup

if TYPE_CHECKING:
    from ..runtime.load_core import EngineOptions

NAME = "serve"
HELP = "serve an engine over HTTP, with OpenAI's interface"

_KEY_VARIABLE = "TRTC_API_KEY"
_PACKAGES = ("fastapi", "uvicorn", "prometheus_client", "jinja2")
_LAST_WORDS_S = 10
"""What a server may need after its drain timeout: errors reach its clients, and the ranks end."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--engine-dir", type=Path, required=True, help="folder written by `trtc build`")
    parser.add_argument(
        "--host", default=ServerConfig.host, help="address to listen on (default: %(default)s)"
    )
    parser.add_argument(
        "--port", type=int, default=ServerConfig.port, help="0: a free one (default: %(default)s)"
    )
    parser.add_argument("--api-key", metavar="KEY",
                        help="what clients must send; required unless --host is this machine alone (default: the "
                        f"environment variable {_KEY_VARIABLE}, which other users of this machine cannot see)")  # fmt: skip
    parser.add_argument(
        "--served-model-name", metavar="NAME", help="what clients call it (default: the name of --engine-dir)"
    )
    parser.add_argument("--drain-timeout-s", type=int, default=ServerConfig.drain_timeout_s, metavar="N",
                        help="seconds that requests may take to finish after SIGTERM (default: %(default)s)")  # fmt: skip
    limits = parser.add_argument_group("limits; what is beyond them is refused, with the limit")
    for name, help_text in (
        ("max-queue", "sequences that may wait beyond the engine's max_batch_size; then 429"),
        ("max-body-bytes", "bytes of one request"),
        ("max-prompts", "prompts in one request"),
        ("max-n", "completions per prompt"),
        ("max-logprobs", "candidates per position"),
    ):
        default = getattr(ServerConfig, name.replace("-", "_"))
        limits.add_argument(f"--{name}", type=int, default=default, metavar="N",
                            help=f"{help_text} (default: %(default)s)")  # fmt: skip
    add_nproc(parser)
    add_kv_cache(parser)
    add_prompt_lookup(parser)


def main(args: argparse.Namespace) -> int:
    from ..runtime.placement import placement
    from ..runtime.prompt_lookup import PromptLookup
    from ..runtime.worker import Worker

    lookup = None if args.prompt_lookup is None else PromptLookup.parse(args.prompt_lookup)
    config = ServerConfig(
        model_name=args.served_model_name or os.path.basename(os.path.realpath(args.engine_dir)),
        host=args.host,
        port=args.port,
        api_key=args.api_key if args.api_key is not None else os.environ.get(_KEY_VARIABLE),
        max_queue=args.max_queue,
        max_body_bytes=args.max_body_bytes,
        max_prompts=args.max_prompts,
        max_n=args.max_n,
        max_logprobs=args.max_logprobs,
        drain_timeout_s=args.drain_timeout_s,
    )
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise TargetError(f"serving needs the package {missing[0]}: pip install 'trtc[serve]'")
    cache_bytes = args.kv_cache_memory_bytes
    drain_s = config.drain_timeout_s + _LAST_WORDS_S
    code = enter_job(args, drain_s=drain_s, kv_cache_memory_bytes=cache_bytes)
    if code is not None:
        return code
    options: EngineOptions = {
        "kv_cache_memory_bytes": cache_bytes,
        "enable_prefix_cache": args.enable_prefix_cache,
        "prompt_lookup": lookup,
    }
    with ExitStack() as stack:
        worker = None
        if placement().size == 1:  # a rank is the process that its job has started
            worker = stack.enter_context(Worker(args.engine_dir, **options))
        from ..runtime.server.serve import serve

        serve(args.engine_dir, config, worker=worker, **options)
    return 0
