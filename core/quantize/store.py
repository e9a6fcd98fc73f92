"""Whole quantized weights, kept on disk until they are cut into shards, and the WeightSource over them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..graph import Graph
from ..safetensors_io import SafetensorsFile, write_file
from ..weight_source import ShardedWeights
from .calibrate import Calibration
from .integers import Quantized, round_to_nearest
from .scheme import Quantization, QuantizeOptions
from .source import QuantizedWeights


class QuantizedStore:
    """A folder with a file for each quantized weight: memory holds one at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, Path] = {}

    def fill(
        self, weights: Iterable[tuple[str, Quantized]], progress: Callable[[int, str], None] | None = None
    ) -> None:
        """progress: told after every weight how many there are, and the name of the last."""
        for name, weight in weights:
            path = self._folder / f"{len(self._files)}.safetensors"
            write_file(path, {suffix or "integers": tensor for suffix, tensor in weight.parts().items()})
            self._files[name] = path
            if progress is not None:
                progress(len(self._files), name)

    def load(self, name: str) -> Quantized:
        with SafetensorsFile(self._files[name]) as file:
            zero = file.read(".zero") if ".zero" in file.tensors else None
            return Quantized(file.read("integers"), file.read(".scale"), zero)


class PrequantizedWeights(QuantizedWeights):
    """A WeightSource over another one, with some weights quantized already; `load` gives them whole, by name."""

    def __init__(
        self, source: ShardedWeights, quantization: Quantization, load: Callable[[str], Quantized]
    ) -> None:
        super().__init__(source, quantization)
        self._load = load

    def _quantized(self, name: str, rows: tuple[int, int] | None) -> Iterator[tuple[int, Quantized]]:
        whole = self._load(name)
        yield 0, whole
        missing = self._source.padded_rows(name) - len(whole.integers)
        if missing:  # rows of zeros, as sharding adds them where the ranks do not divide the weight's
            dtype, columns = whole.scale.dtype, self._source.weight(name).shape[1]
            zeros = round_to_nearest(
                torch.zeros(missing, columns, dtype=dtype), self.quantization.format, name=name
            )
            if whole.zero is not None:
                zeros = replace(zeros, zero=torch.zeros_like(zeros.scale, dtype=whole.zero.dtype))
            yield len(whole.integers), zeros


def calibrated(
    floats: ShardedWeights,
    options: QuantizeOptions,
    graph: Graph,
    texts: Sequence[Sequence[int]],
    folder: Path,
    progress: Callable[[int, int, str], None] | None = None,
) -> PrequantizedWeights:
    """Weights quantized by GPTQ for the inputs that `texts` (token ids) give each layer.

    graph: of the model, as composed. folder: an empty one, which must stay as long as the result is used.
    progress: told (weights done, weights in all, name of the last).
    Raises ConfigError when the groups do not fit the weights, or a weight is not a linear layer's.
    """
    quantization = options.choose(floats.weights(), "gptq")
    store, total = QuantizedStore(folder), len(quantization.weights)
    source = PrequantizedWeights(floats, quantization, store.load)
    run = Calibration(graph, floats.whole, texts, options.format, quantization.weights)
    store.fill(run.quantized(), None if progress is None else lambda done, name: progress(done, total, name))
    return source
