"""Four-bit integers with zero points, as GPTQ and AWQ checkpoints have them, made of a checkpoint's own weights."""

from __future__ import annotations

import torch
from trtc.core.quantize.integers import Quantized, pack_int4
from trtc.core.quantize.scheme import QuantizeOptions, WeightFormat
from trtc.core.quantize.store import PrequantizedWeights
from trtc.core.weight_source import ShardedWeights


def round_with_zeros(weight: torch.Tensor, group_size: int) -> Quantized:
    """Rows [rows, in] rounded to nearest: the smallest value of a group becomes -8 or so, the largest 7."""
    groups = weight.float().unflatten(1, (-1, group_size))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scale = ((high - low) / 15).clamp(min=1e-6).to(weight.dtype)
    zero = (torch.round(-low / scale.float()) - 8).clamp(-8, 8)
    integers = torch.round(groups / scale.float()[..., None]) + zero[..., None]
    return Quantized(pack_int4(integers.clamp(-8, 7).flatten(1).to(torch.int8)), scale, zero.to(torch.int8))


def with_zeros(
    floats: ShardedWeights, how: WeightFormat, lm_head: bool = False, *, whole: ShardedWeights | None = None
) -> PrequantizedWeights:
    """The weights that the table marks as quantizable, rounded with zero points. whole: `floats` of one rank."""
    assert how.zero_point and how.group_size is not None
    group_size, whole = how.group_size, whole or floats

    def load(name: str) -> Quantized:
        assert whole is not None
        return round_with_zeros(whole.read(0, name), group_size)

    return PrequantizedWeights(floats, QuantizeOptions(how, lm_head).choose(floats.weights(), "zeros"), load)
