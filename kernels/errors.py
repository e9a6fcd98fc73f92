"""Errors of the kernel room. `core/targets` and `runtime` turn them into the user-facing `TrtcError`s."""

from __future__ import annotations


class KernelError(Exception):
    """Base of all errors of this room; the first line of the message says everything needed to act."""


class KernelCompileError(KernelError):
    """NVRTC refused a source; the lines after the first are its log."""


class KernelContractError(KernelError):
    """Arguments of a kernel do not fit its contract (shape, dtype, device, stride, alignment)."""


class DeviceError(KernelError):
    """The CUDA driver, a GPU or cuda-python is missing, or the driver refused a call."""
