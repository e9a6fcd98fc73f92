"""The CUDA target: the project's own kernels, compiled ahead of time; large products through cuBLASLt (torch).

An engine carries machine code for the architectures it was built for and is loaded without a compiler. Nothing here needs
a GPU except `program`.
"""

from .target import TARGET

__all__ = ["TARGET"]
