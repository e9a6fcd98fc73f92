"""Oracle: the list itself."""

from __future__ import annotations

from array import array

import numpy as np
import pytest
from trtc.runtime.token_ids import packed, unsigned


@pytest.mark.parametrize("ids", [[], [3], [0, 1, 2**31 - 1, -1], (5, 6), [np.int64(7), 8]], ids=repr)
def test_packed_ids_are_a_copy(ids: list[int]) -> None:
    found = packed(ids)
    assert found.typecode == "i" and found.itemsize == 4 and found.tolist() == [int(i) for i in ids]
    again = packed(found)
    again.append(9)
    assert found.tolist() == [int(i) for i in ids]


@pytest.mark.parametrize("ids", [[1.0], ["1"], [None], [2**31], [-(2**31) - 1]], ids=repr)
def test_what_is_no_integer_of_32_bits_is_refused(ids: list[int]) -> None:
    with pytest.raises(ValueError, match=r"integer|format"):
        packed(ids)


def test_negative_ids_are_above_all_others() -> None:
    assert unsigned(array("i", [4, 0, 2**31 - 1])).max() == 2**31 - 1
    assert unsigned(array("i", [4, -1, 5])).max() >= 2**31
