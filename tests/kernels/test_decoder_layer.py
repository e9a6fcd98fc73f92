"""Decoder layers of the kernels one after another, with the plans that are chosen and others."""

from __future__ import annotations

import pytest
from trtc.bench.kernels.decoder_layer import Search
from trtc.bench.kernels.decoder_layer_chain import Chain
from trtc.bench.kernels.decoder_layer_plans import Gpu, Layer, choose_plans
from trtc.kernels.library import KernelLibrary


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 24])
def test_layers_are_right_and_timed(rows: int, library: KernelLibrary) -> None:
    """Oracles: float64 for each kernel, launches one by one for the graph; no layer takes less time than the memory does."""
    layer = Layer("125M", rows, 576)
    gpu = Gpu(library.capability, library.multiprocessors, library.shared_limit)
    found = Search(Chain(library, layer), gpu, choose_plans(layer, gpu), 2).run()
    assert found.tried > 1 and layer.moved_bytes / 6e6 < found.best_us < 1.1 * found.chosen_us
