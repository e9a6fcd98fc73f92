"""What is said of ranks on GPUs: the comparison of their tokens, and tables. Oracle: numbers worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from trtc.bench import gpu_rank_memory, rank_tokens
from trtc.bench.rank_tokens import LENGTHS, TOKENS, compare, steps

MIB = 1 << 20


def found(logits: torch.Tensor) -> dict[str, Any]:
    return {"logits": logits, "tokens": logits.argmax(-1).t().tolist()}


def reference() -> torch.Tensor:
    """Logits up to 4, where token 0 is best by 1 everywhere, except at one place: there by 0.03."""
    logits = torch.zeros(TOKENS, 4, 8)
    logits[..., 0], logits[..., 1] = 4.0, 3.0
    logits[5, 2, 1] = 3.97
    return logits


def test_near_ties_may_fall_either_way_and_are_counted() -> None:
    other = reference()
    other[5, 2, :2] = torch.tensor([3.98, 3.985])  # both within 4 * 5e-3
    record = compare(found(reference()), found(other), reference())
    assert record["wrong"] == []
    assert (record["tokens"], record["same"]) == (4 * TOKENS, 4 * TOKENS - 1)
    assert record["generated_alike"] == [TOKENS, TOKENS, 5, TOKENS]
    assert record["largest_gap_where_they_differ"] == pytest.approx(0.03)


def test_wrong_logits_and_wrong_tokens_are_found() -> None:
    other = reference()
    other[7, 1, 3] = 0.021
    (text,) = compare(found(reference()), found(other), reference())["wrong"]
    assert text == "logits of several differ from float32 by 0.021, more than 0.02"
    worse = found(reference())
    worse["tokens"][3][2] = 1  # generated where float32 has it 1 below the best
    (text,) = compare(found(reference()), worse, reference())["wrong"]
    assert text == "other tokens where float32 has them 1 apart, more than 0.04"
    other[7, 1, 3] = float("nan")
    assert compare(found(reference()), found(other), reference())["wrong"]


def test_steps_hold_the_tokens_of_all_sequences() -> None:
    sequences = [[100 * row + i for i in range(n + TOKENS)] for row, n in enumerate(LENGTHS)]
    first, *rest = steps(sequences)
    assert first.num_tokens == sum(LENGTHS) and first.logits_index.tolist() == [8, 41, 57, 114]
    assert len(rest) == TOKENS - 1
    assert rest[0].token_ids.tolist() == [9, 133, 216, 357] and rest[0].positions.tolist() == [9, 33, 16, 57]
    assert rest[-1].token_ids.tolist() == [71, 195, 278, 419]
    assert rest[-1].kv_length.tolist() == [n + TOKENS - 1 for n in LENGTHS]
    assert len(set(first.page_table.ravel().tolist())) == first.page_table.size


def test_what_is_said_of_tokens() -> None:
    record = compare(found(reference()), found(reference()), reference())
    data = {"model": "1.3b", "dtype": "float16", "device": "GPU", "driver": "5", "torch": "2", "commit": "abc",
            "date": "today", "records": [{"tp_size": n, **record} for n in (2, 4)]}  # fmt: skip
    text = rank_tokens.markdown(data)
    assert text.startswith("OPT-1.3B in float16 on 2 x GPU: given the tokens that one generates, 256 of 256")
    assert " OPT-1.3B in float16 on 4 x GPU: " in text
    assert "alike for 64, 64, 64, 64." in text


def test_the_table_of_memory_has_the_largest_rank_of_each_row() -> None:
    def row(embedding: str, *weights: int) -> dict[str, Any]:
        ranks = [{"weights": w * MIB, "allocated": (w + 70) * MIB, "taken": (w + 500) * MIB} for w in weights]
        return {"model": "1.3b", "embedding": embedding, "ranks": ranks}

    data = {"rows": [row("off", 1000, 900), row("dim 0", 800, 800)], "tp_size": 2, "device": "GPU", "driver": "5",
            "torch": "2", "commit": "abc", "date": "today", "cache_bytes": 64 * MIB}  # fmt: skip
    lines = gpu_rank_memory.markdown(data).splitlines()
    assert lines[2] == "| OPT-1.3B | off | 1000 MiB | 100% | 1070 MiB | 1500 MiB |"
    assert lines[3] == "| OPT-1.3B | dim 0 | 800 MiB | 80% | 870 MiB | 1300 MiB |"
