"""NVRTC: code, resource reports, cache and errors. Needs cuda-python and NVRTC, no GPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from trtc.kernels import nvrtc
from trtc.kernels.errors import DeviceError, KernelCompileError
from trtc.kernels.nvrtc import CompiledKernel, KernelSource, ResourceUsage, compile_kernel, parse_ptxas_log

KERNEL = """
#include "scale.cuh"
namespace demo {
template <typename T> __global__ void scale(T* x) { __shared__ T copy[32]; copy[threadIdx.x] = x[threadIdx.x];
    __syncthreads(); x[threadIdx.x] = copy[31 - threadIdx.x] * kScale * EXTRA; }
}
extern "C" __global__ void plain(int* x) { x[0] = 1; }
"""


@pytest.fixture(autouse=True)
def nvrtc_is_there() -> None:
    try:
        nvrtc.compiler_version()
        nvrtc.cuda_include_dirs()
    except DeviceError as error:
        pytest.skip(str(error))


@pytest.fixture
def source(tmp_path: Path) -> KernelSource:
    (tmp_path / "scale.cuh").write_text("constexpr int kScale = 3;\n")
    (tmp_path / "demo.cu").write_text(KERNEL)
    return KernelSource(tmp_path / "demo.cu", ("demo::scale<float>", "plain"))


def test_a_library_that_does_not_load_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: by hand. cuda-python's own message goes on for lines."""

    def fails() -> None:
        raise RuntimeError("no libnvrtc.so.13\nlooked in:\n  /usr/lib")

    monkeypatch.setattr(nvrtc, "_nvrtc", lambda: SimpleNamespace(nvrtcVersion=fails))
    with pytest.raises(DeviceError) as error:
        nvrtc.compiler_version.__wrapped__()
    assert (
        str(error.value)
        == "NVRTC does not load (no libnvrtc.so.13); install it with: pip install 'trtc[cuda]'"
    )


def test_template_and_plain_entries(source: KernelSource) -> None:
    """Oracle: the Itanium name mangling, and the shared memory that the source declares."""
    compiled = compile_kernel(source, {"EXTRA": 2}, "sm_90")
    assert compiled.entries == {"demo::scale<float>": "_ZN4demo5scaleIfEEvPT_", "plain": "plain"}
    assert compiled.cubin.startswith(b"\x7fELF")
    assert b".entry _ZN4demo5scaleIfEEvPT_" in compiled.ptx
    usage = compiled.resources["demo::scale<float>"]
    assert usage.shared_bytes == 32 * 4 and usage.spill_store_bytes == 0 and usage.registers > 0


def test_virtual_architecture_gives_ptx_only(source: KernelSource) -> None:
    """Oracle: NVRTC's documentation: no cubin for compute_XX."""
    compiled = compile_kernel(source, {"EXTRA": 2}, "compute_80")
    assert compiled.cubin == b"" and compiled.resources == {} and b".target sm_80" in compiled.ptx


def test_an_empty_log_leaves_the_interpreter_alone(source: KernelSource) -> None:
    """Oracle: the one object that Python has for the byte of a space, into which NVRTC once wrote the empty log."""
    compile_kernel(source, {"EXTRA": 4}, "compute_80")
    assert ord(b" ") == 32 and bytes([0x20, 0x20, 0x20]) == b"\x20" * 3


def test_error_names_file_architecture_and_first_error(source: KernelSource) -> None:
    """Oracle: the text; EXTRA is not defined."""
    with pytest.raises(KernelCompileError) as caught:
        compile_kernel(source, {}, "sm_80")
    first = str(caught.value).splitlines()[0]
    assert first.startswith("demo.cu does not compile for sm_80") and '"EXTRA" is undefined' in first


def test_missing_header_and_missing_file(source: KernelSource, tmp_path: Path) -> None:
    """Oracle: the text."""
    (tmp_path / "scale.cuh").unlink()
    with pytest.raises(KernelCompileError, match=r'demo.cu: #include "scale.cuh" is neither'):
        compile_kernel(source, {"EXTRA": 2})
    with pytest.raises(KernelCompileError, match="does not exist"):
        compile_kernel(KernelSource(tmp_path / "none.cu", ()), {})


def test_key_depends_on_everything_that_makes_the_code(source: KernelSource, tmp_path: Path) -> None:
    """Oracle: one key per different input."""
    keys = {
        compile_kernel(source, {"EXTRA": 2}, "sm_90").key,
        compile_kernel(source, {"EXTRA": 4}, "sm_90").key,
        compile_kernel(source, {"EXTRA": 2}, "sm_80").key,
        compile_kernel(source, {"EXTRA": 2}, "sm_90", flags=("--use_fast_math",)).key,
    }
    (tmp_path / "scale.cuh").write_text("constexpr int kScale = 5;\n")
    keys.add(compile_kernel(source, {"EXTRA": 2}, "sm_90").key)
    assert len(keys) == 5


def test_disk_cache_serves_and_distrusts(
    source: KernelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the first result; a damaged entry is compiled again instead of used."""
    folder = tmp_path / "cache"
    first = compile_kernel(source, {"EXTRA": 7}, "sm_90", cache_dir=folder)
    assert {file.suffix for file in folder.iterdir()} == {".cubin", ".ptx", ".json"}

    compilations: list[str] = []
    compile_for_real = nvrtc._compile
    monkeypatch.setattr(nvrtc, "_memory_cache", {})

    def count_and_compile(*arguments: Any) -> CompiledKernel:
        compilations.append(arguments[-1])
        return compile_for_real(*arguments)

    monkeypatch.setattr(nvrtc, "_compile", count_and_compile)
    assert compile_kernel(source, {"EXTRA": 7}, "sm_90", cache_dir=folder) == first
    assert compilations == []

    nvrtc._memory_cache.clear()
    (folder / f"{first.key}.cubin").write_bytes(b"damaged")
    assert compile_kernel(source, {"EXTRA": 7}, "sm_90", cache_dir=folder).cubin == first.cubin
    assert compilations == [first.key]


def test_same_source_twice_is_reported_twice(source: KernelSource, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the first report. Beside a driver, NVRTC has a cache of its own that leaves the second without one."""
    first = compile_kernel(source, {"EXTRA": 9}, "sm_90")
    monkeypatch.setattr(nvrtc, "_memory_cache", {})
    again = compile_kernel(source, {"EXTRA": 9}, "sm_90")
    assert again is not first and again.resources == first.resources


def test_parse_ptxas_log() -> None:
    """Oracle: a log as ptxas 13.0 prints it, with numbers made distinct."""
    log = (
        "ptxas info    : 0 bytes gmem\n"
        "ptxas info    : Compiling entry function '_Z1k' for 'sm_90a'\n"
        "ptxas info    : Function properties for _Z1k\n"
        "ptxas         .     56 bytes stack frame, 40 bytes spill stores, 104 bytes spill loads\n"
        "ptxas info    : Used 128 registers, used 1 barriers, 512 bytes smem\n"
        "ptxas info    : Compiling entry function 'plain' for 'sm_90a'\n"
        "ptxas info    : Function properties for plain\n"
        "ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 8 registers, used 0 barriers\n"
    )
    assert parse_ptxas_log(log) == {
        "_Z1k": ResourceUsage(128, 512, 40, 104, 56),
        "plain": ResourceUsage(8, 0, 0, 0, 0),
    }


def test_hopper_is_compiled_with_its_own_instructions() -> None:
    """Oracle: the CUDA programming guide: wgmma needs sm_90a."""
    assert [nvrtc.compile_target(arch) for arch in ("sm_80", "sm_90", "sm_120")] == [
        "sm_80",
        "sm_90a",
        "sm_120",
    ]
