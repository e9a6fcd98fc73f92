"""Plugins found through entry points: what works, and that a broken one is reported and harms nobody else.

Every test writes real distributions (a module, a dist-info folder with entry_points.txt) into a folder on sys.path and
lets importlib.metadata find them, as it finds what pip installed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from trtc.core.config import BuildConfig
from trtc.core.errors import ConfigError, GraphError, PluginError, TrtcError
from trtc.core.ops import registry
from trtc.core.plugin_registry import Family, PluginInfo, PluginRegistry, plugins

HEADER = """
from trtc.core import layers
from trtc.core.config import ModelConfig
from trtc.core.dtypes import DType
from trtc.core.hookspecs import hookimpl
from trtc.core.weights import WeightRule, WeightTable
"""
ARCHITECTURES = """
@hookimpl
def trtc_architectures():
    return ["{name}ForCausalLM"]
"""
CONFIG = """
@hookimpl
def trtc_model_config(hf_config, family):
    return ModelConfig(
        family=family, architecture="", dtype=DType.FLOAT32, vocab_size=hf_config["vocab_size"], hidden_size=4,
        num_layers=1, num_heads=1, num_kv_heads=1, head_dim=4, ffn_size=4, max_positions=8, tie_word_embeddings=True,
    )
"""
TABLE = """
@hookimpl
def trtc_weight_table(config):
    return WeightTable((WeightRule("{name}.weight", "lm_head.weight", ("vocab_size", "hidden_size")),))
"""
COMPOSE = """
@hookimpl
def trtc_compose(config, g):
    x = g.add("embedding", "token_ids", g.weight("lm_head.weight"), name="embed", offset=0)
    return layers.lm_head(g, x)
"""
FAMILY = HEADER + ARCHITECTURES + CONFIG + TABLE + COMPOSE
HF_CONFIG = {"vocab_size": 16}


class Site:
    """A folder on sys.path into which distributions are installed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(
        self, name: str, source: str = FAMILY, *, distribution: str | None = None, value: str | None = None
    ) -> None:
        """Installs a distribution with one module and an entry point `name` for it; `{name}` is filled in."""
        distribution = distribution or f"trtc-test-{name}"
        module = f"{distribution.replace('-', '_')}_module"
        (self.folder / f"{module}.py").write_text(source.replace("{name}", name))
        info = self.folder / f"{distribution.replace('-', '_')}-1.5.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.5\n")
        (info / "entry_points.txt").write_text(f"[trtc]\n{name} = {value or module}\n")

    def registry(self, disabled: frozenset[str] = frozenset()) -> PluginRegistry:
        return PluginRegistry(entry_points(group="trtc"), disabled)

    def info(self, name: str) -> PluginInfo:
        (info,) = (info for info in self.registry().plugins if info.name == name)
        return info

    def error(self, name: str) -> str:
        """What is reported of plugin `name`, once it is sure that the other plugins are there all the same."""
        registry = self.registry()
        assert registry.family("opt").architectures == ("OPTForCausalLM", "OPTModel")
        assert [info.name for info in registry.plugins if info.error] == [name]
        error = self.info(name).error
        assert error is not None
        assert "\n" not in error
        return error

    def family(self, source: str) -> Family:
        self.add("one", source)
        return self.registry().family("one")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.syspath_prepend(tmp_path)
    yield Site(tmp_path)
    for name in [name for name in sys.modules if name.startswith("trtc_test_")]:
        del sys.modules[name]


def test_a_third_party_family_is_found_with_its_distribution(site: Site) -> None:
    site.add("one")
    found = site.info("one")
    assert found == PluginInfo("one", "trtc-test-one 1.5", "trtc_test_one_module", ("oneForCausalLM",))
    family = site.registry().family_of({"architectures": ["oneForCausalLM"]})
    assert family.name == "one"
    graph = family.compose(family.config(HF_CONFIG))
    assert [node.name for node in graph.weights] == ["lm_head.weight"]


def test_each_family_gets_answers_from_its_own_hooks_alone(site: Site) -> None:
    """Whatever the order: the names of the tensors tell whose table it is."""
    for name in ("aaa", "mmm", "zzz"):
        site.add(name)
    registry = site.registry()
    for name in ("aaa", "mmm", "zzz"):
        family = registry.family(name)
        config = family.config(HF_CONFIG)
        assert config.family == name
        assert family.weight_table(config).rules[0].source == f"{name}.weight"
        assert family.architectures == (f"{name}ForCausalLM",)


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("import module_that_nobody_has", "ModuleNotFoundError: No module named 'module_that_nobody_has'"),
        ("raise RuntimeError('two\\nlines')", "RuntimeError: two lines"),
        ("import sys; sys.exit('no licence')", "SystemExit: no licence"),
        ("class Odd(BaseException): pass\nraise Odd('odd')", "Odd: odd"),
        ("class Odd(Exception):\n    def __str__(self): raise ValueError\nraise Odd", "Odd"),
        ("def broken(:", "SyntaxError: invalid syntax (trtc_test_one_module.py, line 1)"),
        ("from trtc.core.errors import ConfigError\nraise ConfigError('set X')", "set X"),
    ],
    ids=["import", "raise", "exit", "base exception", "no text", "syntax", "trtc error"],
)
def test_a_plugin_that_fails_at_import_is_listed_with_its_error(site: Site, source: str, error: str) -> None:
    site.add("one", source)
    assert site.error("one") == error
    with pytest.raises(PluginError) as raised:
        site.registry().family("one")
    assert str(raised.value) == f"plugin one (trtc-test-one 1.5) did not load: {error}"


def test_an_entry_point_of_nothing_is_listed_with_its_error(site: Site) -> None:
    site.add("one", value="no_such_module:plugin")
    assert site.error("one") == "ModuleNotFoundError: No module named 'no_such_module'"


def test_an_interrupt_while_plugins_load_is_not_swallowed(site: Site) -> None:
    site.add("one", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        site.registry()


@pytest.mark.parametrize(
    ("source", "error"),
    [
        (
            FAMILY.replace("def trtc_compose", "def trtc_composse"),
            "plugin one: trtc_composse is not a hook; did you mean trtc_compose?",
        ),
        (
            FAMILY + "\n@hookimpl\ndef something_else(): pass\n",
            "plugin one: something_else is not a hook; known hooks: trtc_architectures, trtc_compose, trtc_kernels, "
            "trtc_model_config, trtc_ops, trtc_tensorrt_plugins, trtc_weight_table",
        ),
        (
            FAMILY.replace("def trtc_compose(config, g)", "def trtc_compose(config, builder)"),
            "hookimpl definition: trtc_compose(config, builder) Argument(s) {'builder'} are declared in the hookimpl "
            "but can not be found in the hookspec",
        ),
        (
            HEADER + ARCHITECTURES + CONFIG,
            "plugin one: a model family also needs trtc_weight_table, trtc_compose",
        ),
        (
            FAMILY + "\ndef trtc_kernels(target): return {}\n",
            "plugin one: trtc_kernels is not marked @hookimpl: nothing would call it",
        ),
        ("x = 1", "plugin one: no function is marked @hookimpl; known hooks: trtc_architectures"),
        (
            FAMILY.replace('["{name}ForCausalLM"]', '"{name}ForCausalLM"'),
            "plugin one: trtc_architectures returned str, not list",
        ),
        (
            FAMILY.replace('["{name}ForCausalLM"]', "[1]"),
            "plugin one: trtc_architectures returned [1], not a list of str",
        ),
        (
            FAMILY.replace("ForCausalLM", "\\x1b[31m"),
            r"trtc_architectures returned ['one\x1b[31m'], not names",
        ),
        (
            FAMILY.replace('["{name}ForCausalLM"]', "[]"),
            "plugin one: trtc_architectures returned no name; a family owns one",
        ),
        (
            FAMILY.replace('["{name}ForCausalLM"]', "1 / 0"),
            "plugin one: trtc_architectures raised ZeroDivisionError: division by zero",
        ),
        (
            FAMILY + "\n@hookimpl\ndef trtc_ops(): return ['my_op']\n",
            "plugin one: trtc_ops returned ['my_op'], not a list of Op",
        ),
        (
            FAMILY + "\nfrom trtc.core.ops import Op\n@hookimpl\ndef trtc_ops(): return [Op('add', len, len)]\n",
            "op 'add' is registered twice; a plugin's ops need names of their own",
        ),
    ],
    ids=["misspelt", "unknown", "argument", "incomplete", "unmarked", "none", "text", "numbers", "escape", "empty", "raises",
         "ops", "op taken"],
)  # fmt: skip
def test_a_plugin_that_breaks_the_contract_is_listed_with_what_is_wrong(
    site: Site, source: str, error: str
) -> None:
    site.add("one", source)
    assert error in site.error("one")


def test_a_hook_may_have_a_function_of_another_name(site: Site) -> None:
    """pluggy's `specname`."""
    renamed = FAMILY.replace("@hookimpl\ndef trtc_compose", "@hookimpl(specname='trtc_compose')\ndef build")
    family = site.family(renamed)
    assert family.compose(family.config(HF_CONFIG)).outputs == ("logits",)


def test_two_plugins_of_one_name_are_told_apart_by_distribution(site: Site) -> None:
    site.add("one", distribution="trtc-test-first")
    site.add("one", distribution="trtc-test-second")
    registry = site.registry()
    first, second = (info for info in registry.plugins if info.name == "one")
    assert (first.error, second.error) == (
        None,
        "another plugin is called 'one'; entry point names must differ",
    )
    assert {first.distribution, second.distribution} == {"trtc-test-first 1.5", "trtc-test-second 1.5"}
    assert registry.family("one").architectures == ("oneForCausalLM",)


def test_an_architecture_that_two_families_own_must_be_chosen(site: Site) -> None:
    for name in ("one", "two"):
        site.add(name, FAMILY.replace("{name}ForCausalLM", "SharedForCausalLM"))
    with pytest.raises(ConfigError) as raised:
        site.registry().family_of({"architectures": ["SharedForCausalLM"]}, "model/config.json")
    expected = "several plugins own architecture 'SharedForCausalLM'; pass --model one or --model two"
    assert str(raised.value) == f"model/config.json: {expected}"


@pytest.mark.parametrize("architectures", [None, [], "OPTForCausalLM", [3]])
def test_a_config_without_architectures_is_refused_with_the_known_families(
    site: Site, architectures: object
) -> None:
    with pytest.raises(
        ConfigError, match=r"^x: field 'architectures' is not .* known families: opt \(OPTForCausalLM"
    ):
        site.registry().family_of({"architectures": architectures}, "x")


def test_an_unknown_architecture_or_family_is_refused_with_the_known_ones(site: Site) -> None:
    with pytest.raises(ConfigError, match=r"no plugin owns architecture 'Nobody'; known families: opt \(OPT"):
        site.registry().family_of({"architectures": ["Nobody"]})
    with pytest.raises(
        PluginError, match=r"no plugin provides model family 'nobody'; known families: opt \(OPT"
    ):
        site.registry().family("nobody")


def test_who_owns_an_architecture_may_be_a_plugin_that_did_not_load(site: Site) -> None:
    site.add("one", FAMILY.replace("def trtc_compose", "def trtc_compos"))
    with pytest.raises(ConfigError, match=r"'oneForCausalLM'; known families: opt .*, not loaded: one; see"):
        site.registry().family_of({"architectures": ["oneForCausalLM"]})


@pytest.mark.parametrize(
    ("hook", "body", "error"),
    [
        ("trtc_model_config", "return {'vocab_size': 3}", "returned dict, not ModelConfig"),
        ("trtc_model_config", "return None", "returned NoneType, not ModelConfig"),
        ("trtc_model_config", "return undefined", "raised NameError: name 'undefined' is not defined"),
        (
            "trtc_model_config",
            "return {}['inner']",
            "config.json: field 'inner' is missing; family one needs it",
        ),
        ("trtc_model_config", "return {}['vocab_size']", "raised KeyError: 'vocab_size'"),
        ("trtc_weight_table", "return []", "returned list, not WeightTable"),
        ("trtc_compose", "return 7", "returned int, not str"),
        ("trtc_compose", "raise SystemExit(4)", "plugin one: trtc_compose raised SystemExit: 4"),
        ("trtc_compose", "raise ValueError('a\\nb')", "raised ValueError: a b"),
        (
            "trtc_compose",
            "return g.add('linear', 'nothing', name='x')",
            "linear 'x': input %nothing is not defined",
        ),
        (
            "trtc_compose",
            "return g.add('embedding', 'token_ids', g.weight('lm_head.weight'), name='x', offset=0)",
            "plugin one: trtc_compose returned %x, float32[T, 4]; expected logits, float32[R, 16]",
        ),
    ],
)
def test_a_hook_that_fails_or_returns_something_else_is_an_error_of_one_line(
    site: Site, hook: str, body: str, error: str
) -> None:
    """Oracle: by hand; the errors are trtc's own, so that the command line shows them without a traceback."""
    arguments = {"trtc_model_config": "hf_config", "trtc_weight_table": "config", "trtc_compose": "config, g"}
    family = site.family(FAMILY + f"\n@hookimpl\ndef {hook}({arguments[hook]}):\n    {body}\n")
    with pytest.raises(TrtcError) as raised:
        family.compose(family.config(HF_CONFIG))
    assert error in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("family=family", "family='two'", "plugin one: trtc_model_config gave family 'two'; pass on its argument"),
        ("dtype=DType.FLOAT32", "dtype='float32'", "one config: dtype 'float32' is not a DType"),
        ("max_positions=8", "max_positions=8, eos_token_ids=2", "one config: eos_token_ids: 2 is not a tuple"),
        ("max_positions=8", "max_positions=8, eos_token_ids=(-1,)", "eos_token_ids: (-1,) is not a tuple of token ids"),
        ("max_positions=8", "max_positions=8, pad_token_id='0'", "one config: pad_token_id: '0' is not a token id"),
    ],
)  # fmt: skip
def test_a_config_of_wrong_types_is_refused_where_it_is_made(
    site: Site, old: str, new: str, error: str
) -> None:
    """Not when an engine with it is opened, or not at all."""
    with pytest.raises(TrtcError) as raised:
        site.family(FAMILY.replace(old, new)).config(HF_CONFIG)
    assert error in str(raised.value)


def test_a_field_that_a_family_needs_is_named_when_it_is_missing(site: Site) -> None:
    with pytest.raises(
        ConfigError, match=r"^config.json: field 'vocab_size' is missing; family one needs it$"
    ):
        site.family(FAMILY).config({})


def test_a_weight_that_the_composition_forgets_is_named(site: Site) -> None:
    rule = 'WeightRule("b", "head.bias", ("vocab_size",)), '
    family = site.family(FAMILY.replace("WeightTable((", f"WeightTable(({rule}"))
    with pytest.raises(GraphError, match=r"rows that the composition never uses: head\.bias"):
        family.compose(family.config(HF_CONFIG))


KERNELS = """
from trtc.core.hookspecs import hookimpl

@hookimpl
def trtc_kernels(target):
    if target == "cpu":
        return {"add": "of {name}".format, "mul": "own".format}

@hookimpl
def trtc_tensorrt_plugins(flavour):
    return {"mul": flavour.format}
"""


BUILD = BuildConfig(max_seq_len=64, max_input_len=32, target="tensorrt")


def made_by(brought: dict[str, Callable[..., Any]]) -> dict[str, str]:
    """What the functions of KERNELS return, by op."""
    return {op: function() for op, function in brought.items()}


def test_kernels_of_all_plugins_are_put_together(site: Site) -> None:
    """A plugin that brings kernels and no family; None means nothing for that target."""
    site.add("one", KERNELS)
    registry = site.registry()
    assert made_by(registry.kernels("cpu")) == {"add": "of one", "mul": "own"}
    assert registry.kernels("cuda") == {}
    assert registry.tensorrt_plugins("tensorrt", BUILD)["mul"]() == "tensorrt"
    with pytest.raises(PluginError, match="no plugin provides model family 'one'"):
        registry.family("one")


def test_a_kernel_hook_that_fails_costs_only_its_own_plugin(site: Site) -> None:
    site.add("one", KERNELS)
    site.add("six", KERNELS.replace('"own".format', "6"))
    site.add("two", KERNELS.replace('return {"add"', '1 / 0; return {"add"'))
    site.add("zoo", KERNELS.replace('return {"add": "of {name}".format, "mul": "own".format}', "return []"))
    with pytest.warns(RuntimeWarning) as warned:
        assert made_by(site.registry().kernels("cpu")) == {"add": "of one", "mul": "own"}
    assert [str(one.message) for one in warned] == [
        "plugin six: trtc_kernels returned 6 for op 'mul', not a function; trtc_kernels of this plugin is ignored",
        "plugin two: trtc_kernels raised ZeroDivisionError: division by zero; trtc_kernels of this plugin is ignored",
        "plugin zoo: trtc_kernels returned list, not dict; trtc_kernels of this plugin is ignored",
    ]


def test_a_kernel_for_no_op_is_reported(site: Site) -> None:
    """Nothing would ever ask for it."""
    site.add("one", KERNELS.replace('"mul": "own".format', '"rotari": "own".format'))
    named = "plugin one: trtc_kernels names 'rotari', which is no op; did you mean rotary"
    with pytest.warns(RuntimeWarning, match=named):
        site.registry().kernels("cpu")


def test_two_kernels_for_one_op_are_reported_and_the_last_name_wins(site: Site) -> None:
    site.add("one", KERNELS)
    site.add("two", KERNELS.replace('"mul": "own".format', ""))
    with pytest.warns(
        RuntimeWarning, match="plugin two: trtc_kernels replaces that of another plugin for op 'add'"
    ):
        assert made_by(site.registry().kernels("cpu"))["add"] == "of two"


def test_an_op_of_a_plugin_can_be_loaded_by_two_registries(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_OPS", dict(registry._OPS))  # other tests shall not see the op
    ops = """
from trtc.core.hookspecs import hookimpl
from trtc.core.ops import Op

def infer(signature): return (signature[0],)
def reference(context, attrs, x): return 2 * x

@hookimpl
def trtc_ops(): return [Op("trtc_test_double", infer, reference)]
"""
    site.add("one", ops)
    for _ in range(2):
        assert [info.error for info in site.registry().plugins] == [None, None]
    assert "trtc_test_double" in registry.op_names()


def test_disabled_plugins_are_not_imported(site: Site) -> None:
    site.add("one", "raise RuntimeError('imported')")
    registry = site.registry(frozenset({"one"}))
    assert [info.error for info in registry.plugins] == ["disabled by TRTC_DISABLE_PLUGINS", None]
    with pytest.raises(
        PluginError, match=r"plugin one \(trtc-test-one 1\.5\) did not load: disabled by TRTC_DISABLE"
    ):
        registry.family("one")


@pytest.mark.parametrize(
    ("value", "disabled"),
    [("one", {"one"}), (" one , two,", {"one", "two"}), ("all", {"one", "opt", "two"}), ("", set())],
)
def test_the_environment_names_plugins_to_leave_out(
    site: Site, monkeypatch: pytest.MonkeyPatch, value: str, disabled: set[str]
) -> None:
    site.add("one")
    site.add("two")
    monkeypatch.setenv("TRTC_DISABLE_PLUGINS", value)
    found = plugins.__wrapped__()  # as a new process would, which has nothing cached
    assert {info.name for info in found.plugins if info.error} == disabled
