"""Loading cubins and launching kernels with the CUDA driver API, on torch's current stream.

    module = load(compiled.cubin)
    kernel = module.kernel(compiled.entries["add"], "PPi")           # two pointers, one int32
    kernel(LaunchShape(grid=(n // 256,), block=(256,)), x.data_ptr(), y.data_ptr(), n)

A launch is asynchronous, allocates nothing and is capturable in a CUDA graph. `Kernel.bind` does all but packing the
arguments once, for launches that repeat. Everything here is imported without a GPU; `load` is what needs one.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from dataclasses import dataclass
from typing import Any

from .errors import DeviceError

Dim3 = tuple[int, ...]
TENSOR_MAP_BYTES = 128
SWIZZLED_COLUMNS = 64

RESERVED_BYTES = 1024
"""Shared memory that the driver adds to each block; an SM has room for one block of the limit and this."""

SMALLEST_SHARED_LIMIT = 99 * 1024
SHARED_LIMITS = {80: 163 * 1024, 87: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 103: 227 * 1024}
"""Compute capability -> bytes of shared memory one block can have, where it is more than the smallest."""

_ARGUMENT_FORMATS = {"P": "Q", "i": "i4x", "I": "I4x", "q": "q", "f": "f4x", "T": f"{TENSOR_MAP_BYTES}s"}


@dataclass(frozen=True)
class LaunchShape:
    """How a kernel is launched.

    grid, block:   1 to 3 sizes; block in threads, grid in blocks.
    shared_bytes:  dynamic shared memory per block; `Kernel.bind` opts into it, which is needed where it and the kernel's
                   static shared memory are more than 48 KiB together.
    cluster:       blocks per cluster (sm_90 and later), () for none.
    dependent:     programmatic dependent launch: the kernel may start before its predecessor in the stream ends, and
                   must wait with `griddepcontrol.wait` before it touches what the predecessor wrote (or still reads).
    cooperative:   all blocks are resident at once, so that a grid-wide barrier is legal.
    """

    grid: Dim3
    block: Dim3
    shared_bytes: int = 0
    cluster: Dim3 = ()
    dependent: bool = False
    cooperative: bool = False


def bindings() -> Any:
    """cuda-python's driver bindings. Raises DeviceError without the package."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise DeviceError(
            f"cuda-python is not installed ({error}); install it with: pip install 'trtc[cuda]'"
        ) from error
    return driver


@functools.cache
def driver() -> Any:
    """`bindings`, initialized. Raises DeviceError when there is no package, driver or GPU."""
    cuda = bindings()
    try:
        (status,) = cuda.cuInit(0)
    except RuntimeError as error:
        raise DeviceError(
            f"no CUDA driver on this machine ({error}); running kernels needs an NVIDIA GPU"
        ) from error
    if status.value != 0:
        raise DeviceError(
            f"no usable CUDA GPU on this machine (cuInit: {status.name}); running kernels needs one"
        )
    return cuda


def check(result: tuple[Any, ...], what: str) -> Any:
    """The values of a driver call, or DeviceError saying `what` failed and why."""
    status, *values = result
    if status.value != 0:
        _, text = driver().cuGetErrorString(status)
        raise DeviceError(f"{what}: {status.name} ({text.decode() if text else 'no description'})")
    return values[0] if len(values) == 1 else tuple(values)


def architecture(device: int = 0) -> str:
    """`sm_90` for a GPU of compute capability 9.0."""
    cuda = driver()
    attributes = cuda.CUdevice_attribute
    handle = check(cuda.cuDeviceGet(device), f"CUDA device {device}")
    major, minor = (
        check(cuda.cuDeviceGetAttribute(attribute, handle), f"compute capability of CUDA device {device}")
        for attribute in (
            attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        )
    )
    return f"sm_{major}{minor}"


@functools.cache
def primary_context(device: int = 0) -> Any:
    """The context of `device` that torch uses too. The first call of a process makes it, which takes the driver a while.

    Raises DeviceError as `driver` does, and when the GPU is taken.
    """
    cuda = driver()
    handle = check(cuda.cuDeviceGet(device), f"CUDA device {device}")
    return check(cuda.cuDevicePrimaryCtxRetain(handle), f"context of CUDA device {device}")


def load(cubin: bytes, device: int = 0) -> Module:
    """Load a cubin (or PTX) into the primary context of `device`, the one torch uses.

    Raises DeviceError without a GPU, or when the code is for another architecture.
    """
    cuda = driver()
    check(cuda.cuCtxSetCurrent(primary_context(device)), f"context of CUDA device {device}")
    what = f"loading {len(cubin)} bytes of machine code on {architecture(device)}"
    return Module(check(cuda.cuModuleLoadData(cubin), what), device)


class Module:
    """Machine code on one device; lives as long as the process."""

    def __init__(self, handle: Any, device: int) -> None:
        self._handle = handle
        self.device = device

    def kernel(self, lowered_name: str, signature: str) -> Kernel:
        """A kernel by its lowered name.

        signature: one letter an argument: P pointer, i int32, I uint32, q int64, f float32, T tensor map (`tensor_map`).
        """
        what = f"kernel {lowered_name}"
        function = check(driver().cuModuleGetFunction(self._handle, lowered_name.encode()), what)
        return Kernel(function, lowered_name, signature)


class Kernel:
    """A loaded kernel and the types of its arguments."""

    def __init__(self, function: Any, name: str, signature: str) -> None:
        self._function = function
        self._shared_limit = 0
        self._bound: dict[LaunchShape, BoundKernel] = {}
        self.name = name
        self.signature = signature

    def __call__(self, shape: LaunchShape, *arguments: float | bytes) -> None:
        """Launch on torch's current stream. Pointers are integers (`tensor.data_ptr()`; 0 is null)."""
        self.bind(shape)(*arguments)

    def bind(self, shape: LaunchShape) -> BoundKernel:
        """The kernel with a fixed launch shape; cached. Not safe for two threads at once (one argument buffer)."""
        bound = self._bound.get(shape)
        if bound is None:
            self._allow_shared(shape.shared_bytes)
            bound = self._bound[shape] = BoundKernel(self._function, self.name, self.signature, shape)
        return bound

    def _allow_shared(self, shared_bytes: int) -> None:
        if shared_bytes <= self._shared_limit:
            return
        cuda = driver()
        attribute = cuda.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        what = f"{shared_bytes} bytes of dynamic shared memory for {self.name}"
        check(cuda.cuFuncSetAttribute(self._function, attribute, shared_bytes), what)
        self._shared_limit = shared_bytes


class BoundKernel:
    """A kernel with a fixed launch shape and a reused argument buffer; calling it launches it."""

    def __init__(self, function: Any, name: str, signature: str, shape: LaunchShape) -> None:
        self._driver = driver()
        self._function = function
        self._name = name
        self._config, self._attributes = _launch_config(shape)
        formats = [_ARGUMENT_FORMATS[letter] for letter in signature]
        self._packer = struct.Struct("=" + "".join(formats))
        # The driver copies the arguments out of this buffer during the call, so that it can be reused at once.
        self._arguments = ctypes.create_string_buffer(max(self._packer.size, 1))
        start = ctypes.addressof(self._arguments)
        offsets = [struct.calcsize("=" + "".join(formats[:index])) for index in range(len(formats))]
        self._pointers = (ctypes.c_void_p * len(formats))(*(start + offset for offset in offsets))
        self._pointers_address = ctypes.addressof(self._pointers)

    def __call__(self, *arguments: float | bytes) -> None:
        self._packer.pack_into(self._arguments, 0, *arguments)
        self._config.hStream = current_stream()
        (status,) = self._driver.cuLaunchKernelEx(self._config, self._function, self._pointers_address, 0)
        if status != 0:  # an int; its `value` takes as long as five such comparisons
            check((status,), f"launch of {self._name}")


@functools.lru_cache(maxsize=65536)
def tensor_map(address: int, dtype: str, rows: int, columns: int, box_rows: int) -> bytes:
    """The copy engine's description of a row-major matrix [rows, columns] of 16-bit elements (sm_90 and later).

    A box is `box_rows` rows of 64 columns, in 128-byte swizzle, zeros beyond the matrix.
    dtype: "float16" or "bfloat16". `address` is a multiple of 16, `columns` of 8. Raises DeviceError without a GPU.
    """
    cuda = driver()
    kinds = cuda.CUtensorMapDataType
    data_type = {
        "float16": kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        "bfloat16": kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
    }[dtype]
    size, one = cuda.cuuint64_t, cuda.cuuint32_t
    result = cuda.cuTensorMapEncodeTiled(
        data_type, 2, address, [size(columns), size(rows)], [size(2 * columns)],
        [one(SWIZZLED_COLUMNS), one(box_rows)], [one(1), one(1)],
        cuda.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        cuda.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        cuda.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        cuda.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )  # fmt: skip
    encoded = check(result, f"tensor map of a [{rows}, {columns}] {dtype} matrix")
    return ctypes.string_at(int(encoded.getPtr()), TENSOR_MAP_BYTES)


def current_stream() -> int:
    """The handle of torch's current stream on its current device."""
    import torch

    # What Triton and torch's own compiler call: `torch.cuda.current_stream` makes an object for each answer, and a prompt's
    # step asks hundreds of times.
    return int(torch._C._cuda_getCurrentRawStream(torch._C._cuda_getDevice()))


def _launch_config(shape: LaunchShape) -> tuple[Any, list[Any]]:
    """A filled CUlaunchConfig and its attributes, which must live as long as it does."""
    cuda = driver()
    config = cuda.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = _three(shape.grid)
    config.blockDimX, config.blockDimY, config.blockDimZ = _three(shape.block)
    config.sharedMemBytes = shape.shared_bytes
    attributes = list(_launch_attributes(cuda, shape))
    config.attrs = attributes
    config.numAttrs = len(attributes)
    return config, attributes


def _launch_attributes(cuda: Any, shape: LaunchShape) -> Any:
    kinds = cuda.CUlaunchAttributeID
    if shape.cluster:
        attribute = _attribute(cuda, kinds.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION)
        dimension = attribute.value.clusterDim
        dimension.x, dimension.y, dimension.z = _three(shape.cluster)
        yield attribute
    if shape.dependent:
        attribute = _attribute(cuda, kinds.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION)
        attribute.value.programmaticStreamSerializationAllowed = 1
        yield attribute
    if shape.cooperative:
        attribute = _attribute(cuda, kinds.CU_LAUNCH_ATTRIBUTE_COOPERATIVE)
        attribute.value.cooperative = 1
        yield attribute


def _attribute(cuda: Any, kind: Any) -> Any:
    attribute = cuda.CUlaunchAttribute()
    attribute.id = kind
    return attribute


def _three(sizes: Dim3) -> tuple[int, int, int]:
    x, y, z = (*sizes, 1, 1)[:3]
    return x, y, z
