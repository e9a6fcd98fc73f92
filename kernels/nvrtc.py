"""Ahead-of-time compilation of CUDA C++ with NVRTC, through cuda-python. Needs no GPU and no CUDA toolkit.

`compile_kernel` turns one `.cu` file into a cubin and its PTX for one architecture and reports what each entry costs
(registers, shared memory, spills) as ptxas printed it. Results are kept in memory, and on disk when a cache directory
is given or `TRTC_KERNEL_CACHE` names one.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .errors import DeviceError, KernelCompileError

KERNELS_ROOT = Path(__file__).resolve().parent
CACHE_VARIABLE = "TRTC_KERNEL_CACHE"
BASE_FLAGS = ("--std=c++17", "--ptxas-options=-v", "--no-cache")
"""NVRTC's own cache is off: what comes out of it has no report of resources."""
CI_ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_120")

Defines = Mapping[str, str | int]


def compile_target(arch: str) -> str:
    """The architecture to compile for so that code runs on `arch`: sm_90a, which has wgmma, for sm_90; else `arch`."""
    return "sm_90a" if arch == "sm_90" else arch


@dataclass(frozen=True)
class KernelSource:
    """One CUDA C++ file and the kernels wanted from it.

    path:    the `.cu` file; `#include "common/x.cuh"` resolves against `kernels/`, other quotes against its folder.
    entries: names of kernels: plain names of `extern "C"` kernels, or name expressions of templates such as
             `trtc::layer_norm<__half, 256>`.
    """

    path: Path
    entries: tuple[str, ...]

    @property
    def name(self) -> str:
        """`linear/linear.cu` for a file of this room, else the file name."""
        path = self.path.resolve()
        return str(path.relative_to(KERNELS_ROOT)) if path.is_relative_to(KERNELS_ROOT) else path.name


@dataclass(frozen=True)
class ResourceUsage:
    """What ptxas says one entry costs: registers per thread, bytes of static shared memory, bytes of local memory."""

    registers: int
    shared_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int
    stack_bytes: int


@dataclass(frozen=True)
class CompiledKernel:
    """Machine code of one source for one architecture.

    arch:      `sm_90` (cubin and PTX) or `compute_90` (PTX only: `cubin` and `resources` are empty).
    cubin:     what `launch.load` takes and an engine stores.
    ptx:       what TensorRT's ahead-of-time plugins take.
    entries:   name asked for -> lowered (mangled) name in cubin and PTX.
    resources: name asked for -> ResourceUsage.
    key:       hex digest of source, headers, defines, arch, flags and compiler version.
    """

    arch: str
    cubin: bytes = field(repr=False)
    ptx: bytes = field(repr=False)
    entries: Mapping[str, str]
    resources: Mapping[str, ResourceUsage]
    key: str


def compile_kernel(
    source: KernelSource,
    defines: Defines | None = None,
    arch: str = "sm_90",
    *,
    flags: tuple[str, ...] = (),
    cache_dir: Path | None = None,
) -> CompiledKernel:
    """Compile `source` with `-D` defines for `arch` (`sm_80`, `sm_90a`, ..., or `compute_80` for PTX only).

    Raises KernelCompileError (first line: file, arch, first error; then the NVRTC log), DeviceError without NVRTC.
    """
    headers = _headers_of(source.path)
    options = _options(defines or {}, arch, flags)
    key = _cache_key(source, headers, options)
    directory = cache_dir or _cache_dir_from_environment()
    compiled = _memory_cache.get(key) or (directory and _read_cache(directory, key))
    if not compiled:
        compiled = _compile(source, headers, options, arch, key)
        if directory:
            _write_cache(directory, compiled)
    _memory_cache[key] = compiled
    return compiled


_memory_cache: dict[str, CompiledKernel] = {}


# ---------------------------------------------------------------------------------------------- sources and options

_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)


def _headers_of(path: Path) -> dict[str, str]:
    """Text of every quoted include reachable from `path`, by the name it is included with."""
    if not path.is_file():
        raise KernelCompileError(f"kernel source {path} does not exist")
    headers: dict[str, str] = {}
    pending = [path]
    while pending:
        file = pending.pop()
        for name in _INCLUDE.findall(file.read_text()):
            if name not in headers:
                found = _find_header(name, file)
                headers[name] = found.read_text()
                pending.append(found)
    return headers


def _find_header(name: str, included_from: Path) -> Path:
    for folder in (included_from.parent, KERNELS_ROOT):
        if (folder / name).is_file():
            return folder / name
    raise KernelCompileError(f'{included_from}: #include "{name}" is neither beside it nor under kernels/')


def _options(defines: Defines, arch: str, flags: Iterable[str]) -> tuple[str, ...]:
    macros = (f"-D{name}={value}" for name, value in sorted(defines.items()))
    return (f"--gpu-architecture={arch}", *BASE_FLAGS, *flags, *macros)


def _cache_key(source: KernelSource, headers: Mapping[str, str], options: tuple[str, ...]) -> str:
    parts = [source.path.read_text(), sorted(headers.items()), source.entries, options, compiler_version()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------------------ NVRTC


@functools.cache
def _nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise DeviceError(
            f"NVRTC is not available ({error}); install it with: pip install 'trtc[cuda]'"
        ) from error
    return nvrtc


@functools.cache
def compiler_version() -> tuple[int, int]:
    """(major, minor) of the NVRTC in use. Raises DeviceError when there is none."""
    try:
        _, major, minor = _nvrtc().nvrtcVersion()
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]  # the loader of libraries goes on for lines
        raise DeviceError(
            f"NVRTC does not load ({reason}); install it with: pip install 'trtc[cuda]'"
        ) from error
    return major, minor


@functools.cache
def cuda_include_dirs() -> tuple[Path, ...]:
    """Folders that hold CUDA's own headers (cuda_fp16.h): the pip packages', else those of an installed toolkit."""
    candidates = [Path(folder) / "include" for folder in _nvidia_wheel_folders()]
    candidates += [
        Path(os.environ[name]) / "include" for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ
    ]
    if compiler := shutil.which("nvcc"):
        candidates.append(Path(compiler).resolve().parent.parent / "include")
    for folder in candidates:
        if (folder / "cuda_fp16.h").is_file():
            return (folder, folder / "cccl")
    raise DeviceError(
        "CUDA headers (cuda_fp16.h) were not found; install them with: pip install 'trtc[cuda]'"
    )


def _nvidia_wheel_folders() -> list[str]:
    if importlib.util.find_spec("nvidia") is None:
        return []
    spec = importlib.util.find_spec("nvidia.cu13")
    return list(spec.submodule_search_locations or []) if spec else []


def _check(result: tuple[Any, ...]) -> Any:
    """The values of an NVRTC call. NVRTC fails here only when it is misused or out of memory."""
    status, *values = result
    if status.value != 0:
        raise KernelCompileError(f"NVRTC call failed: {status.name}")
    return values[0] if len(values) == 1 else tuple(values)


def _compile(
    source: KernelSource, headers: Mapping[str, str], options: tuple[str, ...], arch: str, key: str
) -> CompiledKernel:
    nvrtc = _nvrtc()
    texts = [text.encode() for text in headers.values()]
    names = [name.encode() for name in headers]
    program = _check(
        nvrtc.nvrtcCreateProgram(source.path.read_bytes(), source.name.encode(), len(texts), texts, names)
    )
    try:
        for entry in source.entries:
            _check(nvrtc.nvrtcAddNameExpression(program, entry.encode()))
        includes = [f"-I{folder}" for folder in cuda_include_dirs()]
        arguments = [option.encode() for option in (*options, *includes)]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(arguments), arguments)
        log = _read_text(program, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog)
        if status.value != 0:
            raise KernelCompileError(_compile_message(source, options, arch, status.name, log))
        entries = {
            name: _check(nvrtc.nvrtcGetLoweredName(program, name.encode())).decode()
            for name in source.entries
        }
        cubin = b""
        if arch.startswith("sm_"):
            cubin = _read_bytes(program, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)
        ptx = _read_bytes(program, nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX)
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    usage = parse_ptxas_log(log)
    resources = {name: usage[lowered] for name, lowered in entries.items()} if cubin else {}
    return CompiledKernel(arch, cubin, ptx, entries, resources, key)


def _read_bytes(program: Any, size_of: Any, read: Any) -> bytes:
    size = int(_check(size_of(program)))
    # One byte more: `b" " * 1` would be the interpreter's own object for that byte, and NVRTC writes an empty log into it.
    buffer = b" " * (size + 1)
    _check(read(program, buffer))
    return buffer[:size]


def _read_text(program: Any, size_of: Any, read: Any) -> str:
    return _read_bytes(program, size_of, read).rstrip(b"\0 ").decode(errors="replace")


def _compile_message(source: KernelSource, options: tuple[str, ...], arch: str, status: str, log: str) -> str:
    errors = [line for line in log.splitlines() if "error" in line]
    defines = " ".join(option for option in options if option.startswith("-D"))
    return f"{source.name} does not compile for {arch} ({defines}): {errors[0] if errors else status}\n{log}"


# ------------------------------------------------------------------------------------------------- resource reports

_ENTRY = re.compile(r"Function properties for (\S+)")
_LOCAL = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


def parse_ptxas_log(log: str) -> dict[str, ResourceUsage]:
    """Lowered kernel name -> ResourceUsage, from what `--ptxas-options=-v` prints."""
    usage: dict[str, ResourceUsage] = {}
    name, local = "", (0, 0, 0)
    for line in log.splitlines():
        if match := _ENTRY.search(line):
            name = match[1]
        elif match := _LOCAL.search(line):
            local = (int(match[1]), int(match[2]), int(match[3]))
        elif match := _USED.search(line):
            shared = _SHARED.search(line)
            stack, stores, loads = local
            usage[name] = ResourceUsage(int(match[1]), int(shared[1]) if shared else 0, stores, loads, stack)
    return usage


# ------------------------------------------------------------------------------------------------------- disk cache


def _cache_dir_from_environment() -> Path | None:
    folder = os.environ.get(CACHE_VARIABLE)
    return Path(folder) if folder else None


def _write_cache(directory: Path, compiled: CompiledKernel) -> None:
    """Write one entry atomically: cubin, PTX and then the JSON that makes the entry visible."""
    directory.mkdir(parents=True, exist_ok=True)
    meta = {
        "arch": compiled.arch,
        "entries": dict(compiled.entries),
        "resources": {name: asdict(usage) for name, usage in compiled.resources.items()},
        "digest": _digest(compiled.cubin, compiled.ptx),
    }
    files = {"cubin": compiled.cubin, "ptx": compiled.ptx, "json": json.dumps(meta, indent=1).encode()}
    for suffix, content in files.items():
        with tempfile.NamedTemporaryFile(dir=directory, delete=False) as file:
            file.write(content)
        os.replace(file.name, directory / f"{compiled.key}.{suffix}")


def _read_cache(directory: Path, key: str) -> CompiledKernel | None:
    """The entry `key`, or None when it is absent or its files do not match its digest."""
    base = directory / key
    if not base.with_suffix(".json").is_file():
        return None
    meta = json.loads(base.with_suffix(".json").read_text())
    cubin, ptx = base.with_suffix(".cubin").read_bytes(), base.with_suffix(".ptx").read_bytes()
    if meta["digest"] != _digest(cubin, ptx):
        return None
    resources = {name: ResourceUsage(**usage) for name, usage in meta["resources"].items()}
    return CompiledKernel(meta["arch"], cubin, ptx, meta["entries"], resources, key)


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()
