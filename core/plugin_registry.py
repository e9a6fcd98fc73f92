"""Finding, checking and loading plugins. A broken plugin is reported, skipped, and never takes trtc down."""

from __future__ import annotations

import difflib
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

import pluggy

from . import hookspecs
from .config import BuildConfig, ModelConfig
from .dtypes import DType
from .errors import ConfigError, GraphError, PluginError, TrtcError, one_line
from .graph import Graph, GraphBuilder
from .ops import Op, op_names, register
from .spec import TensorSpec
from .weights import WeightTable

T = TypeVar("T")
ENTRY_POINT_GROUP = hookspecs.PROJECT
DISABLE_VARIABLE = "TRTC_DISABLE_PLUGINS"
"""Environment variable: comma-separated plugin names to leave out, or `all`."""
HOOKS = tuple(name for name in dir(hookspecs) if name.startswith("trtc_"))
FAMILY_HOOKS = ("trtc_architectures", "trtc_model_config", "trtc_weight_table", "trtc_compose")
"""What a plugin that provides a model family must implement."""


@dataclass(frozen=True)
class PluginInfo:
    """What `trtc plugins` shows of one entry point."""

    name: str
    distribution: str
    module: str
    architectures: tuple[str, ...] = ()
    error: str | None = None
    """Why the plugin is not there: one line."""


class Family:
    """One plugin's model family: its hooks, called on that plugin alone, results checked.

    Every method raises PluginError, naming plugin and hook, when the hook raises something that is not a
    TrtcError or returns something else than the hook is for.
    """

    def __init__(self, name: str, hooks: pluggy.HookRelay, architectures: tuple[str, ...]) -> None:
        self.name = name
        self.architectures = architectures
        self._hooks = hooks

    def config(self, hf_config: Mapping[str, Any]) -> ModelConfig:
        """The model's configuration. Raises ConfigError for values that are missing or not supported."""
        try:
            config = self._ask("trtc_model_config", ModelConfig, hf_config=hf_config, family=self.name)
        except PluginError as error:
            cause = error.__cause__
            if isinstance(cause, KeyError) and cause.args and cause.args[0] not in hf_config:
                message = f"config.json: field {cause.args[0]!r} is missing; family {self.name} needs it"
                raise ConfigError(message) from cause
            raise
        if config.family != self.name:
            raise PluginError(
                f"plugin {self.name}: trtc_model_config gave family {config.family!r}; pass on its argument `family`"
            )
        return config

    def weight_table(self, config: ModelConfig) -> WeightTable:
        """The family's weight-mapping table for `config`."""
        return self._ask("trtc_weight_table", WeightTable, config=config)

    def compose(self, config: ModelConfig) -> Graph:
        """The family's graph for `config`: the whole model, before any pass.

        Raises GraphError naming a node that breaks a rule, and where the result is not the logits of a decoder.
        """
        g = GraphBuilder(config.dtype, self.weight_table(config).expand(config))
        graph = g.finish(self._ask("trtc_compose", str, config=config, g=g))
        _check_logits(graph, config, f"plugin {self.name}: trtc_compose")
        return graph

    def _ask(self, hook: str, expected: type[T], **arguments: Any) -> T:
        result: T = _ask(self.name, self._hooks, hook, expected, **arguments)
        return result


class PluginRegistry:
    """The plugins of this installation.

    Every plugin has a pluggy manager of its own: a hook is asked of one plugin, and what plugins bring is put
    together here, where it is known which of them a wrong result came from.
    """

    def __init__(self, points: Iterable[EntryPoint], disabled: frozenset[str] = frozenset()) -> None:
        """disabled: names of plugins that are listed, but not loaded; `all` stands for every name."""
        self.plugins: list[PluginInfo] = []
        self._hooks: dict[str, pluggy.HookRelay] = {}
        self._families: dict[str, Family] = {}
        for point in sorted(points, key=lambda p: p.name):
            self.plugins.append(self._load(point, off=not disabled.isdisjoint(("all", point.name))))

    def _load(self, point: EntryPoint, *, off: bool) -> PluginInfo:
        info = PluginInfo(point.name, "(unknown)", point.value)
        try:
            if point.dist is not None:
                info = replace(info, distribution=f"{point.dist.name} {point.dist.version}")
            if off:
                raise PluginError(f"disabled by {DISABLE_VARIABLE}")
            if point.name in self._hooks:
                raise PluginError(f"another plugin is called {point.name!r}; entry point names must differ")
            return replace(info, architectures=self._add(point.name, point.load()))
        except KeyboardInterrupt:
            raise
        # A plugin is foreign code: whatever it raises while it loads (SystemExit too) must not end trtc.
        except BaseException as error:
            return replace(info, error=_one_line(error))

    def _add(self, name: str, module: Any) -> tuple[str, ...]:
        """Checks the plugin and takes it in. Returns the architectures of its family, if it has one."""
        _check_hook_names(name, module)
        manager = pluggy.PluginManager(hookspecs.PROJECT)
        manager.add_hookspecs(hookspecs)
        manager.register(module, name)
        hooks = manager.hook
        architectures = _list_of(str, name, hooks, "trtc_architectures")
        if hooks.trtc_architectures.get_hookimpls() and not architectures:
            raise PluginError(
                f"plugin {name}: trtc_architectures returned no name; a family owns one or more"
            )
        if not all(map(str.isprintable, architectures)):
            raise PluginError(
                f"plugin {name}: trtc_architectures returned {list(architectures)!r}, not names"
            )
        for op in _list_of(Op, name, hooks, "trtc_ops"):
            register(op)
        self._hooks[name] = hooks
        if architectures:
            self._families[name] = Family(name, hooks, architectures)
        return architectures

    def family(self, name: str) -> Family:
        """The family called `name`. Raises PluginError: which there are, or why this one did not load."""
        if name in self._families:
            return self._families[name]
        for info in self.plugins:
            if info.name == name and info.error:
                raise PluginError(f"plugin {name} ({info.distribution}) did not load: {info.error}")
        raise PluginError(f"no plugin provides model family {name!r}; {self._known()}")

    def family_of(self, hf_config: Mapping[str, Any], where: str = "config.json") -> Family:
        """The family that owns `architectures` of a Hugging Face configuration.

        Raises ConfigError, naming the families there are, when none does or more than one.
        """
        architectures = hf_config.get("architectures")
        if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
            what = "field 'architectures' is not a list of names; pass --model NAME"
            raise ConfigError(f"{where}: {what}; {self._known()}")
        owners = [family for family in self._families.values() if architectures[0] in family.architectures]
        if not owners:
            raise ConfigError(f"{where}: no plugin owns architecture {architectures[0]!r}; {self._known()}")
        if len(owners) > 1:
            names = " or ".join(f"--model {family.name}" for family in owners)
            raise ConfigError(f"{where}: several plugins own architecture {architectures[0]!r}; pass {names}")
        return owners[0]

    def kernels(self, target: str) -> dict[str, Callable[..., Any]]:
        """Kernels that plugins bring for `target`, by op name.

        A plugin whose hook fails is left out with a RuntimeWarning: other models do not need what it brings.
        """
        return self._by_op("trtc_kernels", target=target)

    def tensorrt_plugins(self, flavour: str, build: BuildConfig) -> dict[str, Callable[..., Any]]:
        """TensorRT plugin lowerings for `flavour`, by op name; failing hooks as above."""
        return self._by_op("trtc_tensorrt_plugins", flavour=flavour, build=build)

    def _by_op(self, hook: str, **arguments: Any) -> dict[str, Callable[..., Any]]:
        result: dict[str, Callable[..., Any]] = {}
        for name, hooks in self._hooks.items():
            try:
                found = _ask(name, hooks, hook, dict, default={}, **arguments)
                for op, brought in found.items():
                    if not (isinstance(op, str) and callable(brought)):
                        raise PluginError(
                            f"plugin {name}: {hook} returned {brought!r} for op {op!r}, not a function"
                        )
            except TrtcError as error:
                warnings.warn(f"{error}; {hook} of this plugin is ignored", RuntimeWarning, stacklevel=3)
                continue
            for op in sorted(found.keys() - op_names()):
                near = difflib.get_close_matches(op, op_names(), n=1)
                text = f"plugin {name}: {hook} names {op!r}, which is no op{f'; did you mean {near[0]}?' if near else ''}"
                warnings.warn(text, RuntimeWarning, stacklevel=3)
            for op in sorted(found.keys() & result.keys()):
                text = f"plugin {name}: {hook} replaces that of another plugin for op {op!r}"
                warnings.warn(text, RuntimeWarning, stacklevel=3)
            result.update(found)
        return result

    def _known(self) -> str:
        known = [f"{f.name} ({', '.join(f.architectures)})" for f in self._families.values()]
        broken = [info.name for info in self.plugins if info.error]
        missing = f", not loaded: {', '.join(broken)}" if broken else ""
        return f"known families: {', '.join(known) or 'none'}{missing}; see `trtc plugins`"


def _check_logits(graph: Graph, config: ModelConfig, where: str) -> None:
    """Raises GraphError unless `graph` gives what the runtime samples from."""
    (output,) = graph.outputs
    logits = TensorSpec(DType.FLOAT32, ("R", config.vocab_size))
    if graph.specs[output] != logits:
        raise GraphError(
            f"{where} returned %{output}, {graph.specs[output]}; expected logits, {logits}: those of layers.lm_head"
        )


def _ask(
    plugin: str,
    hooks: pluggy.HookRelay,
    hook: str,
    expected: type[T],
    default: T | None = None,
    **arguments: Any,
) -> T:
    """What the plugin's `hook` returns; `default`, if any, where it is not implemented or returns None.

    Raises PluginError when the hook fails or returns no `expected`.
    """
    try:
        result = getattr(hooks, hook)(**arguments)
    except (TrtcError, KeyboardInterrupt):
        raise
    except BaseException as error:  # SystemExit too, as where it loads
        raise PluginError(f"plugin {plugin}: {hook} raised {_one_line(error)}") from error
    if result is None and default is not None:
        return default
    if not isinstance(result, expected):
        what = f"{type(result).__name__}, not {expected.__name__}"
        raise PluginError(f"plugin {plugin}: {hook} returned {what}")
    return result


def _list_of(kind: type[T], plugin: str, hooks: pluggy.HookRelay, hook: str) -> tuple[T, ...]:
    """The list of `kind` that `hook` returns; empty where the plugin does not implement it."""
    found: list[Any] = _ask(plugin, hooks, hook, list, default=[])
    if not all(isinstance(item, kind) for item in found):
        raise PluginError(f"plugin {plugin}: {hook} returned {found!r}, not a list of {kind.__name__}")
    return tuple(found)


def _check_hook_names(plugin: str, module: Any) -> None:
    """Raises PluginError for a misspelt hook (with the nearest name), one that is not marked, and a family
    that lacks one.
    """
    marked = set()
    for attribute in dir(module):
        value = getattr(module, attribute)
        options = getattr(value, f"{hookspecs.PROJECT}_impl", None)
        if isinstance(options, dict):
            marked.add(options["specname"] or attribute)
        elif attribute in HOOKS and callable(value):
            raise PluginError(f"plugin {plugin}: {attribute} is not marked @hookimpl: nothing would call it")
    for hook in sorted(marked.difference(HOOKS)):
        near = difflib.get_close_matches(hook, HOOKS, n=1)
        help_text = f"did you mean {near[0]}?" if near else f"known hooks: {', '.join(HOOKS)}"
        raise PluginError(f"plugin {plugin}: {hook} is not a hook; {help_text}")
    if not marked:
        known = ", ".join(HOOKS)
        raise PluginError(f"plugin {plugin}: no function is marked @hookimpl; known hooks: {known}")
    missing = [hook for hook in FAMILY_HOOKS if hook not in marked]
    if missing and len(missing) < len(FAMILY_HOOKS):
        raise PluginError(f"plugin {plugin}: a model family also needs {', '.join(missing)}")


def _one_line(error: BaseException) -> str:
    if isinstance(error, TrtcError):
        return str(error)
    try:
        return one_line(f"{type(error).__name__}: {error}")
    except Exception:  # how an error says what it is, is foreign code too
        return type(error).__name__


@cache
def plugins() -> PluginRegistry:
    """The plugins of this installation, loaded once."""
    names = (name.strip() for name in os.environ.get(DISABLE_VARIABLE, "").split(","))
    return PluginRegistry(entry_points(group=ENTRY_POINT_GROUP), frozenset(filter(None, names)))
