"""Sharding rules: shards cover the whole exactly, and what cannot be split evenly is refused by name."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trtc.core.errors import CheckpointError, ConfigError
from trtc.core.sharding import (
    AxisSlice,
    Shard,
    ShardingOptions,
    local_shape,
    narrow_or_pad,
    padded,
    share_rows,
    slice_bounds,
    split_axis,
)

PARALLEL_EMBEDDING = [
    {"use_parallel_embedding": False},
    {"use_parallel_embedding": True, "embedding_sharding_dim": 0},
    {"use_parallel_embedding": True, "embedding_sharding_dim": 1},
]


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"tp_size": 0}, "tp_size is 0"),
        ({"tp_size": True}, "tp_size is True"),
        ({"tp_size": 2.0}, "tp_size is 2.0"),
        ({"embedding_sharding_dim": 2}, "embedding_sharding_dim is 2"),
        ({"use_parallel_embedding": 1}, "use_parallel_embedding is 1"),
    ],
)
def test_bad_options_are_refused_by_name(values, named):
    """Oracle: the accepted values in the docstring of ShardingOptions."""
    with pytest.raises(ConfigError, match=named):
        ShardingOptions(**values)


def test_options_round_trip_through_json():
    options = ShardingOptions(4, use_parallel_embedding=True, embedding_sharding_dim=1)
    assert ShardingOptions.from_json(options.to_json(), "x") == options


@pytest.mark.parametrize(
    "value", [None, [], {}, {"tp_size": 2}, {**ShardingOptions().to_json(), "tp_size": -1}]
)
def test_bad_json_options_are_a_checkpoint_error(value):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        ShardingOptions.from_json(value, "config.json")


@pytest.mark.parametrize(
    ("shard", "axes"),
    [
        (Shard.REPLICATE, [None, None, None]),
        (Shard.COLUMN, [0, 0, 0]),
        (Shard.ROW, [1, 1, 1]),
        (Shard.HEADS_ROW, [1, 1, 1]),
        (Shard.HEADS, [0, 0, 0]),
        (Shard.VOCAB_HEAD, [0, 0, 0]),
        (Shard.EMBEDDING, [None, 0, 1]),
    ],
)
def test_split_axis_of_each_rule(shard, axes):
    """Oracle: Megatron-LM's column and row parallel axes; the embedding follows its options."""
    assert [split_axis(shard, ShardingOptions(2, **embedding)) for embedding in PARALLEL_EMBEDDING] == axes
    assert split_axis(shard, ShardingOptions(1, use_parallel_embedding=True)) is None


@settings(deadline=None)
@given(size=st.integers(1, 10**6), unit=st.integers(1, 8), tp=st.integers(1, 64))
def test_padding_reaches_the_next_multiple(size, unit, tp):
    found = padded(size, unit, tp)
    assert found % (tp * unit) == 0
    assert size <= found < size + tp * unit


@settings(deadline=None)
@given(
    data=st.data(),
    tp=st.integers(1, 8),
    unit=st.integers(1, 6),
    embedding=st.sampled_from(PARALLEL_EMBEDDING),
)
def test_slices_partition_the_padded_axis_in_whole_units(data, tp, unit, embedding):
    """Oracle: range(padded size), put together from the slices of all ranks in order."""
    shard = data.draw(st.sampled_from(Shard))
    options = ShardingOptions(tp, **embedding)
    if shard not in (Shard.HEADS, Shard.HEADS_ROW):
        unit = 1
    # so many that every rank has some: 12 over 8 ranks would be 2 on each of 6
    sizes = st.integers(tp * (tp - 1), tp * (tp + 5)).filter(bool)
    shape = (unit * data.draw(sizes), unit * data.draw(sizes))
    parts = [slice_bounds(shape, shard, options, rank, name="w", unit=unit) for rank in range(tp)]
    local = local_shape(shape, shard, options, name="w", unit=unit)
    if split_axis(shard, options) is None:
        assert parts == [None] * tp
        assert local == shape
        return
    axis = parts[0].axis
    covered = [index for part in parts for index in range(part.start, part.stop)]
    assert covered == list(range(padded(shape[axis], unit, tp)))
    assert all(part.start % unit == 0 for part in parts)
    assert {part.stop - part.start for part in parts} == {local[axis]}
    assert shard in (Shard.VOCAB_HEAD, Shard.EMBEDDING) or parts[-1].start < shape[axis]


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("shard", [Shard.COLUMN, Shard.ROW, Shard.HEADS, Shard.HEADS_ROW, Shard.VOCAB_HEAD])
@pytest.mark.parametrize("size", [13, 16])
def test_shards_put_together_are_the_whole(shard, size, tp):
    """Oracle: torch.cat; what lies beyond 13 is zero."""
    options = ShardingOptions(tp)
    axis = split_axis(shard, options)
    whole = torch.arange(size * 8.0).reshape(size, 8) + 1
    whole = whole.t() if axis else whole
    parts = [slice_bounds(tuple(whole.shape), shard, options, rank, name="w") for rank in range(tp)]
    shards = [narrow_or_pad(whole, part) for part in parts]
    assert {tuple(part.shape) for part in shards} == {
        local_shape(tuple(whole.shape), shard, options, name="w")
    }
    together = torch.cat(shards, dim=axis)
    assert torch.equal(together.narrow(axis, 0, size), whole)
    assert not together.narrow(axis, size, together.shape[axis] - size).any()


def test_a_rank_beyond_the_vocabulary_holds_zeros():
    """A vocabulary of 5 over 4 ranks is padded to 8: the last rank has padding only."""
    last = slice_bounds((5, 2), Shard.VOCAB_HEAD, ShardingOptions(4), 3, name="w")
    assert torch.equal(narrow_or_pad(torch.ones(5, 2), last), torch.zeros(2, 2))


def test_a_bias_is_split_like_its_rows():
    assert slice_bounds((12,), Shard.HEADS, ShardingOptions(3), 1, name="b", unit=4) == AxisSlice(0, 4, 8)


def test_heads_are_padded_whole():
    """Five heads of 8 rows over 2 ranks: three on each, the last of them zeros; 40 rows alone would divide by 2."""
    parts = [
        slice_bounds((40, 4), Shard.HEADS, ShardingOptions(2), rank, name="w", unit=8) for rank in (0, 1)
    ]
    assert parts == [AxisSlice(0, 0, 24), AxisSlice(0, 24, 48)]


@pytest.mark.parametrize(
    ("shape", "shard", "unit", "named"),
    [
        ((5, 4), Shard.COLUMN, 1, "layers.0.w: a size of 5 over tp_size 4, 2 on each rank, would leave 1 w"),
        ((4, 5), Shard.ROW, 1, "layers.0.w: a size of 5 over tp_size 4, 2 on each rank, would leave 1 w"),
        (
            (24, 4),
            Shard.HEADS,
            8,
            "3 heads of keys and values over tp_size 4, 1 on each rank, would leave 1 w",
        ),
        ((4, 24), Shard.HEADS_ROW, 8, "3 heads of keys and values over tp_size 4, 1 on"),
    ],
)
def test_what_leaves_a_rank_without_work_is_refused_with_the_sizes(shape, shard, unit, named):
    with pytest.raises(ConfigError, match=named):
        local_shape(shape, shard, ShardingOptions(4), name="layers.0.w", unit=unit)


def shares(shard, size, unit, tp, head=None):
    parts = [
        slice_bounds((size,), shard, ShardingOptions(tp), rank, name="w", unit=unit, head=head)
        for rank in range(tp)
    ]
    return [(part.start, part.stop) for part in parts]


def test_ranks_share_heads_of_keys_and_values_and_divide_the_queries_of_each():
    """By hand: heads of 10 rows. Eight queries and two heads of keys over four ranks; and seven and one, padded."""
    assert shares(Shard.KV_HEADS, 20, 10, 4) == [(0, 10), (0, 10), (10, 20), (10, 20)]
    assert shares(Shard.HEADS, 80, 40, 4, head=10) == [(0, 20), (20, 40), (40, 60), (60, 80)]
    assert shares(Shard.KV_HEADS, 10, 10, 4) == [(0, 10)] * 4
    assert shares(Shard.HEADS, 70, 70, 4, head=10) == [(0, 20), (20, 40), (40, 60), (60, 80)]
    assert shares(Shard.KV_HEADS, 40, 10, 2) == [(0, 20), (20, 40)]  # enough for all


@pytest.mark.parametrize(
    ("size", "unit", "tp", "named"),
    [
        (
            60,
            30,
            4,
            "w: 2 heads of keys and values over tp_size 4: the 3 heads that read each cannot be shared by 2 ra",
        ),
        (
            60,
            60,
            4,
            "w: 1 head of keys and values over tp_size 4: the 6 heads that read it cannot be shared by 4 ra",
        ),
        (
            60,
            30,
            3,
            "w: 2 heads of keys and values over tp_size 3, 1 on each rank, would leave 1 without any",
        ),
        (
            20,
            10,
            4,
            "w: 2 heads of keys and values over tp_size 4, 1 on each rank, would leave 2 without any",
        ),
    ],
)
def test_queries_that_ranks_cannot_share_are_refused_with_the_sizes(size, unit, tp, named):
    """The last: every query has keys of its own, so that nothing can be shared."""
    with pytest.raises(ConfigError, match=named):
        shares(Shard.HEADS, size, unit, tp, head=10)


@pytest.mark.parametrize(("tp", "expected"), [(1, [True, True, True]), (2, [False, True, False])])
def test_a_tied_head_shares_with_the_embedding_only_where_the_shards_are_equal(tp, expected):
    """Oracle: one rank, or an embedding split by vocabulary like the head."""
    shared = [
        share_rows(Shard.VOCAB_HEAD, Shard.EMBEDDING, ShardingOptions(tp, **embedding))
        for embedding in PARALLEL_EMBEDDING
    ]
    assert shared == expected
