"""Plans of the kernels of a decoder layer: those chosen, and others worth a try. Plain arithmetic: no GPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from ...kernels.linear import MAX_STREAM_ROWS, Plan, choose_plan
from ...kernels.linear.multicast_plan import MulticastPlan, columns_per_block, plan_multicast
from ...kernels.linear.plan import (
    BLOCK_BYTES,
    RESERVED_BYTES,
    StreamPlan,
    ceil_div,
    plan_stream,
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
    DecodePlan: (("warps", "stages"), ("splits",)),
}
"""What a search changes at a time: choices that depend on each other together. Plans of other kernels stay as they are."""


def candidates(plan: Plan | DecodePlan, move: Sequence[str], gpu: Gpu) -> list[Any]:
    """`plan` with all other values of the choices that `move` names, without plans that do not fit, of the type of `plan`."""
    made: Iterator[Plan | DecodePlan | None]
    if isinstance(plan, StreamPlan):
        choices = {
            "blocks": plan.blocks, "warps": plan.warps, "ring_kib": weight_ring_bytes(plan) // KIB,
            "held": plan.held_x, "alone": plan.least_bytes > 0,
        }  # fmt: skip
        made = (stream(plan, gpu, **one) for one in _vary(choices, _stream_values(plan, gpu), move))
    elif isinstance(plan, MulticastPlan):
        choices = {
            "width": plan.features_per_block, "split": plan.split, "copies": plan.copies,
            "row_stages": plan.row_stages,
        }  # fmt: skip
        made = (multicast(plan, gpu, **one) for one in _vary(choices, MULTICAST_VALUES, move))
    elif isinstance(plan, DecodePlan):
        choices = {"warps": plan.warps, "stages": plan.stages, "splits": plan.splits}
        made = (attention(plan, gpu, **one) for one in _vary(choices, ATTENTION_VALUES, move))
    else:
        made = iter(())
    return [one for one in dict.fromkeys(made) if one is not None and one != plan]


def _vary(
    choices: Mapping[str, Any], values: Mapping[str, Sequence[Any]], move: Sequence[str]
) -> Iterator[dict[str, Any]]:
    for combination in itertools.product(*(values[name] for name in move)):
        yield {**choices, **dict(zip(move, combination, strict=True))}


def _stream_values(plan: StreamPlan, gpu: Gpu) -> dict[str, Sequence[Any]]:
    """Grids of whole and half waves, and those whose blocks have a tile of features, or one and a half."""
    waves = (gpu.multiprocessors * quarters // 4 for quarters in (2, 3, 4, 6, 8))
    tiles = (ceil_div(plan.features, width) for width in (8, 12, 16, 20, 24, 32))
    least, most = gpu.multiprocessors // 4, 2 * gpu.multiprocessors
    return {
        "blocks": sorted({blocks for blocks in (*waves, *tiles) if least <= blocks <= most}),
        "warps": (4, 6, 8, 10, 12, 16),
        "ring_kib": (24, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192),
        "held": (True, False),
        "alone": (True, False),
    }


MULTICAST_VALUES = {
    "width": (*range(16, 129, 8), *range(144, 193, 16)),
    "split": (1, 2, 4, 8),
    "copies": (1, 2, 4, 8),
    "row_stages": (4, 6, 8),
}
ATTENTION_VALUES = {
    "warps": (2, 4, 8),
    "stages": (2, 3, 4, 6, 8),
    "splits": (1, 2, 3, 4, 5, 6, 8, 12, 16),
}


def weight_ring_bytes(plan: StreamPlan) -> int:
    """Bytes of W that a block has in flight."""
    return plan.stages * stage_bytes(plan.warps, plan.octets, 0)


def stream(
    plan: StreamPlan, gpu: Gpu, *, blocks: int, warps: int, ring_kib: int, held: bool, alone: bool
) -> StreamPlan | None:
    """`plan` with these choices and as much of W in flight as fits, up to `ring_kib`.

    held: x is held in shared memory. alone: a block takes so much of that that no other one fits its multiprocessor.
    None where there is no room for two stages, or where blocks that are alone would be more than one wave.
    """
    if alone and blocks > gpu.multiprocessors:
        return None
    no_limit = 1 << 30
    whole = plan_stream(
        plan.rows, plan.features, plan.columns, norm=plan.norm, blocks=blocks, warps=warps, held=held,
        block_bytes=no_limit, ring_bytes=no_limit,
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
    plan: MulticastPlan, gpu: Gpu, *, width: int, split: int, copies: int, row_stages: int
) -> MulticastPlan | None:
    """`plan` with these choices: `width` features a block, and as many of `copies` as a cluster of `split` parts has room for.

    None for parts without columns, and for grids of less than a third of the multiprocessors or more than two blocks on each.
    """
    blocks = ceil_div(plan.features, width) * split
    if not gpu.multiprocessors <= 3 * blocks <= 6 * gpu.multiprocessors:
        return None
    if (split - 1) * columns_per_block(plan.columns, split) >= plan.columns:
        return None
    return plan_multicast(
        plan.rows, plan.features, plan.columns, features_per_block=width,
        copies=min(copies, MAX_CLUSTER // split), split=split, row_stages=row_stages,
    )  # fmt: skip


def attention(plan: DecodePlan, gpu: Gpu, *, warps: int, stages: int, splits: int) -> DecodePlan | None:
    """`plan` with these choices, combined in a cluster where that can be; None where it needs too much shared memory."""
    cluster = gpu.capability >= 90 and splits <= MAX_CLUSTER
    made = replace(plan, warps=warps, stages=stages, splits=splits, cluster=cluster)
    return made if made.shared_bytes + RESERVED_BYTES <= gpu.shared_limit else None
