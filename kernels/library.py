"""The kernels of one GPU: taken from machine code that an engine carries, or compiled on first use.

Launchers ask a library for their kernels, so that they do not care where machine code comes from:

    library = KernelLibrary()                              # development: NVRTC, cached
    library = KernelLibrary(precompiled=engine_kernels)    # an engine: nothing is compiled
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from . import launch
from .errors import DeviceError
from .nvrtc import CompiledKernel, Defines, KernelSource, compile_kernel, compile_target

_Key = tuple[str, tuple[tuple[str, str], ...], str]


class KernelLibrary:
    """Loaded kernels of one device.

    device:      CUDA ordinal.
    precompiled: (source, defines, machine code) of everything that may be asked for. When given, a kernel that is
                 not among them is a DeviceError; when None, it is compiled for this device.
    """

    def __init__(
        self,
        device: int = 0,
        precompiled: Iterable[tuple[KernelSource, Defines, CompiledKernel]] | None = None,
    ) -> None:
        self.device = device
        self._compiles = precompiled is None
        self._code: dict[_Key, CompiledKernel] = {}
        self._modules: dict[str, launch.Module] = {}
        self._kernels: dict[tuple[_Key, str], launch.Kernel] = {}
        for source, defines, compiled in precompiled or ():
            for entry in source.entries:
                self._code[_key(source, defines, entry)] = compiled

    @functools.cached_property
    def arch(self) -> str:
        """`sm_90` for a GPU of compute capability 9.0."""
        return launch.architecture(self.device)

    @functools.cached_property
    def capability(self) -> int:
        """90 for compute capability 9.0. From 90 on there are clusters and programmatic dependent launch."""
        return int(self.arch.removeprefix("sm_"))

    @property
    def target(self) -> str:
        """What to compile for: `sm_90a`, with Hopper's own instructions, on sm_90; else `arch`."""
        return compile_target(self.arch)

    @functools.cached_property
    def multiprocessors(self) -> int:
        """Streaming multiprocessors: 132 on an H200."""
        return self._attribute("MULTIPROCESSOR_COUNT")

    @functools.cached_property
    def shared_limit(self) -> int:
        """Most bytes of dynamic shared memory one block can have."""
        return self._attribute("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN")

    def kernel(
        self, source: KernelSource, entry: str, signature: str, defines: Defines | None = None
    ) -> launch.Kernel:
        """The kernel `entry` of `source`, loaded. `signature` is that of `launch.Module.kernel`."""
        key = _key(source, defines or {}, entry)
        kernel = self._kernels.get((key, signature))
        if kernel is None:
            code = self._code.get(key) or self._compile(source, defines or {}, entry)
            self._code[key] = code
            kernel = self._module(code).kernel(code.entries[entry], signature)
            self._kernels[key, signature] = kernel
        return kernel

    def bind(
        self, source: KernelSource, entry: str, signature: str, shape: launch.LaunchShape
    ) -> launch.BoundKernel:
        """`kernel` with a fixed launch shape, not `dependent` where the GPU knows no such launch."""
        if self.capability < 90:
            shape = replace(shape, dependent=False)
        return self.kernel(source, entry, signature).bind(shape)

    def _compile(self, source: KernelSource, defines: Defines, entry: str) -> CompiledKernel:
        if not self._compiles:
            raise DeviceError(
                f"the engine carries no kernel {entry} of {source.name}; build it again for {self.arch}"
            )
        return compile_kernel(KernelSource(source.path, (entry,)), defines, self.target)

    def _module(self, code: CompiledKernel) -> launch.Module:
        if code.key not in self._modules:
            self._modules[code.key] = launch.load(code.cubin, self.device)
        return self._modules[code.key]

    def _attribute(self, name: str) -> int:
        cuda: Any = launch.driver()
        handle = launch.check(cuda.cuDeviceGet(self.device), f"CUDA device {self.device}")
        attribute = getattr(cuda.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(launch.check(cuda.cuDeviceGetAttribute(attribute, handle), name))


def _key(source: KernelSource, defines: Defines, entry: str) -> _Key:
    return source.name, tuple(sorted((name, str(value)) for name, value in defines.items())), entry
