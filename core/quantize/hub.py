"""GPTQ and AWQ checkpoints as the hub has them: four-bit integers packed eight to an int32.

`X.qweight`, `X.qzeros`, `X.scales` (and GPTQ's `X.g_idx`) stand there where a float checkpoint has `X.weight`; config.json
says how in `quantization_config`. GPTQ packs along the inputs, lowest bits first, and stores zero - 1; AWQ packs along the
outputs, interleaved. Both mean (integer - zero) * scale with integers of 0 to 15, ours are 8 less.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..dtypes import DType, to_torch
from ..errors import CheckpointError, ConfigError
from ..hf import HFCheckpoint, SourceTensor
from ..weight_source import HFWeights
from ..weights import IDENTITY
from .integers import Quantized, dequantize, pack_int4
from .scheme import Quantization, WeightFormat
from .store import PrequantizedWeights

METHODS = ("gptq", "awq")
PARTS = ("qweight", "qzeros", "scales")
PER_WORD = 8
"""Integers in an int32."""
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which four bits of a word hold column i of its eight, counted from the lowest."""
MIDDLE = 8
"""The zero of symmetric checkpoints."""


@dataclass(frozen=True)
class HubScheme:
    """What `quantization_config` says. zero_offset: what is added to a stored zero."""

    method: str
    format: WeightFormat
    zero_offset: int = 0

    @classmethod
    def read(cls, config: Mapping[str, Any], where: str) -> HubScheme | None:
        """None for a float checkpoint. Raises ConfigError, naming field and value, for what cannot be imported."""
        data = config.get("quantization_config")
        if data is None:
            return None
        where = f"{where}: quantization_config"
        if not isinstance(data, Mapping):
            raise ConfigError(f"{where} must be an object, is {type(data).__name__}")
        method = data.get("quant_method")
        if method not in METHODS:
            raise ConfigError(
                f"{where}: quant_method {method!r} is not supported; accepted: {', '.join(METHODS)}"
            )
        if data.get("bits") != 4:
            raise ConfigError(f"{where}: bits {data.get('bits')!r} is not supported; accepted: 4")
        group_size = data.get("group_size")
        field = "zero_point" if method == "awq" else "sym"
        stated = data.get(field, True)
        if not isinstance(stated, bool):
            raise ConfigError(f"{where}: {field} is {stated!r}; accepted: true or false")
        symmetric = stated if field == "sym" else not stated
        try:
            how = WeightFormat("int4", group_size, zero_point=not symmetric)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
        if method == "awq" and str(data.get("version", "gemm")).lower() != "gemm":
            raise ConfigError(f"{where}: version {data['version']!r} is not supported; accepted: gemm")
        layout = data.get("checkpoint_format", "gptq")
        if method == "gptq" and layout not in ("gptq", "gptq_v2"):
            raise ConfigError(
                f"{where}: checkpoint_format {layout!r} is not supported; accepted: gptq, gptq_v2"
            )
        return cls(method, how, 1 if method == "gptq" and layout == "gptq" else 0)


class PackedCheckpoint(HFCheckpoint):
    """A quantized checkpoint that also shows its packed weights as the float tensors `X.weight` they stand for.

    Raises CheckpointError for weights whose parts are missing or do not fit each other.
    """

    def __init__(self, source: HFCheckpoint, scheme: HubScheme) -> None:
        self.path, self.scheme, self._files = source.path, scheme, source._files
        self._stored = dict(source.tensors)
        stems = sorted(name.removesuffix(".qweight") for name in self._stored if name.endswith(".qweight"))
        if not stems:
            raise CheckpointError(
                f"{self.path}: config.json says {scheme.method}, but no tensor is called .qweight"
            )
        missing = [
            f"{stem}.{part}" for stem in stems for part in PARTS if f"{stem}.{part}" not in self._stored
        ]
        if missing:
            raise CheckpointError(f"{self.path}: {scheme.method} tensors are missing: {'; '.join(missing)}")
        twice = [f"{stem}.weight" for stem in stems if f"{stem}.weight" in self._stored]
        if twice:
            raise CheckpointError(
                f"{self.path}: weights stand there twice, as floats and as {scheme.method} tensors: {'; '.join(twice)}"
            )
        packed = {f"{stem}.{part}" for stem in stems for part in (*PARTS, "g_idx")}
        self._stems = {f"{stem}.weight": stem for stem in stems}
        self.tensors = {name: tensor for name, tensor in self._stored.items() if name not in packed}
        self.tensors |= {name: self._virtual(stem) for name, stem in self._stems.items()}

    def _virtual(self, stem: str) -> SourceTensor:
        """The float tensor, [out, in]; the sizes of all parts must agree."""
        qweight, qzeros, scales = (self._stored[f"{stem}.{part}"] for part in PARTS)
        gptq, group = self.scheme.method == "gptq", self.scheme.format.group_size
        assert group is not None
        fits = len(qweight.shape) == 2
        if fits:
            first, last = qweight.shape
            rows, columns = (last, first * PER_WORD) if gptq else (last * PER_WORD, first)
            groups = -(-columns // group)
            fits = (scales.shape, qzeros.shape) == ((groups, rows), (groups, rows // PER_WORD))
        if not fits or {qweight.dtype, qzeros.dtype} != {DType.INT32} or not scales.dtype.is_float:
            found = ", ".join(f"{part} {t.dtype}{list(t.shape)}" for part, t in
                              zip(PARTS, (qweight, qzeros, scales), strict=True))  # fmt: skip
            raise CheckpointError(
                f"{self.path}: {stem}: {found} do not fit {self.scheme.method} with groups of {group}"
            )
        return SourceTensor(scales.dtype, (rows, columns), qweight.file, qweight.offset)

    def is_packed(self, name: str) -> bool:
        return name in self._stems

    def quantized(self, name: str) -> Quantized:
        """The weight called `name`, with scales in their own dtype."""
        stem, scheme = self._stems[name], self.scheme
        qweight, qzeros, scales = (self._read_stored(f"{stem}.{part}") for part in PARTS)
        if scheme.method == "gptq":
            self._check_order(stem)
            integers, zeros = _words(qweight, 0).T, _words(qzeros, 1)
        else:
            integers, zeros = (_words(t, 1)[:, _awq_columns(t.shape[1])] for t in (qweight, qzeros))
            integers = integers.T
        zero = (zeros.T + scheme.zero_offset - MIDDLE).to(torch.int8).contiguous()
        if not scheme.format.zero_point and bool(zero.any()):
            raise CheckpointError(
                f"{self.path}: {stem}.qzeros: config.json says that the weights are symmetric, but zeros differ from {MIDDLE}"
            )
        stored = pack_int4((integers - MIDDLE).to(torch.int8).contiguous())
        return Quantized(stored, scales.T.contiguous(), zero if scheme.format.zero_point else None)

    def _check_order(self, stem: str) -> None:
        """Raises CheckpointError for columns that are not in groups of neighbours."""
        if f"{stem}.g_idx" not in self._stored:
            return
        order, group = self._read_stored(f"{stem}.g_idx"), self.scheme.format.group_size
        assert group is not None
        columns = self._stored[f"{stem}.qweight"].shape[0] * PER_WORD
        if not torch.equal(order.long(), torch.arange(columns) // group):
            raise CheckpointError(
                f"{self.path}: {stem}.g_idx: columns in another order (act-order, desc_act) are not supported; "
                f"quantize without it"
            )

    def _read_stored(self, name: str) -> torch.Tensor:
        return self._files[self._stored[name].file].read(name)

    def read(self, name: str) -> torch.Tensor:
        if name not in self._stems:
            return super().read(name)
        whole = self.quantized(name)
        return dequantize(whole.integers, whole.scale, whole.zero)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self.read(name)[start:stop] if name in self._stems else super().read_rows(name, start, stop)


def import_packed(floats: HFWeights, source: PackedCheckpoint) -> PrequantizedWeights:
    """The weights of `source` as it has them: nothing is rounded again.

    floats: over `source`. Raises CheckpointError for a packed weight that the family's table would have to transform.
    """
    origin = {
        weight.name: floats.source_name(weight.name) for weight in floats.weights() if weight.tied_to is None
    }
    packed = sorted(name for name, tensor in origin.items() if source.is_packed(tensor))
    for name in packed:
        if floats.weight(name).transform != IDENTITY:
            raise CheckpointError(
                f"{source.path}: {origin[name]} is quantized, and this family takes it apart "
                f"({floats.weight(name).transform.describe()}): not supported; convert the float checkpoint"
            )

    def load(name: str) -> Quantized:
        whole, dtype = source.quantized(origin[name]), to_torch(floats.dtype(0, name))
        scale = whole.scale.to(dtype)
        if not bool(scale.isfinite().all()):
            raise CheckpointError(f"{source.path}: {origin[name]}: has scales that are not finite in {dtype}")
        return Quantized(whole.integers, scale, whole.zero)

    return PrequantizedWeights(
        floats, Quantization(source.scheme.format, tuple(packed), source.scheme.method), load
    )


def _words(packed: torch.Tensor, axis: int) -> torch.Tensor:
    """int32 words -> int32 of 0 to 15, eight times as many along `axis`, lowest bits first."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    values = (packed.unsqueeze(axis + 1) >> shifts.reshape((-1, 1) if axis == 0 else (-1,))) & 15
    return values.flatten(axis, axis + 1)


def _awq_columns(words: int) -> torch.Tensor:
    """Position of each column among the unpacked ones."""
    order = torch.tensor(AWQ_ORDER)
    return (torch.arange(words).unsqueeze(1) * PER_WORD + order).flatten()
