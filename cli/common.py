"""Options and helpers that several commands share."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.config import ModelConfig
from ..core.dtypes import MODEL_DTYPES, parse_model_dtype
from ..core.sharding import ShardingOptions

if TYPE_CHECKING:
    from ..core.checkpoint import Progress
    from ..core.hf import HFCheckpoint
    from ..core.plugin_registry import Family


def add_model_source(parser: argparse.ArgumentParser) -> None:
    """How a Hugging Face checkpoint becomes weights: what `convert` and `build --model-dir` have in common."""
    parser.add_argument(
        "--model", metavar="FAMILY", help="model family, e.g. opt (default: found from config.json)"
    )
    dtypes = ", ".join(MODEL_DTYPES)
    parser.add_argument(
        "--dtype", default="auto", help=f"{dtypes}, or auto: as config.json says (default: auto)"
    )
    parser.add_argument("--tp-size", type=int, default=ShardingOptions.tp_size, metavar="N",
                        help="ranks of tensor parallelism, that share each layer (default: %(default)s)")  # fmt: skip
    parser.add_argument("--pp-size", type=int, default=ShardingOptions.pp_size, metavar="M",
                        help="stages of a pipeline; N x M ranks run an engine (default: %(default)s)")  # fmt: skip
    parser.add_argument(
        "--use-parallel-embedding", action="store_true", help="split the token embedding over the ranks"
    )
    parser.add_argument("--embedding-sharding-dim", type=int, choices=(0, 1), metavar="{0,1}",
                        default=ShardingOptions.embedding_sharding_dim,
                        help="0: split by vocabulary, 1: by hidden size (default: %(default)s)")  # fmt: skip


def add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, default=1, metavar="N",
                        help="threads that read, convert and write, ranks built at once (default: %(default)s)")  # fmt: skip


def add_kv_cache_memory(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--kv-cache-memory-bytes", type=int, metavar="N",
                        help="memory of the KV cache (default: enough for the engine's limits)")  # fmt: skip


def add_kv_cache(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("KV cache")
    add_kv_cache_memory(group)
    group.add_argument("--enable-prefix-cache", action=argparse.BooleanOptionalAction, default=True,
                       help="start prompts behind what earlier ones with the same beginning left (default: on)")  # fmt: skip


def sharding_options(args: argparse.Namespace) -> ShardingOptions:
    return ShardingOptions(
        args.tp_size, args.use_parallel_embedding, args.embedding_sharding_dim, args.pp_size
    )


def find_family(
    args: argparse.Namespace, hf_config: dict[str, object], where: Path
) -> tuple[Family, ModelConfig]:
    """The family that `--model` names or config.json belongs to, and the model's configuration with `--dtype`."""
    from ..core.plugin_registry import plugins

    registry = plugins()
    family = (
        registry.family(args.model)
        if args.model
        else registry.family_of(hf_config, str(where / "config.json"))
    )
    model = family.config(hf_config)
    if args.dtype != "auto":
        model = dataclasses.replace(model, dtype=parse_model_dtype(args.dtype, "--dtype"))
    return family, model


@contextmanager
def progress_bar(what: str) -> Iterator[Progress]:
    """Shows how far a conversion or build is, on stderr; silent where stderr is not a terminal."""
    from tqdm import tqdm

    with tqdm(desc=what, unit="weight", disable=None, leave=False) as bar:

        def show(done: int, total: int, name: str) -> None:
            bar.total = total
            bar.update(done - bar.n)
            bar.set_postfix_str(name, refresh=False)

        yield show


def check_tokenizer(folder: Path) -> None:
    """Raises EngineError for tokenizer files that an engine could not be run with: before weights are read, not after."""
    from ..runtime.tokenizer import Tokenizer

    Tokenizer.from_dir(folder)


def human_bytes(count: float) -> str:
    """`1536` -> `1.5 KiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def folder_bytes(path: Path) -> int:
    return sum(entry.stat().st_size for entry in path.iterdir() if entry.is_file())


def open_checkpoint(path: Path) -> HFCheckpoint:
    """The checkpoint in `path`; its packed weights can be read as floats where it is quantized already."""
    from ..core.hf import HFCheckpoint
    from ..core.quantize.hub import HubScheme, PackedCheckpoint

    checkpoint = HFCheckpoint.open(path)
    scheme = HubScheme.read(checkpoint.config, str(path / "config.json"))
    return checkpoint if scheme is None else PackedCheckpoint(checkpoint, scheme)
