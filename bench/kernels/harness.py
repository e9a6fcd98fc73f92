"""Timing of kernels inside CUDA graphs, and the record of what was timed.

A case is a list of launches that a graph holds in order; the time of one launch is that of the replayed graph over the
number of launches. Launches of one case take turns over enough weight buffers that nothing is found in L2.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from ...kernels.library import KernelLibrary
from ...kernels.nvrtc import KernelSource, compile_kernel
from ...runtime.benchmark import read_bandwidth
from ..provenance import commit_of_tree, output_of

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


COMMIT = "TRTC_BENCH_COMMIT"
"""Environment variable that names what is measured where git cannot: on a machine that has a copy of the files alone."""

POOL_BYTES = 1 << 30
ROTATION_BYTES = 400 << 20
"""Bytes of weights that one case's launches pass over: over six times the 60 MB of L2."""


@dataclass(frozen=True)
class Row:
    """One line of the table. `us` is the median over `samples`, microseconds a launch."""

    case: str
    config: str
    us: float
    gbps: float
    samples: list[float] = field(repr=False)
    baseline_us: float | None = None
    error: float | None = None

    @property
    def percent(self) -> float:
        return self.gbps / copy_tbps() / 10


@cache
def copy_tbps() -> float:
    """TB/s of a copy on this GPU, bytes read plus written, measured: the limit that percentages refer to. 4.3 on an H200,
    2.97 on an H100."""
    return read_bandwidth() / 1e12


def time_launches(
    launches: Sequence[Callable[[], Any]], replays: int = 15, capture_error_mode: str = "global"
) -> list[float]:
    """Microseconds per launch, one sample per replay of a graph that holds all `launches`.

    capture_error_mode: of `torch.cuda.graph`; "thread_local" where other threads call CUDA meanwhile.
    """
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        for launch in launches[:3]:
            launch()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode=capture_error_mode):
        for launch in launches:
            launch()
    for _ in range(3):
        graph.replay()
    events = [
        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        for _ in range(replays + 1)
    ]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    spans = [first.elapsed_time(second) for first, second in itertools.pairwise(events)]
    return [1000 * span / len(launches) for span in spans]


class WeightPool:
    """Random weights that many matrices share: `matrices` gives different views of one buffer."""

    def __init__(self, dtype: torch.dtype) -> None:
        generator = torch.Generator(device="cuda").manual_seed(0)
        count = POOL_BYTES // dtype.itemsize
        self._data = torch.empty(count, dtype=dtype, device="cuda").normal_(std=0.02, generator=generator)

    def matrices(self, *shape: int) -> list[torch.Tensor]:
        """Disjoint tensors of `shape`: at least two, up to ROTATION_BYTES and 128 of them."""
        size = 1
        for dim in shape:
            size *= dim
        size = -(-size // 64) * 64
        count = min(128, max(2, ROTATION_BYTES // (size * self._data.element_size())))
        numel = torch.Size(shape).numel()
        return [self._data[i * size : i * size + numel].view(shape) for i in range(count)]


def compile_side_by_side(library: KernelLibrary, sources: Iterable[KernelSource]) -> None:
    """Compiles `sources`, each with one kernel, by all processors; the library then finds them."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda source: compile_kernel(source, {}, library.target), set(sources)))


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong with a command in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """The norm of the difference over the norm of the reference."""
    return float((out.double() - reference).norm() / reference.norm())


def median_row(case: str, config: str, samples: list[float], moved_bytes: float, **extra: Any) -> Row:
    us = statistics.median(samples)
    return Row(case, config, us, moved_bytes / us / 1000, samples, **extra)


def print_table(rows: list[Row]) -> None:
    print(
        f"{'case':34} {'config':34} {'us':>8} {'GB/s':>6} {'% lim':>6} {'torch us':>8} {'ratio':>6} {'error':>8}"
    )
    for row in rows:
        ratio = f"{row.baseline_us / row.us:6.2f}" if row.baseline_us else ""
        baseline = f"{row.baseline_us:8.2f}" if row.baseline_us else ""
        error = f"{row.error:8.1e}" if row.error is not None else ""
        print(
            f"{row.case:32} {row.config:52} {row.us:8.2f} {row.gbps:6.0f} {row.percent:6.1f} "
            f"{baseline:>8} {ratio:>6} {error:>8}"
        )


def write_json(path: Path, rows: Sequence[DataclassInstance], **extra: Any) -> None:
    """Rows with every sample, the device, the driver and the versions."""
    record = {**extra, "environment": environment(), "rows": [asdict(row) for row in rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def environment() -> dict[str, Any]:
    """What the numbers depend on: commit, device, driver, clocks, versions."""
    return {
        **commit_of_tree(os.environ.get(COMMIT)),
        "device": torch.cuda.get_device_name(),
        "driver": nvidia_smi("driver_version"),
        "sm_clock_mhz": nvidia_smi("clocks.sm"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "limit_tbps": round(copy_tbps(), 3),
    }


def nvidia_smi(query: str) -> str:
    """What nvidia-smi says of the first field of `query`, of the first GPU; "unknown" where there is none."""
    return output_of("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader").partition("\n")[0]


def out_dir() -> Path:
    """Where results go: $OUT when set, else ./out."""
    return Path(os.environ.get("OUT", "out"))
