"""Custom TensorRT plugins: attention over the paged KV cache, and the lookup of a vocabulary shard with positions.

Both are ahead-of-time plugins: TensorRT gets PTX, made by NVRTC from the sources that target cuda runs, and launches it
itself; no Python runs inside the engine. `kernels/tensorrt_aot` says with which grid and scalars.

No `from __future__ import annotations` here: `tensorrt.plugin` reads the annotations of what it registers as objects.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from ...core.config import BuildConfig
from ...core.errors import BuildError
from ...core.graph import Node
from ...core.targets.tensorrt.attention import CacheNames
from ...kernels.errors import KernelError
from ...kernels.launch import architecture
from ...kernels.nvrtc import compile_kernel
from ...kernels.tensorrt_aot import AotLaunch, lookup, paged_attention

ATTENTION, LOOKUP, LOOKUP_WITH_POSITIONS = (
    "trtc::paged_attention", "trtc::lookup", "trtc::lookup_with_positions",
)  # fmt: skip
_DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}
Lowering = Callable[[Any, Node, Sequence[Any]], Sequence[Any]]


def lowerings(build: BuildConfig) -> dict[str, Lowering]:
    """Op -> `(network, node, inputs) -> outputs`, see `trtc_tensorrt_plugins`."""
    float16_sums = build.target_options.get("context_fmha") == "enable"
    accumulation = "float16" if float16_sums else "float32"
    return {
        "attention": functools.partial(_add_attention, build.page_size, accumulation),
        "embedding": _add_lookup,
    }


def _add_attention(
    page_size: int, accumulation: str, network: Any, node: Node, inputs: Sequence[Any]
) -> Sequence[Any]:
    """The plugin layer, and the network's inputs and outputs for the pages of this layer's cache."""
    q, k, v, query_start, kv_length, page_table = inputs
    _, num_kv_heads, head_dim = k.shape
    names, shape = CacheNames.of_layer(node.attrs["layer"]), (-1, num_kv_heads, page_size, head_dim)
    caches = [network.add_input(name, k.dtype, shape) for name in (names.key, names.value)]
    _check(node, q, num_kv_heads=num_kv_heads, page_size=page_size, accumulation=accumulation)
    layer = network.add_plugin(
        define().paged_attention(
            q, k, v, *caches, query_start, kv_length, page_table,
            scale=float(node.attrs["scale"]), accumulation=accumulation, arch=_arch(),
        ),
        aot=True,
    )  # fmt: skip
    layer.name = node.name
    for output, name in enumerate((names.updated_key, names.updated_value), start=1):
        layer.get_output(output).name = name
        network.mark_output(layer.get_output(output))
    return [layer.get_output(0)]


def _check(node: Node, q: Any, **model: Any) -> None:
    """Refuses what the kernel does not serve, with the node's name, before TensorRT asks for it."""
    _, num_heads, head_dim = q.shape
    try:
        paged_attention(dtype=_DTYPES.get(q.dtype.name, q.dtype.name), head_dim=head_dim, num_heads=num_heads, scale=1.0,
                        num_tokens=1, num_seqs=1, pages_per_seq=1, **model)  # fmt: skip
    except KernelError as error:
        raise BuildError(f"node '{node.name}': {error}") from None


def _add_lookup(network: Any, node: Node, inputs: Sequence[Any]) -> Sequence[Any]:
    ids, table, *rest = inputs
    op, attrs = define(), {"offset": int(node.attrs["offset"])}
    if rest:
        attrs["position_offset"] = int(node.attrs["position_offset"])
        made = op.lookup_with_positions(ids, table, *rest, **attrs, arch=_arch())
    else:
        made = op.lookup(ids, table, **attrs, arch=_arch())
    layer = network.add_plugin(made, aot=True)
    layer.name = node.name
    return [layer.get_output(0)]


def _arch() -> str:
    """PTX for the GPU that the plan is built on, and for: this flavour builds nowhere else."""
    return architecture().replace("sm_", "compute_")


@functools.cache
def define() -> Any:
    """Registers the plugins with TensorRT, once a process; their namespace in `tensorrt.plugin.op`."""
    import tensorrt.plugin as trtp

    Answer = tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymExprs]

    def told(launch: AotLaunch, arch: str) -> Answer:
        """What TensorRT wants to know of a launch."""
        code = compile_kernel(launch.source, arch=arch)
        params = trtp.KernelLaunchParams(*launch.grid, block_x=launch.block, shared_mem=launch.shared_bytes)
        scalars = trtp.SymIntExprs(len(launch.scalars))
        for i, scalar in enumerate(launch.scalars):
            scalars[i] = trtp.SymInt32(scalar)
        return code.entries[launch.entry], code.ptx.rstrip(b"\0"), params, scalars

    def dtype(desc: trtp.TensorDesc) -> str:
        return _DTYPES[desc.dtype.name]

    def size(desc: trtp.TensorDesc, axis: int) -> int:
        return int(desc.shape_expr[axis].constant_value())

    @trtp.register(ATTENTION)  # type: ignore[untyped-decorator, unused-ignore]
    def describe_attention(
        q: trtp.TensorDesc, k: trtp.TensorDesc, v: trtp.TensorDesc, k_cache: trtp.TensorDesc, v_cache: trtp.TensorDesc,
        query_start: trtp.TensorDesc, kv_length: trtp.TensorDesc, page_table: trtp.TensorDesc,
        scale: float, accumulation: str, arch: str,
    ) -> tuple[trtp.TensorDesc, trtp.TensorDesc, trtp.TensorDesc]:  # fmt: skip
        return q.like(), k_cache.aliased(), v_cache.aliased()

    @trtp.aot_impl(ATTENTION)  # type: ignore[untyped-decorator, unused-ignore]
    def implement_attention(
        q: trtp.TensorDesc, k: trtp.TensorDesc, v: trtp.TensorDesc, k_cache: trtp.TensorDesc, v_cache: trtp.TensorDesc,
        query_start: trtp.TensorDesc, kv_length: trtp.TensorDesc, page_table: trtp.TensorDesc,
        scale: float, accumulation: str, arch: str,
        outputs: tuple[trtp.TensorDesc, trtp.TensorDesc, trtp.TensorDesc], tactic: int,
    ) -> Answer:  # fmt: skip
        launch = paged_attention(
            dtype=dtype(q), head_dim=size(q, 2), num_heads=size(q, 1), num_kv_heads=size(k, 1),
            page_size=size(k_cache, 2), scale=scale, accumulation=accumulation, num_tokens=q.shape_expr[0],
            num_seqs=kv_length.shape_expr[0], pages_per_seq=page_table.shape_expr[1],
        )  # fmt: skip
        return told(launch, arch)

    @trtp.register(LOOKUP)  # type: ignore[untyped-decorator, unused-ignore]
    def describe_lookup(
        ids: trtp.TensorDesc, table: trtp.TensorDesc, offset: int, arch: str
    ) -> trtp.TensorDesc:
        return trtp.from_shape_expr((ids.shape_expr[0], table.shape_expr[1]), table.dtype)

    @trtp.aot_impl(LOOKUP)  # type: ignore[untyped-decorator, unused-ignore]
    def implement_lookup(
        ids: trtp.TensorDesc, table: trtp.TensorDesc, offset: int, arch: str,
        outputs: tuple[trtp.TensorDesc], tactic: int,
    ) -> Answer:  # fmt: skip
        launch = lookup(dtype=dtype(table), columns=size(table, 1), table_rows=size(table, 0), offset=offset,
                        num_tokens=ids.shape_expr[0])  # fmt: skip
        return told(launch, arch)

    @trtp.register(LOOKUP_WITH_POSITIONS)  # type: ignore[untyped-decorator, unused-ignore]
    def describe_lookup_with_positions(
        ids: trtp.TensorDesc, table: trtp.TensorDesc, position_ids: trtp.TensorDesc, positions: trtp.TensorDesc,
        offset: int, position_offset: int, arch: str,
    ) -> trtp.TensorDesc:  # fmt: skip
        return trtp.from_shape_expr((ids.shape_expr[0], table.shape_expr[1]), table.dtype)

    @trtp.aot_impl(LOOKUP_WITH_POSITIONS)  # type: ignore[untyped-decorator, unused-ignore]
    def implement_lookup_with_positions(
        ids: trtp.TensorDesc, table: trtp.TensorDesc, position_ids: trtp.TensorDesc, positions: trtp.TensorDesc,
        offset: int, position_offset: int, arch: str, outputs: tuple[trtp.TensorDesc], tactic: int,
    ) -> Answer:  # fmt: skip
        launch = lookup(
            dtype=dtype(table), columns=size(table, 1), table_rows=size(table, 0), offset=offset,
            num_tokens=ids.shape_expr[0], position_rows=size(positions, 0), position_offset=position_offset,
        )  # fmt: skip
        return told(launch, arch)

    return trtp.op.trtc
