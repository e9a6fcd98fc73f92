"""A TensorRT plan on a GPU: memory, bindings by name, CUDA graphs, and TensorRT's own reasons when it fails."""

from __future__ import annotations

import ctypes
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..core.dtypes import DType, to_torch
from ..core.engine import Engine
from ..core.errors import TargetError
from ..core.targets.tensorrt.build_log import build_log
from ..core.targets.tensorrt.flavour import Flavour, find_flavour
from .tensorrt_steps import DECODE, PackedBatch, PaddedBatch

if TYPE_CHECKING:
    from .distributed import RankGroup

Batch = PaddedBatch | PackedBatch

DTYPES = {"FLOAT": DType.FLOAT32, "HALF": DType.FLOAT16, "BF16": DType.BFLOAT16, "INT32": DType.INT32}
"""TensorRT's names of the types of a plan's inputs and outputs."""


class TensorRTSession:
    """A `PlanSession` on the current GPU, for one rank of the engine.

    Every shape of a decode batch has an execution context of its own and, where TensorRT says that it can be captured,
    a CUDA graph: changing a context would void its graph. Contexts share one activation memory, as one runs at a time.
    """

    def __init__(self, engine: Engine, num_rows: int, group: RankGroup | None = None) -> None:
        """num_rows: of the KV memory, sequences or pages.
        group: the ranks of the job, for an engine of several; all run the same batches in the same order.

        Raises TargetError when there is no TensorRT of the plan's flavour, no GPU that it is for, or no memory."""
        assert len(engine.ranks) == 1 or group is not None, "ranks that cannot talk to each other"
        self._artifacts = engine.ranks[0 if group is None else group.rank].artifacts
        self._group = group
        flavour = find_flavour(self._artifacts["flavour"])
        require_gpu(engine.path, flavour, self._artifacts["compute_capabilities"], _gpu_capability())
        self._trt, self._log = flavour.trt, build_log(flavour.trt)
        self._device = torch.device("cuda", torch.cuda.current_device())
        self._runtime = self._trt.Runtime(self._log.logger)
        path = engine.path / self._artifacts["plan"]
        self._plan = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._plan is None:
            raise TargetError(
                f"{path}: {flavour} cannot load the plan, built by {self._artifacts['version']}: {self._log.reasons()}"
            )
        self._path = path
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        try:
            self._caches = self._allocate_caches(num_rows)
            self._memory = torch.empty(
                max(self._plan.device_memory_size_v2, 1), dtype=torch.uint8, device=self._device
            )
        except torch.OutOfMemoryError:
            raise TargetError(
                f"{engine.path}: plan and KV memory do not fit the GPU; give less "
                f"--kv-cache-memory-bytes, or build with a smaller --max-batch-size or --max-seq-len"
            ) from None
        self._shapes: dict[tuple[tuple[int, ...], ...], _Shape] = {}
        self._prefill: Any = None

    def _allocate_caches(self, num_rows: int) -> dict[str, torch.Tensor]:
        """Zeros: what is masked must be finite."""
        return {
            name: torch.zeros(num_rows, *shape[1:], dtype=to_torch(DTYPES[dtype]), device=self._device)
            for name, (dtype, shape) in self._artifacts["inputs"].items()
            if name.startswith(("k_cache.", "v_cache."))
        }

    def run(self, batch: Batch) -> torch.Tensor:
        """See `PlanSession.run`."""
        limited: AbstractContextManager[None] = (
            nullcontext() if self._group is None else self._group.device_work()
        )
        with limited, torch.cuda.stream(self._stream):
            ready = self._decode_shape(batch) if batch.profile == DECODE else self._prefill_shape(batch)
            for name, tensor in ready.inputs.items():
                tensor.copy_(torch.from_numpy(batch.inputs[name]).pin_memory(), non_blocking=True)
            self._execute(ready)
            self._stream.synchronize()
        return ready.logits

    def _decode_shape(self, batch: Batch) -> _Shape:
        key = tuple(array.shape for array in batch.inputs.values())
        if key not in self._shapes:
            self._shapes[key] = self._shape(batch, self._context(DECODE))
        return self._shapes[key]

    def _prefill_shape(self, batch: Batch) -> _Shape:
        """Prompts seldom repeat a shape: their context is bound anew for each."""
        if self._prefill is None:
            self._prefill = self._context(batch.profile)
        return self._shape(batch, self._prefill, repeats=False)

    def _context(self, profile: str) -> Any:
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._plan.create_execution_context(strategy)
        if context is None:
            raise self._failed("no execution context")
        names = [one["name"] for one in self._artifacts["profiles"]]
        context.set_optimization_profile_async(names.index(profile), self._stream.cuda_stream)
        context.set_device_memory(self._memory.data_ptr(), self._memory.numel())
        # Collective: the ranks run the same batches, so that each makes its contexts in the same order.
        if self._group is not None and not context.set_communicator(
            _capsule(self._group.nccl_communicator())
        ):
            raise self._failed("the communicator of the ranks is refused")
        return context

    def _shape(self, batch: Batch, context: Any, *, repeats: bool = True) -> _Shape:
        """`context` bound to buffers of the sizes of `batch` and to its rows of the caches."""
        inputs = {
            name: torch.empty(array.shape, dtype=torch.int32, device=self._device)
            for name, array in batch.inputs.items()
        }
        logits_name = self._artifacts["logits"]
        dtype, shape = self._artifacts["outputs"][logits_name]
        size = (len(batch.inputs["logits_index"]), shape[-1])
        logits = torch.empty(size, dtype=to_torch(DTYPES[dtype]), device=self._device)
        caches = {name: cache[batch.cache_rows] for name, cache in self._caches.items()}
        self._bind(context, {**inputs, **caches}, {logits_name: logits})
        return _Shape(context, inputs, logits, repeats)

    def _bind(self, context: Any, inputs: dict[str, torch.Tensor], outputs: dict[str, torch.Tensor]) -> None:
        """By name, as the engine describes them; a cache's output is its input."""
        for name in self._artifacts["inputs"]:
            tensor = inputs[name]
            if not context.set_input_shape(name, tuple(tensor.shape)):
                raise self._failed(f"input {name} of shape {list(tensor.shape)} is refused")
            context.set_tensor_address(name, tensor.data_ptr())
        for name in self._artifacts["outputs"]:
            known = outputs[name] if name in outputs else inputs[name.removesuffix(".updated")]
            context.set_tensor_address(name, known.data_ptr())

    def _execute(self, ready: _Shape) -> None:
        if ready.graph is not None:
            ready.graph.replay()
            return
        self._enqueue(ready.context)
        # The first run settles what a context defers; what is captured after it can be replayed.
        capturable = getattr(ready.context, "is_stream_capturable", None)  # not in the data-centre API
        if ready.repeats and capturable is not None and capturable(self._stream.cuda_stream):
            self._stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self._stream):
                self._enqueue(ready.context)
            ready.graph = graph

    def _enqueue(self, context: Any) -> None:
        if not context.execute_async_v3(self._stream.cuda_stream):
            raise self._failed("the step failed")

    def _failed(self, what: str) -> TargetError:
        return TargetError(f"{self._path}: {what}: {self._log.reasons()}")

    def close(self) -> None:
        """Releases the GPU memory."""
        for name in ("_shapes", "_prefill", "_caches", "_memory", "_plan", "_runtime"):
            self.__dict__.pop(name, None)
        torch.cuda.empty_cache()


@dataclass
class _Shape:
    """An execution context with the shapes of one batch, its buffers, and its CUDA graph, if there is one.

    repeats: whether the context keeps these shapes, so that a graph of it stays right.
    """

    context: Any
    inputs: dict[str, torch.Tensor]
    logits: torch.Tensor
    repeats: bool
    graph: torch.cuda.CUDAGraph | None = None


def _capsule(address: int) -> Any:
    """`address` as TensorRT's bindings take a pointer."""
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    return new(address, None, None)


def _gpu_capability() -> str | None:
    """`8.9`; None without a GPU that torch can use."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}"


def require_gpu(path: Path, flavour: Flavour, planned: list[str], found: str | None) -> None:
    """Raises TargetError, naming the GPUs that the plan takes and a target for this machine, for any other.

    planned: compute capabilities that the plan was built for; none: those of the flavour.
    found:   that of this machine's GPU; None when there is none.
    """
    takes = planned or list(flavour.compute_capabilities)
    which = f"GPUs of compute capability {', '.join(takes)}" if takes else "the GPU that it was built on"
    if found is None:
        raise TargetError(
            f"{path}: a plan of {flavour.name} for {which}; this machine has no GPU that torch can use: "
            f"build with --target cpu"
        )
    if takes and found not in takes:
        raise TargetError(
            f"{path}: a plan of {flavour.name} for {which}; this GPU has {found}: build with --target cuda"
        )
