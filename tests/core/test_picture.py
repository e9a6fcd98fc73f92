"""Pictures of a graph. Oracles: onnx's own checker and reader, an HTML parser, a reader of Graphviz text."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from trtc.core.errors import TargetError
from trtc.core.graph import Graph
from trtc.core.picture import FORMATS
from trtc.core.picture.blocks import blocks, scope
from trtc.core.plugin_registry import plugins
from trtc.tests.opt_models import hf_config_fields

FACTS = {"model": "toy <script>", "target": "tensorrt"}


@pytest.fixture(scope="module")
def graph() -> Graph:
    hf_config = {"architectures": ["OPTForCausalLM"], "dtype": "float32", **hf_config_fields("pre_norm")}
    family = plugins().family_of(hf_config)
    return family.compose(family.config(hf_config))


def drawn(graph: Graph) -> list[str]:
    """Nodes that a picture shows."""
    read = {name for node in graph.nodes for name in node.used}
    return [
        node.name
        for node in graph.nodes
        if node.op not in ("input", "weight") or (node.op == "input" and node.name in read)
    ]


def test_blocks_hold_every_node_once_and_know_what_repeats(graph: Graph) -> None:
    found = blocks(graph)
    assert sorted(node.name for block in found for node in block.nodes) == sorted(drawn(graph))
    layers = [block for block in found if block.name.startswith("layers.")]
    assert len(layers) > 1 and layers[0].like is None
    assert {block.like for block in layers[1:]} == {layers[0].name}
    assert [scope(name) for name in ("layers.3.mlp.fc1", "layers.3", "embed.tokens")] == [
        "layers.3",
        "layers.3",
        "",
    ]


def test_dot(graph: Graph) -> None:
    text = FORMATS["dot"](graph, 'a "title"', FACTS).decode()
    assert text.startswith('digraph "a \\"title\\"" {') and text.count("{") == text.count("}")
    boxes = re.findall(r'^    "([^"]+)" \[label=', text, re.MULTILINE)
    assert sorted(boxes) == sorted(drawn(graph))
    ends = re.findall(r'^  "([^"]+)" -> "([^"]+)"', text, re.MULTILINE)
    weights = {node.name for node in graph.weights}
    expected = [
        (graph.producers[name].name, node.name)
        for node in graph.nodes
        for name in node.used
        if name not in weights
    ]
    assert sorted(ends) == sorted(expected)


class Page(HTMLParser):
    """Tags that are open, and what would be loaded from elsewhere."""

    VOID = frozenset({"meta", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.boxes, self.edges, self.foreign = 0, 0, list[str]()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.boxes += tag == "rect"
        self.edges += tag == "path"
        self.foreign += [name for name, _ in attrs if name in ("src", "href")]
        self.foreign += [tag] if tag in ("script", "link", "img", "iframe") else []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_html_is_whole_and_loads_nothing(graph: Graph) -> None:
    text = FORMATS["html"](graph, "toy", FACTS).decode()
    page = Page()
    page.feed(text)
    assert page.open == [] and page.foreign == [] and "url(" not in text
    assert page.boxes == len(drawn(graph))
    place = {node.name: block.name for block in blocks(graph) for node in block.nodes}
    inside = [1 for node in graph.nodes for name in node.used
              if node.name in place and place[node.name] == place.get(graph.producers[name].name)]  # fmt: skip
    assert page.edges == len(inside)
    assert "toy &lt;script&gt;" in text


def test_onnx(graph: Graph) -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load_from_string(FORMATS["onnx"](graph, "toy", FACTS))
    onnx.checker.check_model(model)
    nodes = [node for node in graph.nodes if node.op not in ("input", "weight")]
    assert [(n.name, n.op_type, list(n.output)) for n in model.graph.node] == [
        (n.name, n.op, list(n.tensors)) for n in nodes
    ]
    assert [list(n.input) for n in model.graph.node] == [[name or "" for name in n.inputs] for n in nodes]
    (logits,) = model.graph.output
    assert logits.name == graph.outputs[0]
    assert [d.dim_param or d.dim_value for d in logits.type.tensor_type.shape.dim] == list(
        graph.specs[logits.name].shape
    )
    assert {p.key: p.value for p in model.metadata_props} == FACTS


def test_without_onnx_the_command_that_installs_it_is_named(
    graph: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(TargetError, match=r"pip install 'trtc\[onnx\]'"):
        FORMATS["onnx"](graph, "toy", FACTS)
