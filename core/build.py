"""Checkpoint -> engine: compose, run the passes, evaluate weights, let the target compile, write the directory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from .atomic import atomic_directory
from .checkpoint import HFWeights, Progress, WeightSource
from .config import KV_CACHE_DTYPES, BuildConfig, ModelConfig
from .dtypes import MODEL_DTYPES
from .engine import FILE_BYTES, RankPart, describe, map_files
from .engine_files import DESCRIPTION, is_engine, write_description
from .errors import BuildError, CheckpointError, ConfigError
from .graph import Graph
from .hf import HFCheckpoint
from .interpreter import interpret
from .passes import Partition, optimize
from .passes.fuse import is_constant
from .plugin_registry import Family, plugins
from .safetensors_io import SafetensorsWriter
from .sharding import ShardingOptions
from .spec import TensorSpec
from .targets.base import Target, get_target
from .text_files import copy_text_files, with_generation_config

Trace = Callable[[str, Graph], None]


def plan(
    family: Family,
    model: ModelConfig,
    source: WeightSource,
    build: BuildConfig,
    rank: int,
    trace: Trace | None = None,
) -> Partition:
    """What `rank` will run, and how its weights are made. `trace` is told the graph after composition and each pass.

    Raises ConfigError when target and model or options do not fit, GraphError when a pass or the family breaks a rule,
    BuildError for a graph that the target does not run, CheckpointError for weights of other shapes or types.
    """
    target = get_target(build.target)
    can = target.capabilities(build)
    if model.dtype not in can.dtypes:
        raise ConfigError(
            f"target {target.name} does not compute in {model.dtype}; accepted: {', '.join(can.dtypes)}"
        )
    if build.tp_size > 1 and not can.tensor_parallel:
        raise ConfigError(f"target {target.name} does not run tensor parallel yet; build with tp_size 1")
    if build.pp_size > 1 and not can.pipeline_parallel:
        raise ConfigError(f"target {target.name} does not run pipeline parallel yet; build with pp_size 1")
    assert (build.tp_size, build.pp_size) == (source.sharding.tp_size, source.sharding.pp_size), "other ranks"
    source.sharding.check_layers(model.num_layers)
    if source.quantization is not None and source.quantization.kind not in can.quantized:
        raise ConfigError(
            f"target {target.name} does not run {source.quantization.kind} weights yet; "
            f"accepted: {', '.join(['float', *sorted(can.quantized)])}"
        )
    if build.kv_cache_dtype not in can.kv_cache_dtypes:
        raise ConfigError(
            f"target {target.name} has no KV cache of {build.kv_cache_dtype} numbers; "
            f"accepted: {', '.join(sorted(can.kv_cache_dtypes))}"
        )
    graph = family.compose(model)
    if trace is not None:
        trace("compose", graph)
    _require_ops(graph, can.ops, target.name)
    _require_one_cache(graph)
    planned = optimize(
        graph,
        sharding=source.sharding,
        rank=rank,
        aliases=source.aliases,
        fusions=can.fusions,
        ops=can.ops,
        quantization=source.quantization,
        cache_dtype=KV_CACHE_DTYPES[build.kv_cache_dtype],
        trace=trace,
    )
    target.check(planned.graph, build)
    _check_weights(planned, source, source.sharding.place(rank)[1])
    return planned


def _check_weights(planned: Partition, source: WeightSource, member: int) -> None:
    """Raises CheckpointError, naming them all, for weights that are not what the plan reads."""
    nodes = [node for node in planned.graph.weights if node.name not in planned.recipes]
    nodes += [node for recipe in planned.recipes.values() for node in recipe.weights]
    wanted = {node.name: node.outputs[0] for node in nodes}
    found = {name: TensorSpec(source.dtype(member, name), source.shape(member, name)) for name in wanted}
    wrong = [
        f"{name} is {found[name]}, not {spec}" for name, spec in sorted(wanted.items()) if found[name] != spec
    ]
    if wrong:
        raise CheckpointError(f"weights do not fit the model's configuration: {'; '.join(wrong)}")


def _require_ops(graph: Graph, ops: frozenset[str], target: str) -> None:
    """Raises BuildError for an op that the target does not run: one of a plugin's, as families compose no other. What is made
    of weights alone, the build evaluates."""
    known = ops | {"input"}
    for node in graph.nodes:
        if node.op not in known and not is_constant(graph, node.tensors[0]):
            raise BuildError(
                f"target {target} does not run {node.op} '{node.name}'; the op's plugin brings it there with "
                f"the hook trtc_tensorrt_plugins"
            )


def _require_one_cache(graph: Graph) -> None:
    """Raises BuildError unless all attention layers have keys of one type: the KV cache has one shape."""
    keys = {graph.specs[node.used[1]]: node.name for node in graph.nodes if node.op == "attention"}
    if len(keys) != 1:
        found = ", ".join(f"'{name}' has {spec}" for spec, name in keys.items()) or "there is no attention"
        raise BuildError(
            f"every attention layer needs keys of the same type, [T, kv_heads, head_dim]: {found}"
        )


def build_engine(
    family: Family,
    model: ModelConfig,
    source: WeightSource,
    build: BuildConfig,
    output_dir: Path,
    *,
    text_files: Path | None = None,
    workers: int = 1,
    progress: Progress | None = None,
) -> None:
    """Writes the engine of `source` to the folder `output_dir`, which appears complete or not at all.

    text_files: folder with tokenizer files to take along, and with a generation_config.json whose end-of-sequence ids the
        engine stops at.
    workers: threads that make weights, and ranks that the target compiles side by side; memory grows by about one weight
        for each, and where a target puts weights into what it compiles, by the weights of a rank.
    progress: called from this thread after every weight.
    Raises TrtcError (ConfigError, BuildError, CheckpointError, GraphError) naming what does not fit.
    """
    if workers < 1:
        raise ConfigError(f"workers is {workers}; accepted: a whole number >= 1")
    build.check_model(model)
    if text_files is not None:
        model = with_generation_config(model, text_files)
    target = get_target(build.target)
    plans = [plan(family, model, source, build, rank) for rank in range(build.num_ranks)]
    with atomic_directory(output_dir, is_engine, seal=DESCRIPTION) as folder:
        if text_files is not None:  # first: files that cannot be read cost no time
            copy_text_files(text_files, folder)
        parts = [
            part
            for first in range(0, len(plans), workers)
            for part in _build_ranks(target, plans, first, source, build, folder, workers, progress)
        ]
        write_description(folder, describe(folder, model, build, parts, workers))


def build_folder(model_dir: Path, output_dir: Path, **options: Any) -> None:
    """Writes the engine of a Hugging Face folder, as `trtc build --model-dir ... --output-dir ...` does, in the dtype of its
    config.json. options: those of `BuildConfig.for_model`. Raises TrtcError as `build_engine`, and for a folder that is none.
    """
    with HFCheckpoint.open(model_dir) as source:
        family = plugins().family_of(source.config, str(model_dir / "config.json"))
        model = family.config(source.config)
        build = BuildConfig.for_model(model, **options)
        sharding = ShardingOptions(tp_size=build.tp_size, pp_size=build.pp_size)
        weights = HFWeights(source, family.weight_table(model), model, dtype=model.dtype, sharding=sharding)
        build_engine(family, model, weights, build, output_dir, text_files=model_dir)


def _build_ranks(
    target: Target,
    plans: Sequence[Partition],
    first: int,
    source: WeightSource,
    build: BuildConfig,
    folder: Path,
    workers: int,
    progress: Progress | None,
) -> list[RankPart]:
    """The next `workers` ranks from `first` on: their weights one after the other, then the target for all at once."""
    ranks = range(first, min(first + workers, len(plans)))
    with ExitStack() as stack:
        homes = []
        for rank in ranks:
            home = folder
            if target.embeds_weights:  # the files are needed only until the target has read them
                home = Path(stack.enter_context(TemporaryDirectory(prefix="weights-", dir=folder)))
            homes.append((home, _write_rank(plans[rank], source, home, rank, workers, progress)))

        def compiled(rank: int) -> RankPart:
            home, files = homes[rank - first]
            graph, weights = plans[rank].graph, map_files(home / name for name in files)
            artifacts = target.compile(graph, build, folder, rank, weights)
            return RankPart(graph, () if target.embeds_weights else files, artifacts)

        with ThreadPoolExecutor(len(ranks)) as pool:
            return list(pool.map(compiled, ranks))


def _write_rank(
    planned: Partition,
    source: WeightSource,
    home: Path,
    rank: int,
    workers: int,
    progress: Progress | None,
) -> tuple[str, ...]:
    """Writes the weights of a rank; the names of their files."""
    specs = {node.name: node.outputs[0] for node in planned.graph.weights}
    files = {f"rank{rank}-{n}.safetensors": names for n, names in enumerate(_file_contents(specs))}
    with ExitStack() as writing:
        writers: dict[str, SafetensorsWriter] = {}
        for name, tensors in files.items():
            layout = {tensor: (specs[tensor].dtype, _sizes(specs[tensor])) for tensor in tensors}
            writers |= dict.fromkeys(tensors, writing.enter_context(SafetensorsWriter(home / name, layout)))
        _write_weights(planned, source, writers, rank, workers, progress)
    return tuple(files)


def _write_weights(
    planned: Partition,
    source: WeightSource,
    writers: Mapping[str, SafetensorsWriter],
    rank: int,
    workers: int,
    progress: Progress | None,
) -> None:
    _, member = source.sharding.place(rank)

    def write(names: Sequence[str]) -> None:
        for name, made in _make_weights(planned, source, member, names):
            writers[name].write(name, made.contiguous())

    with ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(write, names): names for names in _made_together(planned, writers)}
        try:
            done = 0
            for future in as_completed(futures):
                future.result()
                for name in futures[future]:
                    done += 1
                    if progress is not None:
                        progress(done, len(writers), f"rank {rank}: {name}")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _made_together(planned: Partition, names: Iterable[str]) -> list[list[str]]:
    """Stored weights by the matrices that they are made of, which are read once: a norm goes into weight and bias."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        recipe = planned.recipes.get(name)
        parts = () if recipe is None else (node for node in recipe.weights if node.outputs[0].rank > 1)
        groups.setdefault(tuple(node.name for node in parts) or (name,), []).append(name)
    return list(groups.values())


def _make_weights(
    planned: Partition, source: WeightSource, rank: int, names: Sequence[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Stored weights: read, or computed by their recipes from weights that are read."""
    found: dict[str, torch.Tensor] = {}
    for name in names:
        recipe = planned.recipes.get(name)
        if recipe is None:
            yield name, source.read(rank, name)
            continue
        for node in recipe.weights:
            if node.name not in found:
                found[node.name] = source.read(rank, node.name)
        made: torch.Tensor = interpret(recipe, {node.name: found[node.name] for node in recipe.weights})
        if recipe.specs[name].dtype in MODEL_DTYPES and not _is_finite(made):
            raise BuildError(f"weight {name!r} is not finite once it is computed in {recipe.specs[name].dtype}; "
                             f"convert with --dtype float32 or bfloat16")  # fmt: skip
        yield name, made


_EXPONENT = {torch.float16: 0x7C00, torch.bfloat16: 0x7F80}


def _is_finite(x: torch.Tensor) -> bool:
    """Whether all of a tensor is. torch asks that of 16-bit types one by one."""
    mask = _EXPONENT.get(x.dtype)
    if mask is None or not x.numel():
        return bool(torch.isfinite(x).all())
    return int(x.contiguous().view(torch.int16).bitwise_and(mask).max()) < mask


def _file_contents(specs: Mapping[str, TensorSpec]) -> Iterator[list[str]]:
    """Groups of weight names, each of about FILE_BYTES."""
    group: list[str] = []
    size = 0
    for name, spec in specs.items():
        if group and size + spec.nbytes() > FILE_BYTES:
            yield group
            group, size = [], 0
        group.append(name)
        size += spec.nbytes()
    if group:
        yield group


def _sizes(spec: TensorSpec) -> tuple[int, ...]:
    assert all(isinstance(d, int) for d in spec.shape), f"weight of a size known only at run time: {spec}"
    return tuple(d for d in spec.shape if isinstance(d, int))
