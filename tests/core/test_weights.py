"""The weight-mapping table: sizes, transforms, expansion over layers, one error for all that does not fit."""

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from trtc.core.errors import CheckpointError, PluginError
from trtc.core.sharding import Shard
from trtc.core.weights import (
    IDENTITY,
    Chunk,
    Compose,
    DropRows,
    Transpose,
    WeightRule,
    WeightTable,
    linear_rules,
    norm_rules,
    resolve_dim,
)


@dataclass(frozen=True)
class FakeConfig:
    num_layers: int = 2
    hidden_size: int = 8
    head_dim: int = 4
    num_heads: int = 2
    num_kv_heads: int = 1
    vocab_size: int = 11
    max_positions: int = 6
    ratio: float = 0.5


CONFIG = FakeConfig()
EMBED = WeightRule("embed.weight", "token_embedding.weight", ("vocab_size", "hidden_size"), Shard.EMBEDDING)
QUERY = WeightRule(
    "layers.{i}.q.weight",
    "layers.{i}.query.weight",
    ("num_heads*head_dim", "hidden_size"),
    Shard.HEADS,
    quantizable=True,
)
HEAD = WeightRule(
    "lm_head.weight",
    "head.weight",
    ("vocab_size", "hidden_size"),
    Shard.VOCAB_HEAD,
    tied_to="token_embedding.weight",
)
TABLE = WeightTable((EMBED, QUERY, HEAD), prefixes=("model.", ""), ignore=("*.rotary.*",))
AVAILABLE = {
    "model.embed.weight": (11, 8),
    "model.layers.0.q.weight": (8, 8),
    "model.layers.1.q.weight": (8, 8),
}


@pytest.mark.parametrize(
    ("dim", "expected"),
    [
        (7, 7),
        ("7", 7),
        ("hidden_size", 8),
        ("max_positions+2", 6 + 2),
        ("max_positions - 2", 6 - 2),
        ("num_heads*head_dim+2*num_kv_heads*head_dim", 2 * 4 + 2 * 1 * 4),
    ],
)
def test_sizes_are_sums_of_products(dim, expected):
    """Oracle: the same expression in Python."""
    assert resolve_dim(dim, CONFIG) == expected


@pytest.mark.parametrize(
    "dim", ["", "a b", "hidden_size+", "hidden_size**2", "(2)", "2 3", "__class__", "nope", "ratio"]
)
def test_bad_sizes_are_refused_by_name(dim):
    with pytest.raises(PluginError, match="weight table: "):
        resolve_dim(dim, CONFIG)


@pytest.mark.parametrize(
    ("transform", "shape", "expected"),
    [
        (IDENTITY, (4, 6), lambda t: t),
        (Transpose(), (4, 6), lambda t: t.mT),
        (Chunk(1, 3), (4, 6), lambda t: t.chunk(3, dim=0)[1]),
        (Chunk(2, 3, axis=1), (4, 6), lambda t: t.chunk(3, dim=1)[2]),
        (Chunk(0, 3), (4,), lambda t: t.chunk(3)[0]),
        (DropRows(2), (4, 6), lambda t: t[2:]),
        (Compose((Transpose(), Chunk(1, 2))), (4, 6), lambda t: t.mT.chunk(2, dim=0)[1]),
    ],
)
def test_transforms_give_the_shape_they_announce(transform, shape, expected):
    """Oracle: torch's own chunk, mT and indexing."""
    source = torch.arange(1.0, 1 + torch.Size(transform.source_shape(shape)).numel())
    source = source.reshape(transform.source_shape(shape))
    result = transform.apply(source)
    assert tuple(result.shape) == shape
    assert torch.equal(result, expected(source))


def test_a_rule_takes_one_transform_or_several():
    single = WeightRule("a", "b", (1,), transform=Transpose())
    several = WeightRule("a", "b", (1,), transform=(Transpose(), Chunk(0, 2)))
    assert single.steps == Transpose()
    assert several.steps == Compose((Transpose(), Chunk(0, 2)))


def test_rows_of_a_linear_layer_and_of_a_norm():
    """Oracle: the rows, written out."""
    chunk = Chunk(1, 3)
    assert linear_rules("a", "b", (4, 2), Shard.ROW, transform=(chunk,), transposed=True) == [
        WeightRule("a.weight", "b.weight", (4, 2), Shard.ROW, (Transpose(), chunk), quantizable=True),
        WeightRule("a.bias", "b.bias", (4,), Shard.REPLICATE, (chunk,)),
    ]
    assert linear_rules("a", "b", (4, 2), Shard.HEADS, bias=False) == [
        WeightRule("a.weight", "b.weight", (4, 2), Shard.HEADS, (), quantizable=True)
    ]
    assert norm_rules(("a", "c"), "b", size="head_dim") == [
        WeightRule(("a.weight", "c.weight"), "b.weight", ("head_dim",)),
        WeightRule(("a.bias", "c.bias"), "b.bias", ("head_dim",)),
    ]
    assert norm_rules("a", "b", bias=False) == [WeightRule(("a.weight",), "b.weight", ("hidden_size",))]


def test_expand_gives_every_layer_with_sizes_and_sources():
    """Oracle: the table above, by hand."""
    weights = {weight.name: weight for weight in TABLE.expand(CONFIG)}
    assert list(weights) == [
        "token_embedding.weight",
        "layers.0.query.weight",
        "layers.1.query.weight",
        "head.weight",
    ]
    query = weights["layers.1.query.weight"]
    assert query.sources == ("model.layers.1.q.weight", "layers.1.q.weight")
    assert query.shape == (8, 8)
    assert query.unit == 2 * CONFIG.head_dim  # two heads of queries for one of keys and values
    assert query.quantizable
    assert weights["head.weight"].tied_to == "token_embedding.weight"


def test_match_finds_the_source_of_each_weight():
    plan = TABLE.match(CONFIG, AVAILABLE, "dir")
    assert plan.sources == {
        "token_embedding.weight": "model.embed.weight",
        "layers.0.query.weight": "model.layers.0.q.weight",
        "layers.1.query.weight": "model.layers.1.q.weight",
        "head.weight": "model.embed.weight",
    }


def test_every_prefix_is_accepted():
    plain = {name.removeprefix("model."): shape for name, shape in AVAILABLE.items()}
    assert TABLE.match(CONFIG, plain, "dir").sources["layers.0.query.weight"] == "layers.0.q.weight"


def test_a_stray_tied_head_is_accepted_and_not_used():
    plan = TABLE.match(CONFIG, {**AVAILABLE, "lm_head.weight": (11, 8)}, "dir")
    assert plan.sources["head.weight"] == "model.embed.weight"


def test_a_shared_tensor_under_the_name_of_the_tied_weight_only():
    available = {**AVAILABLE, "lm_head.weight": (11, 8)}
    del available["model.embed.weight"]
    plan = TABLE.match(CONFIG, available, "dir")
    assert plan.sources["token_embedding.weight"] == plan.sources["head.weight"] == "lm_head.weight"


@pytest.mark.parametrize("name", ["layers.0.rotary.inv_freq", "model.layers.0.rotary.inv_freq"])
def test_known_and_unneeded_tensors_are_ignored(name):
    assert TABLE.match(CONFIG, {**AVAILABLE, name: (2,)}, "dir").sources


def test_one_error_lists_all_that_does_not_fit():
    """Oracle: one tensor missing, two unexpected, one mis-shaped, each named with its shapes, in one line."""
    available = {
        "model.embed.weight": (12, 8),
        "model.layers.0.q.weight": (8, 8),
        "model.layers.2.q.weight": (8, 8),
        "extra": (3,),
    }
    with pytest.raises(CheckpointError) as caught:
        TABLE.match(CONFIG, available, "some/dir")
    assert str(caught.value) == (
        "some/dir: tensors do not fit config.json: 1 missing: model.layers.1.q.weight [8, 8]; "
        "2 unexpected: model.layers.2.q.weight [8, 8]; extra [3]; "
        "1 mis-shaped: model.embed.weight is [12, 8], expected [11, 8]"
    )


def test_a_missing_head_is_named_as_hugging_face_does():
    """Oracle: `OPTForCausalLM`, `LlamaForCausalLM`: the head stands beside `model.`, under which all else is."""
    table = WeightTable((EMBED, QUERY, dataclasses.replace(HEAD, tied_to=None)), TABLE.prefixes)
    with pytest.raises(CheckpointError, match=r"1 missing: lm_head\.weight \[11, 8\]$"):
        table.match(CONFIG, AVAILABLE, "dir")


def test_the_same_weight_under_two_prefixes_is_unexpected():
    with pytest.raises(CheckpointError, match=r"1 unexpected: embed\.weight"):
        TABLE.match(CONFIG, {**AVAILABLE, "embed.weight": (11, 8)}, "dir")


@pytest.mark.parametrize(
    ("rules", "named"),
    [
        ((EMBED, EMBED), "two rules give the weight 'token_embedding.weight'"),
        ((WeightRule("a", "a", ()),), "'a' has the shape"),
        ((WeightRule("a", "a", (0,)),), "'a' has the shape"),
        ((HEAD,), "'head.weight' is tied to 'token_embedding.weight'"),
        ((EMBED, WeightRule("a", "a", (3,), tied_to="token_embedding.weight")), "'a' is tied to"),
    ],
)
def test_a_table_that_contradicts_itself_is_refused(rules, named):
    with pytest.raises(PluginError, match=named):
        WeightTable(rules).expand(CONFIG)


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"shard": "column"}, "'a': shard is 'column'; accepted: Shard.REPLICATE, COLUMN"),
        ({"transform": Transpose}, "'a': transform <class .*Transpose'> is not an object with describe"),
        ({"transform": [Transpose()]}, "'a': transform .* is not an object with"),
        ({"transform": (Transpose(), torch.t)}, "'a': transform <built-in .*> is not an object with"),
        ({"source": "h.{i}.a"}, "'a' has no {i}, and its source 'h.{i}.a' has one for every layer"),
    ],
)
def test_a_row_of_wrong_types_is_refused_where_it_is_made(row, named):
    with pytest.raises(PluginError, match=named):
        WeightRule(**{"source": "a", "name": "a", "shape": (1, 2), **row})


@pytest.mark.parametrize(
    ("table", "named"),
    [
        ({"prefixes": "model."}, "prefixes is the text 'model.'; expected a tuple"),
        ({"ignore": "*.mask"}, "ignore is the text"),
        ({"rules": ("a",)}, "'a' is not a WeightRule"),
    ],
)
def test_a_table_of_wrong_types_is_refused_where_it_is_made(table, named):
    with pytest.raises(PluginError, match=named):
        WeightTable(**{"rules": (EMBED,), **table})


def test_describe_is_a_markdown_table_of_all_rules():
    rows = TABLE.describe().splitlines()
    assert len(rows) == 2 + len(TABLE.rules)
    assert rows[3] == (
        "| `layers.{i}.q.weight` | `layers.{i}.query.weight` | [num_heads*head_dim, hidden_size] | heads |  |"
    )
    assert rows[4].endswith("| tied to `token_embedding.weight` |")
