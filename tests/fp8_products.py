"""Graphs and weights of engines of target cuda whose products are of e4m3 numbers by e4m3 numbers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch.nn import functional
from trtc.core.build import plan
from trtc.core.dtypes import DType
from trtc.core.graph import Graph
from trtc.core.interpreter import interpret
from trtc.core.ops.elementwise import ACTIVATIONS
from trtc.core.quantize.scheme import QuantizeOptions, WeightFormat
from trtc.core.quantize.source import nearest
from trtc.core.targets.cuda.large_products import QuantizedProducts
from trtc.kernels.library import KernelLibrary
from trtc.kernels.linear.quantized import for_kernels

from .opt_models import BUILD, OptCheckpoint, save_hf

W8A8 = QuantizeOptions(WeightFormat("fp8"), activations="fp8")
Weights = dict[str, torch.Tensor]


def planned(
    variant: str, dtype: DType, folder: Path, target: str = "cuda", lm_head: bool = False
) -> tuple[Graph, Weights]:
    """The graph of an engine, and its weights as they are stored."""
    source = OptCheckpoint.open(save_hf(variant, folder / "hf"))
    model = dataclasses.replace(source.config, dtype=dtype)
    weights = nearest(dataclasses.replace(W8A8, lm_head=lm_head))(source.weights(dtype))
    parts = plan(source.family, model, weights, dataclasses.replace(BUILD, target=target), 0)
    raw = {name: weights.read(0, name) for name in weights.names(0)}
    return parts.graph, raw | {name: interpret(recipe, raw) for name, recipe in parts.recipes.items()}


def products(graph: Graph, weights: Weights, library: KernelLibrary) -> tuple[Weights, QuantizedProducts]:
    """Kernels of the products of `graph`, and the weights as they read them."""
    made = dict(weights)
    for node in graph.nodes:
        if node.op == "quantized_linear":
            integers, scale = node.used[1:3]
            made[integers], made[scale] = for_kernels(weights[integers], weights[scale])
    return made, QuantizedProducts(graph, made, library)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str,
) -> torch.Tensor:
    """What `CublasLt.linear` computes, in torch."""
    y = functional.linear(x, weight, bias)
    y = y if activation == "none" else ACTIVATIONS[activation](y)
    return y if residual is None else y + residual
