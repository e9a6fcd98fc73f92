"""Token ids in 32 bits each: prompts are long, and Python looks at every item of a list."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def packed(token_ids: Sequence[int]) -> array[int]:
    """A copy of `token_ids`. Raises ValueError where an item is no integer, or none of 32 bits; True and False are 1 and 0."""
    if isinstance(token_ids, array):
        return array("i", token_ids)
    try:
        return array(
            "i", struct.pack(f"{len(token_ids)}i", *token_ids)
        )  # array("i", token_ids): twice the time
    except struct.error as error:
        raise ValueError(str(error)) from None


def unsigned(token_ids: array[int]) -> npt.NDArray[np.uint32]:
    """One or more packed ids as they lie; negative ones are larger than all others."""
    return np.frombuffer(token_ids, np.uint32)
