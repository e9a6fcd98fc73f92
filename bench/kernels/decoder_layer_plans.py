"""Plans of the kernels of a decoder layer: those chosen, and others worth a try. Plain arithmetic: no GPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from ...kernels.linear import MAX_STREAM_ROWS, Plan, choose_plan
from ...kernels.linear.multicast_plan import MulticastPlan, columns_per_block, even_width, plan_multicast
from ...kernels.linear.plan import (
    BLOCK_BYTES,
    RESERVED_BYTES,
    WARPGROUP_CAPABILITY,
    StreamPlan,
    TilePlan,
    WarpgroupPlan,
    ceil_div,
    plan_stream,
    plan_tile,
    plan_warpgroup,
    stage_bytes,
)
from ...kernels.nvrtc import KernelSource
from ...kernels.paged_decode_attention.plan import MAX_CLUSTER, SOURCE, DecodePlan
from ...kernels.paged_decode_attention.plan import choose_plan as choose_attention
from ..opt_sizes import SIZES as OPT_SIZES

SIZES = {name.upper(): size for name, size in OPT_SIZES.items() if size.get("do_layer_norm_before", True)}
"""Models whose norms come first, by name."""

KIB = 1024
ITEM_BYTES = 2
"""Of float16."""

MOST_STAGES = 24
"""Of a stream kernel's ring: more than `choose_plan` gives one, so that a search can show whether that is too few."""


@dataclass(frozen=True)
class Gpu:
    """What plans depend on; the numbers are those of an H100 or H200. shared_limit: bytes a block can have."""

    capability: int = 90
    multiprocessors: int = 132
    shared_limit: int = 227 * KIB


@dataclass(frozen=True)
class Product:
    """A linear layer. norm: a layer norm in front of it. residual: what it is added to is what it is written to."""

    features: int
    columns: int
    norm: bool = False
    residual: bool = False
    activation: str = "none"


@dataclass(frozen=True)
class Layer:
    """A decoder layer at a decode step of `rows` sequences of `tokens` tokens each, the new one included."""

    size: str
    rows: int
    tokens: int

    @property
    def hidden(self) -> int:
        return int(SIZES[self.size]["hidden_size"])

    @property
    def heads(self) -> int:
        return int(SIZES[self.size]["num_attention_heads"])

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def case(self) -> str:
        return f"layer {self.size} rows {self.rows} x {self.tokens}"

    @property
    def fuses_norms(self) -> bool:
        """Whether products norm their input; of more rows a kernel of its own does."""
        return self.rows <= MAX_STREAM_ROWS

    @property
    def products(self) -> Mapping[str, Product]:
        """By the names of `LayerPlans`, in order."""
        hidden = self.hidden
        return {
            "qkv": Product(3 * hidden, hidden, norm=True),
            "out": Product(hidden, hidden, residual=True),
            "fc1": Product(4 * hidden, hidden, norm=True, activation="relu"),
            "fc2": Product(hidden, 4 * hidden, residual=True),
        }

    @property
    def weight_bytes(self) -> int:
        """Of weights and biases."""
        return ITEM_BYTES * sum(one.features * (one.columns + 1) for one in self.products.values())

    @property
    def cache_bytes(self) -> int:
        """Of keys and values."""
        return 2 * ITEM_BYTES * self.rows * self.tokens * self.hidden

    @property
    def moved_bytes(self) -> int:
        """What comes from device memory; what a kernel leaves for the next one stays in L2."""
        return self.weight_bytes + self.cache_bytes


@dataclass(frozen=True)
class LayerPlans:
    """A plan for each kernel of a layer but the norms, in the order of launches."""

    qkv: Plan
    attention: DecodePlan
    out: Plan
    fc1: Plan
    fc2: Plan

    def __getitem__(self, name: str) -> Plan | DecodePlan:
        plan: Plan | DecodePlan = getattr(self, name)
        return plan

    def changed(self, name: str, plan: Plan | DecodePlan) -> LayerPlans:
        """These, with another plan for one kernel."""
        change: dict[str, Any] = {name: plan}
        return replace(self, **change)

    def sources(self) -> Iterator[KernelSource]:
        """Each kernel by itself, as `KernelLibrary` asks for it."""
        for name in NAMES:
            plan = self[name]
            path = SOURCE if isinstance(plan, DecodePlan) else plan.source.path
            yield KernelSource(path, (plan.entry("__half"),))


NAMES = tuple(field.name for field in fields(LayerPlans))


def choose_plans(layer: Layer, gpu: Gpu) -> LayerPlans:
    """What a decode step launches. Attention is planned for sequences of up to the next power of two of tokens."""
    products = {
        name: choose_plan(
            layer.rows, one.features, one.columns, norm="layer" if one.norm and layer.fuses_norms else "none",
            capability=gpu.capability, multiprocessors=gpu.multiprocessors,
        )
        for name, one in layer.products.items()
    }  # fmt: skip
    attention = choose_attention(
        layer.rows, layer.heads, layer.heads, layer.head_dim, 1 << (layer.tokens - 1).bit_length(),
        capability=gpu.capability, multiprocessors=gpu.multiprocessors, shared_limit=gpu.shared_limit,
    )  # fmt: skip
    return LayerPlans(attention=attention, **products)


MOVES: Mapping[type, tuple[tuple[str, ...], ...]] = {
    StreamPlan: (("ring_kib", "alone"), ("blocks", "warps", "alone"), ("held",)),
    MulticastPlan: (("width", "split"), ("copies", "row_stages")),
    WarpgroupPlan: (("blocks", "cluster", "feature_tiles"), ("ring_kib",)),
    TilePlan: (("blocks", "cluster", "warps_down"), ("feature_tiles", "stages")),
    DecodePlan: (("warps", "stages"), ("splits",)),
}
"""What a search changes at a time: choices that depend on each other together."""

BLOCK_QUARTERS = (2, 3, 4, 6, 8)
"""Grids to try, in quarters of the multiprocessors."""


def candidates(plan: Plan | DecodePlan, move: Sequence[str], gpu: Gpu) -> list[Any]:
    """`plan` with all other values of the choices that `move` names, without plans that do not fit, of the type of `plan`."""
    choices, values = _choices(plan), _values(plan, gpu)
    make: Any = MAKERS[type(plan)]
    combinations = itertools.product(*(values[name] for name in move))
    varied = ({**choices, **dict(zip(move, combination, strict=True))} for combination in combinations)
    return _others_than(plan, (make(plan, gpu, **one) for one in varied))


def by_other_kernels(plan: Plan | DecodePlan, gpu: Gpu) -> list[Any]:
    """What `plan` does, by each other kernel that can: none where it norms, stream.cu for few rows, wgmma on Hopper."""
    if isinstance(plan, DecodePlan) or getattr(plan, "norm", "none") != "none":
        return []
    made: list[Plan | None] = []
    for blocks in (gpu.multiprocessors * quarters // 4 for quarters in BLOCK_QUARTERS):
        if plan.rows <= MAX_STREAM_ROWS:
            for warps, alone in itertools.product((8, 16), (True, False)):
                made.append(
                    stream(plan, gpu, blocks=blocks, warps=warps, ring_kib=144, held=False, alone=alone)
                )
        for parts in (1, 2, 4, 8):
            for down in (4, 8):
                made.append(
                    tile(plan, gpu, blocks=blocks, cluster=parts, warps_down=down, feature_tiles=2, stages=4)
                )
            if gpu.capability == WARPGROUP_CAPABILITY:
                for tiles in (1, 2, 4):
                    made.append(
                        warpgroup(plan, gpu, blocks=blocks, cluster=parts, feature_tiles=tiles, ring_kib=108)
                    )
                width = even_width(plan.features, blocks // parts)
                made.append(multicast(plan, gpu, width=width, split=parts, copies=1, row_stages=6))
    return [one for one in _others_than(plan, made) if type(one) is not type(plan)]


def _others_than(plan: Plan | DecodePlan, made: Iterable[Plan | DecodePlan | None]) -> list[Any]:
    return [one for one in dict.fromkeys(made) if one is not None and one != plan]


def _choices(plan: Plan | DecodePlan) -> dict[str, Any]:
    """What a plan was made with, by the names of its maker."""
    if isinstance(plan, StreamPlan):
        return {
            "blocks": plan.blocks, "warps": plan.warps, "ring_kib": weight_ring_bytes(plan) // KIB,
            "held": plan.held_x, "alone": plan.least_bytes > 0,
        }  # fmt: skip
    if isinstance(plan, MulticastPlan):
        return {
            "width": plan.features_per_block, "split": plan.split, "copies": plan.copies,
            "row_stages": plan.row_stages,
        }  # fmt: skip
    if isinstance(plan, DecodePlan):
        return {"warps": plan.warps, "stages": plan.stages, "splits": plan.splits}
    (blocks,) = plan.launch_shape(dependent=True).grid
    grid = {"blocks": blocks, "cluster": plan.cluster, "feature_tiles": plan.feature_tiles}
    if isinstance(plan, WarpgroupPlan):
        return {**grid, "ring_kib": ceil_div(plan.shared_bytes, KIB)}
    return {**grid, "warps_down": plan.warps_down, "stages": plan.stages}


def _values(plan: Plan | DecodePlan, gpu: Gpu) -> Mapping[str, Sequence[Any]]:
    """What each choice may be. Grids are of whole and half waves, and, of stream.cu, of blocks of whole tiles of features."""
    blocks = {gpu.multiprocessors * quarters // 4 for quarters in BLOCK_QUARTERS}
    if isinstance(plan, StreamPlan):
        blocks |= {ceil_div(plan.features, width) for width in (8, 12, 16, 20, 24, 32, 40)}
        least, most = gpu.multiprocessors // 4, 2 * gpu.multiprocessors
        blocks = {one for one in blocks if least <= one <= most}
    return {**VALUES[type(plan)], "blocks": sorted(blocks)}


VALUES: Mapping[type, Mapping[str, Sequence[Any]]] = {
    StreamPlan: {
        "warps": (4, 6, 8, 10, 12, 16),
        "ring_kib": (24, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192),
        "held": (True, False),
        "alone": (True, False),
    },
    MulticastPlan: {
        "width": (*range(16, 129, 8), *range(144, 193, 16)),
        "split": (1, 2, 4, 8),
        "copies": (1, 2, 4, 8),
        "row_stages": (4, 6, 8),
    },
    WarpgroupPlan: {
        "cluster": (1, 2, 3, 4, 6, 8),
        "feature_tiles": (1, 2, 4),
        "ring_kib": (64, 80, 96, 108, 144, 180, 220),
    },
    TilePlan: {
        "cluster": (1, 2, 4, 8),
        "warps_down": (4, 8),
        "feature_tiles": (1, 2),
        "stages": (3, 4, 5, 6),
    },
    DecodePlan: {
        "warps": (2, 4, 8),
        "stages": (2, 3, 4, 6, 8),
        "splits": (1, 2, 3, 4, 5, 6, 8, 12, 16),
    },
}


def weight_ring_bytes(plan: StreamPlan) -> int:
    """Bytes of W that a block has in flight."""
    return plan.stages * stage_bytes(plan.warps, plan.octets, 0)


def stream(
    plan: Plan, gpu: Gpu, *, blocks: int, warps: int, ring_kib: int, held: bool, alone: bool
) -> StreamPlan | None:
    """`plan` with these choices and as much of W in flight as fits, up to `ring_kib`.

    held: x is held in shared memory. alone: a block takes so much of that that no other one fits its multiprocessor.
    None where there is no room for two stages, or where blocks that are alone would be more than one wave.
    """
    if alone and blocks > gpu.multiprocessors:
        return None
    no_limit = 1 << 30
    whole = plan_stream(
        plan.rows, plan.features, plan.columns, norm=getattr(plan, "norm", "none"), blocks=blocks, warps=warps,
        held=held, block_bytes=no_limit, ring_bytes=no_limit,
    )  # fmt: skip
    limit = gpu.shared_limit - moments_bytes(whole) if alone else BLOCK_BYTES
    in_ring = ring_kib * KIB * whole.stages // weight_ring_bytes(whole)
    most = min(MOST_STAGES, in_ring, steps(whole))
    shorter = (replace(whole, stages=stages) for stages in range(most, 1, -1))
    fitting = next((one for one in shorter if one.shared_bytes <= limit), None)
    if fitting is None or not alone:
        return fitting
    return replace(fitting, least_bytes=(gpu.shared_limit + RESERVED_BYTES) // 2)


def steps(plan: StreamPlan) -> int:
    """Stages that a block passes through: of 32 columns for each warp, for each of its tiles."""
    tiles = ceil_div(ceil_div(plan.features, plan.blocks), 8 * plan.octets)
    return max(2, tiles * ceil_div(plan.columns, 32 * plan.warps))


def moments_bytes(plan: StreamPlan) -> int:
    """Static shared memory: two floats for each warp and row, padded, where there is a norm."""
    return 8 * (1 if plan.norm == "none" else plan.warps * 8 * plan.token_tiles)


def multicast(
    plan: Plan, gpu: Gpu, *, width: int, split: int, copies: int, row_stages: int
) -> MulticastPlan | None:
    """`plan` with these choices: `width` features a block, and as many of `copies` as a cluster of `split` parts has room for.

    None for parts without columns, for grids of less than a third of the multiprocessors or more than two blocks on each, and
    where two blocks have no room for so many stages of x.
    """
    blocks = ceil_div(plan.features, width) * split
    if not gpu.multiprocessors <= 3 * blocks <= 6 * gpu.multiprocessors:
        return None
    if (split - 1) * columns_per_block(plan.columns, split) >= plan.columns:
        return None
    made = plan_multicast(
        plan.rows, plan.features, plan.columns, features_per_block=width,
        copies=min(copies, MAX_CLUSTER // split), split=split, row_stages=row_stages,
    )  # fmt: skip
    return made if made.shared_bytes <= BLOCK_BYTES else None


def warpgroup(
    plan: Plan, gpu: Gpu, *, blocks: int, cluster: int, feature_tiles: int, ring_kib: int
) -> WarpgroupPlan | None:
    """The work of `plan` in whole waves of `blocks` blocks. None for parts without columns and for too much shared memory."""
    made = plan_warpgroup(
        plan.rows, plan.features, plan.columns, cluster=cluster, feature_tiles=feature_tiles,
        ring_bytes=ring_kib * KIB, blocks=blocks,
    )  # fmt: skip
    return made if _has_room(made, gpu) else None


def tile(
    plan: Plan, gpu: Gpu, *, blocks: int, cluster: int, warps_down: int, feature_tiles: int, stages: int
) -> TilePlan | None:
    """As `warpgroup`; without clusters before sm_90."""
    made = plan_tile(
        plan.rows, plan.features, plan.columns, cluster=cluster, feature_tiles=feature_tiles,
        warps_down=warps_down, stages=stages, blocks=blocks,
    )  # fmt: skip
    return made if _has_room(made, gpu) and (cluster == 1 or gpu.capability >= 90) else None


def _has_room(made: WarpgroupPlan | TilePlan, gpu: Gpu) -> bool:
    """Whether each part has columns and a block, with up to 1 KiB of barriers, has the shared memory it needs."""
    parts_have_columns = (made.cluster - 1) * made.columns_per_block < made.columns
    return parts_have_columns and made.shared_bytes + KIB <= gpu.shared_limit


def attention(plan: DecodePlan, gpu: Gpu, *, warps: int, stages: int, splits: int) -> DecodePlan | None:
    """`plan` with these choices, combined in a cluster where that can be; None where it needs too much shared memory."""
    cluster = gpu.capability >= 90 and splits <= MAX_CLUSTER
    made = replace(plan, warps=warps, stages=stages, splits=splits, cluster=cluster)
    return made if made.shared_bytes + RESERVED_BYTES <= gpu.shared_limit else None


MAKERS = {
    StreamPlan: stream, MulticastPlan: multicast, WarpgroupPlan: warpgroup, TilePlan: tile,
    DecodePlan: attention,
}  # fmt: skip
"""Kind of plan -> the function that makes one from choices."""
