"""Threads of the CPU target. Oracle: files as a container's cgroup has them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from trtc.runtime.cpu_threads import limit_threads, usable_threads

ALLOWED = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("max 100000\n", ALLOWED),
        ("150000 100000\n", 1),
        ("50000 100000\n", 1),
        ("99900000 100000\n", ALLOWED),
        ("damaged", ALLOWED),
    ],
)
def test_a_quota_limits_the_threads(text: str, expected: int, tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text(text)
    assert usable_threads(quota_file=tmp_path / "cpu.max") == expected


def test_without_a_cgroup_the_affinity_mask_counts(tmp_path: Path) -> None:
    assert usable_threads(quota_file=tmp_path / "none") == ALLOWED


@pytest.mark.parametrize(
    ("text", "ranks", "expected"),
    [
        ("max 100000", [range(8)], 8),
        ("max 100000", [range(8)] * 3, 2),
        ("max 100000", [range(8)] * 9, 1),
        ("max 100000", [range(8), range(8, 16), range(16, 24)], 8),  # as mpirun binds them
        ("400000 100000", [range(8)] * 2, 2),
        ("400000 100000", [range(8), range(8, 16)], 2),
        ("400000 100000", [range(8)] * 8, 1),
    ],
)
def test_ranks_share_what_they_have_together(
    text: str, ranks: list[range], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine of 128 processors, of which the container has 8, or a quota of four."""
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    (tmp_path / "cpu.max").write_text(text)
    assert usable_threads(ranks, tmp_path / "cpu.max") == expected


@pytest.fixture
def threads() -> Iterator[int]:
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


def test_the_environment_has_the_last_word(threads: int, tmp_path: Path) -> None:
    torch.set_num_threads(2)
    (tmp_path / "cpu.max").write_text("100000 100000")
    limit_threads(environ={"OMP_NUM_THREADS": "2"}, quota_file=tmp_path / "cpu.max")
    assert torch.get_num_threads() == 2
    limit_threads(environ={}, quota_file=tmp_path / "cpu.max")
    assert torch.get_num_threads() == 1
