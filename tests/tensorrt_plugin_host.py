"""Stands for the data-centre TensorRT where its libraries cannot be had, so far as custom plugins need it.

`tensorrt.plugin` is NVIDIA's own, from the wheel of the Python bindings: its decorators, checks and plugin classes are the
real ones. The native module below it needs libnvinfer, which no package index has; what of it those files use is written
here, or taken from TensorRT-RTX where both have it. Networks are TensorRT-RTX's, with `add_plugin` added: a plugin is asked
for types, shapes, kernel and launch as the builder asks it, and its outputs stand in the network as inputs.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

rtx = pytest.importorskip("tensorrt_rtx")


class Expr:
    """An `IDimensionExpr`: a constant, a size known at run time, or an operation on two."""

    def __init__(self, value: int | None = None, symbol: str = "", terms: tuple[Any, ...] = ()) -> None:
        self.value, self.symbol, self.terms = value, symbol, terms

    def is_constant(self) -> bool:
        return self.value is not None

    def get_constant_value(self) -> int:
        assert self.value is not None
        return self.value

    def at(self, sizes: Mapping[str, int]) -> int:
        if self.value is not None:
            return self.value
        if self.symbol:
            return sizes[self.symbol]
        operation, a, b = self.terms
        return _OPERATIONS[operation.name](a.at(sizes), b.at(sizes))


_OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "SUM": lambda a, b: a + b,
    "PROD": lambda a, b: a * b,
    "SUB": lambda a, b: a - b,
    "FLOOR_DIV": lambda a, b: a // b,
    "CEIL_DIV": lambda a, b: -(-a // b),
    "MAX": max,
    "MIN": min,
}


class ExprBuilder:
    def constant(self, value: int) -> Expr:
        return Expr(value)

    def operation(self, operation: Any, a: Expr, b: Expr) -> Expr:
        if a.value is not None and b.value is not None:
            return Expr(_OPERATIONS[operation.name](a.value, b.value))
        return Expr(terms=(operation, a, b))


class PluginField:
    def __init__(self, name: str, data: Any, type: Any) -> None:
        self.name, self.type = name, type
        self.data = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data


class Registry:
    def __init__(self) -> None:
        self.creators: dict[tuple[str, str], Any] = {}

    def register_creator(self, creator: Any, namespace: str) -> None:
        self.creators[creator.name_given, namespace] = creator

    def get_creator(self, name: str, version: str, namespace: str) -> Any:
        return self.creators[name, namespace]


class Creator:
    """`IPluginCreatorV3Quick`. Its subclass names a loop variable as it names the plugin: the first name counts."""

    def __setattr__(self, attribute: str, value: Any) -> None:
        if attribute == "name":
            self.__dict__.setdefault("name_given", value)
        self.__dict__[attribute] = value


class TensorDesc:
    """`PluginTensorDesc`, and its own `desc` as a `DynamicPluginTensorDesc`."""

    def __init__(self, tensor: Any) -> None:
        self.dims, self.type, self.format, self.scale = tuple(tensor.shape), tensor.dtype, None, 0.0

    @property
    def desc(self) -> TensorDesc:
        return self


class _Base:
    def __init__(self, *_: Any) -> None:
        pass


@dataclass(eq=False)
class PluginLayer:
    """A plugin in a network, asked what the builder asks. `run` computes its outputs from those of its inputs."""

    plugin: Any
    inputs: list[Any]
    outputs: list[Any]
    run: Callable[..., Any] | None = None
    name: str = ""
    type: Any = field(default_factory=lambda: SimpleNamespace(name="PLUGIN"))

    @property
    def num_inputs(self) -> int:
        return len(self.inputs)

    @property
    def num_outputs(self) -> int:
        return len(self.outputs)

    def get_input(self, index: int) -> Any:
        return self.inputs[index]

    def get_output(self, index: int) -> Any:
        return self.outputs[index]

    def launch(self, shapes: Sequence[Sequence[int]]) -> Launch:
        """What TensorRT would launch for inputs of these shapes."""
        symbols = [[Expr(None if d < 0 else d, f"{i}.{axis}") for axis, d in enumerate(tuple(t.shape))]
                   for i, t in enumerate(self.inputs)]  # fmt: skip
        sizes = {f"{i}.{axis}": size for i, shape in enumerate(shapes) for axis, size in enumerate(shape)}
        self.plugin.get_output_shapes(symbols, [], ExprBuilder())
        self.plugin.set_tactic(0)
        params, scalars = SimpleNamespace(), Scalars()
        descs = [TensorDesc(t) for t in (*self.inputs, *self.outputs)]
        self.plugin.get_launch_params(symbols, descs, len(self.inputs), params, scalars, ExprBuilder())
        kernel, ptx = self.plugin.get_kernel(descs[: len(self.inputs)], descs[len(self.inputs) :])
        value = {name: getattr(params, name).expr.at(sizes) for name in vars(params)}
        return Launch(
            kernel, ptx, tuple(value[f"grid_{axis}"] for axis in "xyz"), tuple(value[f"block_{axis}"] for axis in "xyz"),
            value["shared_mem"], tuple(scalars.values[i].expr.at(sizes) for i in range(scalars.nbSymExprs)),
        )  # fmt: skip


class Scalars:
    nbSymExprs = 0

    def __init__(self) -> None:
        self.values: dict[int, Any] = {}

    def __setitem__(self, index: int, value: Any) -> None:
        assert value.dtype == rtx.PluginArgDataType.INT32
        self.values[index] = value


@dataclass(frozen=True)
class Launch:
    kernel: str
    ptx: bytes
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared_bytes: int
    scalars: tuple[int, ...]


class PluginNetwork:
    """An `INetworkDefinition` of TensorRT-RTX that also takes plugins. `executors`: plugin name -> its computation."""

    def __init__(self, definition: Any, executors: Mapping[str, Callable[..., Any]]) -> None:
        self.definition, self.executors, self.plugin_layers = definition, executors, list[PluginLayer]()
        self.outputs: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.definition, name)

    @property
    def network_inputs(self) -> list[Any]:
        """Its inputs, without those that stand for the outputs of plugins."""
        made = {tensor.name for layer in self.plugin_layers for tensor in layer.outputs}
        every = (self.definition.get_input(i) for i in range(self.definition.num_inputs))
        return [tensor for tensor in every if tensor.name not in made]

    @property
    def num_outputs(self) -> int:
        return len(self.outputs)

    def get_output(self, index: int) -> Any:
        return self.outputs[index]

    def mark_output(self, tensor: Any) -> None:
        self.outputs.append(tensor)
        if not any(tensor.name == made.name for layer in self.plugin_layers for made in layer.outputs):
            self.definition.mark_output(tensor)

    def add_plugin(self, create: Callable[..., Any], *, aot: bool) -> PluginLayer:
        module = sys.modules["tensorrt"]
        request = module.QuickPluginCreationRequest
        inputs, shape_inputs, plugin = create(request.STRICT_AOT if aot else request.STRICT_JIT)
        assert not shape_inputs
        types = plugin.get_output_data_types([t.dtype for t in inputs], [len(tuple(t.shape)) for t in inputs])
        symbols = [[Expr(None if d < 0 else d, f"{i}.{axis}") for axis, d in enumerate(tuple(t.shape))]
                   for i, t in enumerate(inputs)]  # fmt: skip
        shapes = plugin.get_output_shapes(symbols, [], ExprBuilder())
        count, outputs = len(self.plugin_layers), []
        for i, (dtype, shape) in enumerate(zip(types, shapes, strict=True)):
            sizes = tuple(expr.value if expr.is_constant() else -1 for expr in shape)
            outputs.append(self.definition.add_input(f"plugin{count}.{i}", dtype, sizes))
        layer = PluginLayer(plugin, inputs, outputs)
        executor = self.executors.get(plugin.plugin_name)
        layer.run = None if executor is None else lambda *tensors: executor(layer, *tensors)
        self.plugin_layers.append(layer)
        return layer


_REQUESTS = "UNKNOWN PREFER_JIT PREFER_AOT STRICT_JIT STRICT_AOT"
_INTERFACES = (
    "IPluginV3", "IPluginV3QuickCore", "IPluginV3QuickBuild", "IPluginV3QuickAOTBuild", "IPluginV3QuickRuntime",
    "ISymExpr",
)  # fmt: skip


def _module(executors: Mapping[str, Callable[..., Any]]) -> ModuleType:
    module, registry = ModuleType("tensorrt"), Registry()
    spec = ModuleSpec("tensorrt", None)  # for libraries that ask whether there is a TensorRT
    module.__dict__.update({name: getattr(rtx, name) for name in dir(rtx) if not name.startswith("__")})

    class Builder:
        def __init__(self, logger: Any) -> None:
            self._builder = rtx.Builder(logger)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._builder, name)

        def create_network(self, flags: int) -> PluginNetwork:
            return PluginNetwork(self._builder.create_network(flags), executors)

    module.__dict__.update(
        __version__="11 (stand-in)", __spec__=spec, Builder=Builder, IDimensionExpr=Expr, IExprBuilder=ExprBuilder,
        DimsExprs=_dims_exprs, PluginField=PluginField, PluginFieldCollection=list, PluginTensorDesc=TensorDesc,
        DynamicPluginTensorDesc=TensorDesc, QuickPluginCreationRequest=Enum("QuickPluginCreationRequest", _REQUESTS),
        get_plugin_registry=lambda: registry, IPluginCreatorV3Quick=type("IPluginCreatorV3Quick", (Creator, _Base), {}),
        INetworkDefinition=type("INetworkDefinition", (), dict.fromkeys([*dir(rtx.INetworkDefinition), "add_plugin_v3"])),
        IBuilderConfig=type("IBuilderConfig", (), {}), **{name: type(name, (_Base,), {}) for name in _INTERFACES},
    )  # fmt: skip
    return module


def _dims_exprs(count: int) -> list[Any]:
    return [None] * count


@contextmanager
def data_centre(executors: Mapping[str, Callable[..., Any]] | None = None) -> Iterator[ModuleType]:
    """`import tensorrt` and `import tensorrt.plugin` work inside. Skips where the bindings' wheel is not installed."""
    spec = importlib.util.find_spec("tensorrt_bindings")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the files of tensorrt.plugin: pip install --no-deps tensorrt-cu13-bindings")
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "tensorrt"}
    folder = Path(spec.submodule_search_locations[0]) / "plugin"
    try:
        for name in before:
            del sys.modules[name]
        sys.modules["tensorrt"] = module = _module(executors or {})
        found = importlib.util.spec_from_file_location(
            "tensorrt.plugin", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert found is not None and found.loader is not None
        plugin = importlib.util.module_from_spec(found)
        sys.modules["tensorrt.plugin"] = module.plugin = plugin  # type: ignore[attr-defined]
        found.loader.exec_module(plugin)
        yield module
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "tensorrt"]:
            del sys.modules[name]
        sys.modules.update(before)
