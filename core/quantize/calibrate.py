"""Runs a graph over calibration texts, node by node, and quantizes each linear layer's weight for the inputs that reach it.

Every node is executed for all texts before the next one, with the ops' references. What is in memory is the tensors that
later nodes read, one weight, and one Hessian; a layer sees what the quantized layers before it make.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..errors import ConfigError, TrtcError
from ..graph import Graph, Node
from ..ops import ReferenceContext, get_op
from .gptq import gptq
from .integers import Quantized, dequantize
from .scheme import WeightFormat

BATCH_TOKENS = 2048
"""Tokens of the texts that are run together."""
PAGE_SIZE = 64
TEXT_FIELDS = ("text", "article", "prompt")
"""Fields of a line of a calibration file that may hold its text; `token_ids` holds ids instead."""

Values = dict[str, torch.Tensor]


def read_texts(path: Path, encode: Callable[[str], list[int]], max_length: int) -> list[list[int]]:
    """Token ids of the lines of a jsonl file, each cut after `max_length` tokens.

    A line is a string, or an object with a field of TEXT_FIELDS or with `token_ids`.
    Raises ConfigError naming file and line for what is neither, and for a file without tokens.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"--calibrate {path}: cannot be read: {reason}") from None
    found = [
        _token_ids(line, f"--calibrate {path}, line {number}", encode)[:max_length]
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    texts = [ids for ids in found if ids]
    if not texts:
        raise ConfigError(f"--calibrate {path}: holds no text")
    return texts


def _token_ids(line: str, where: str, encode: Callable[[str], list[int]]) -> list[int]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        raise ConfigError(f"{where}: not valid JSON") from None
    if isinstance(value, dict):
        ids = value.get("token_ids")
        if isinstance(ids, list) and all(type(i) is int for i in ids):
            return ids
        value = next((value[key] for key in TEXT_FIELDS if key in value), None)
    if not isinstance(value, str):
        raise ConfigError(
            f"{where}: expected a string, or an object with token_ids or one of {', '.join(TEXT_FIELDS)}"
        )
    try:
        return encode(value)
    except TrtcError as error:
        raise ConfigError(f"{where}: {error}") from None


@dataclass
class Calibration:
    """One run. `quantized` gives each chosen weight once.

    graph: as composed, before any pass, so that its weights are those of the checkpoint.
    read: a whole weight by name, in the model's dtype.
    texts: token ids, none longer than the model has positions.
    """

    graph: Graph
    read: Callable[[str], torch.Tensor]
    texts: Sequence[Sequence[int]]
    how: WeightFormat
    chosen: Sequence[str]
    _weights: Values = field(default_factory=dict)

    def __post_init__(self) -> None:
        products = {node.inputs[1] for node in self.graph.nodes if node.op == "linear"}
        odd = sorted(set(self.chosen) - products)
        if odd:
            raise ConfigError(
                f"--calibrate: {odd[0]} is not the weight of a linear layer; quantize without calibration"
            )
        tables = [
            self.graph.specs[n.inputs[1] or ""].shape[0] for n in self.graph.nodes if "token_ids" in n.inputs
        ]
        size = min((rows for rows in tables if isinstance(rows, int)), default=math.inf)
        for token_id in (one for ids in self.texts for one in ids if not 0 <= one < size):
            raise ConfigError(f"--calibrate: token id {token_id} is not in the model's vocabulary")

    @torch.inference_mode()
    def quantized(self) -> Iterator[tuple[str, Quantized]]:
        batches = [_inputs(group) for group in _groups(self.texts)]
        last_use = {name: node.name for node in self.graph.nodes for name in node.used}
        waiting = set(self.chosen)
        for node in self.graph.nodes:
            if node.op in ("input", "weight"):
                continue
            weight = node.inputs[1] if node.op == "linear" else None
            if weight in waiting:
                assert weight is not None and node.inputs[0] is not None
                waiting.discard(weight)
                result = gptq(self.read(weight), _moments(batches, node.inputs[0]), self.how, name=weight)
                self._weights[weight] = dequantize(result.integers, result.scale.float(), result.zero)
                yield weight, result
                if not waiting:
                    return  # what follows changes no weight
            for batch in batches:
                self._execute(node, batch)
            for name in set(node.used):
                if last_use[name] == node.name:
                    for values in (self._weights, *batches):
                        values.pop(name, None)

    def _execute(self, node: Node, batch: Values) -> None:
        inputs = [None if name is None else self._value(name, batch) for name in node.inputs]
        context = ReferenceContext()
        if (
            node.op == "attention"
        ):  # texts are run whole: nothing that it puts into a cache is read by another step
            key = inputs[1]
            assert key is not None
            pages = torch.zeros(int(batch["page_table"].max()) + 1, PAGE_SIZE, *key.shape[1:])
            context = ReferenceContext([(pages, pages.clone())] * (int(node.attrs["layer"]) + 1))
        result = get_op(node.op).reference(context, node.attrs, *inputs)
        batch.update(zip(node.tensors, (result,) if len(node.outputs) == 1 else result, strict=True))

    def _value(self, name: str, batch: Values) -> torch.Tensor:
        """A tensor; everything is computed in float32, whatever the model's dtype: CPUs do that fastest."""
        if self.graph.producers[name].op != "weight":
            return batch[name]
        if name not in self._weights:
            self._weights[name] = self.read(name).float()
        return self._weights[name]


def _moments(batches: Sequence[Values], tensor: str) -> torch.Tensor:
    """Sum of x x^T over all rows x of `tensor`, over their number."""
    rows = sum(len(batch[tensor]) for batch in batches)
    total = torch.zeros(1)
    for batch in batches:
        total = total + batch[tensor].T @ batch[tensor] / rows
    return total


def _groups(texts: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    """Texts of together about BATCH_TOKENS tokens."""
    group: list[Sequence[int]] = []
    for ids in texts:
        if group and sum(map(len, group)) + len(ids) > BATCH_TOKENS:
            yield group
            group = []
        group.append(ids)
    yield group


def _inputs(texts: Sequence[Sequence[int]]) -> Values:
    """The graph's inputs for texts that are run whole, each from its beginning; logits of every row."""
    lengths = torch.tensor([len(ids) for ids in texts])
    pages = -(-lengths // PAGE_SIZE)
    table = torch.full((len(texts), int(pages.max())), -1)
    first = 0
    for row, count in enumerate(pages.tolist()):
        table[row, :count] = torch.arange(first, first + count)
        first += count
    inputs = {
        "token_ids": torch.tensor([token for ids in texts for token in ids]),
        "positions": torch.cat([torch.arange(len(ids)) for ids in texts]),
        "query_start": torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        "kv_length": lengths,
        "page_table": table,
        "logits_index": torch.arange(int(lengths.sum())),
    }
    return {name: value.to(torch.int32) for name, value in inputs.items()}
