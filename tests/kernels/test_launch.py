"""Loading and launching: errors without a GPU; on a GPU arguments, attributes and graphs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from trtc.kernels import launch
from trtc.kernels.errors import DeviceError
from trtc.kernels.launch import LaunchShape
from trtc.kernels.library import KernelLibrary
from trtc.kernels.nvrtc import KernelSource

SOURCE = """
extern "C" __global__ void store(float* out, int i, unsigned u, long long q, float f, const float* null) {
    out[0] = i; out[1] = u; out[2] = q; out[3] = f; out[4] = null == nullptr;
}
extern "C" __global__ void shared_sum(float* out, int count) {
    extern __shared__ float values[];
    for (int i = threadIdx.x; i < count; i += blockDim.x) values[i] = 1.f;
    __syncthreads();
    if (threadIdx.x == 0) { float sum = 0; for (int i = 0; i < count; ++i) sum += values[i]; out[0] = sum; }
}
#if __CUDA_ARCH__ >= 900
extern "C" __global__ void add_one(float* x) {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
    x[threadIdx.x] += 1.f;
}
extern "C" __global__ void grid_size(int* out) {
    unsigned blocks; asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
    atomicAdd(out, blocks);
}
#endif
"""


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="there is a GPU: the error is that of machines without one"
)
def test_without_a_gpu_the_error_says_what_is_missing() -> None:
    """Oracle: the text."""
    for call in (lambda: launch.load(b"cubin"), launch.architecture, lambda: KernelLibrary().arch):
        with pytest.raises(DeviceError, match=r"NVIDIA GPU|needs one|pip install"):
            call()


def test_engine_without_the_kernel_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the text; a library with precompiled code never compiles."""
    library = KernelLibrary(precompiled=[])
    monkeypatch.setattr(KernelLibrary, "arch", "sm_90")
    with pytest.raises(
        DeviceError, match=r"the engine carries no kernel nothing of none\.cu; build it again for sm_90"
    ):
        library.kernel(KernelSource(Path("none.cu"), ("nothing",)), "nothing", "P")


@pytest.fixture
def source(tmp_path: Path) -> KernelSource:
    (tmp_path / "demo.cu").write_text(SOURCE)
    return KernelSource(tmp_path / "demo.cu", ())


@pytest.mark.gpu
def test_all_kinds_of_arguments(source: KernelSource, library: KernelLibrary) -> None:
    """Oracle: the values passed."""
    out = torch.zeros(5, device="cuda")
    kernel = library.kernel(source, "store", "PiIqfP")
    kernel(LaunchShape((1,), (1,)), out.data_ptr(), -3, 7, 1 << 20, 0.5, 0)
    assert out.tolist() == [-3, 7, 1 << 20, 0.5, 1]


@pytest.mark.gpu
def test_much_shared_memory(source: KernelSource, library: KernelLibrary) -> None:
    """Oracle: a count; 90 KiB are past the limit without opting in."""
    out, count = torch.zeros(1, device="cuda"), 90 * 256
    kernel = library.kernel(source, "shared_sum", "Pi")
    kernel(LaunchShape((1,), (128,), shared_bytes=4 * count), out.data_ptr(), count)
    assert out.item() == count
    with pytest.raises(DeviceError, match="bytes of dynamic shared memory for shared_sum"):
        kernel.bind(LaunchShape((1,), (128,), shared_bytes=1 << 20))


@pytest.fixture
def hopper(library: KernelLibrary) -> KernelLibrary:
    if library.capability < 90:
        pytest.skip("needs a GPU of compute capability 9.0 or later")
    return library


@pytest.mark.gpu
def test_dependent_launches_keep_their_order_in_a_graph(source: KernelSource, hopper: KernelLibrary) -> None:
    """Oracle: a count of launches and replays."""
    x = torch.zeros(32, device="cuda")
    add = hopper.kernel(source, "add_one", "P").bind(LaunchShape((1,), (32,), dependent=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(100):
            add(x.data_ptr())
    for _ in range(3):
        graph.replay()
    assert x.tolist() == [300.0] * 32


@pytest.mark.gpu
def test_clusters_and_cooperative_launch(source: KernelSource, hopper: KernelLibrary) -> None:
    """Oracle: blocks times blocks per cluster."""
    out = torch.zeros(1, dtype=torch.int32, device="cuda")
    kernel = hopper.kernel(source, "grid_size", "P")
    kernel(LaunchShape((8,), (1,), cluster=(4,)), out.data_ptr())
    kernel(LaunchShape((3,), (1,), cooperative=True), out.data_ptr())
    assert out.item() == 8 * 4 + 3
