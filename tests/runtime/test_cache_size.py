"""How large a KV cache is, and what else follows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trtc.core.dtypes import DType
from trtc.core.errors import ConfigError
from trtc.runtime.cache_size import CacheBudget
from trtc.runtime.llm import LLM
from trtc.runtime.sampling_params import SamplingParams
from trtc.tests.opt_models import OptCheckpoint, save_hf

GREEDY = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)


@pytest.mark.parametrize("value", ["1e9", 1e9, True])
def test_what_is_no_whole_number_is_refused(value: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"kv_cache_memory_bytes is .*; accepted: a whole number, or None"):
        LLM(tmp_path, kv_cache_memory_bytes=value)
    with pytest.raises(ConfigError, match=r"num_pages is .*; accepted: a whole number, or None"):
        CacheBudget(num_pages=value)


def test_an_engine_for_more_sequences_than_pages(tmp_path: Path) -> None:
    """Memory of a step is that of the sequences which the cache can hold. Oracle: an engine for few."""
    source = OptCheckpoint.open(save_hf("pre_norm", tmp_path / "hf"))
    found = []
    for number in (4, 10**9):
        folder = tmp_path / str(number)
        source.build(folder, dtype=DType.FLOAT32, max_batch_size=number, max_num_tokens=number + 64)
        with LLM(folder, num_pages=np.int64(8)) as llm:  # any whole number will do
            found.append([out.outputs[0].token_ids for out in llm.generate([[5, 6, 7], [8, 9]], GREEDY)])
    assert found[0] == found[1]
