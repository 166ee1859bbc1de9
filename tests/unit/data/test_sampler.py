"""Order of the training samples."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpscl_ray.data.sampler import (
    Foreground,
    StepOrder,
    derive_seed,
    epoch_permutation,
    sample_keys,
    sample_positions,
    shard_range,
    splitmix64,
)
from mpscl_ray.errors import ConfigError


def union_over_ranks(world_size: int, steps: int, **order) -> list[list[int]]:
    ranks = [StepOrder(rank=rank, world_size=world_size, **order) for rank in range(world_size)]
    return [[int(row) for rank in ranks for row in rank.batch_rows(step)] for step in range(steps)]


@pytest.mark.parametrize("rows", [1, 3, 8, 37])
def test_union_over_ranks_does_not_depend_on_their_number(rows: int) -> None:
    order = {"seed": 3, "domain": "source", "rows": rows, "global_batch": 8}
    one = union_over_ranks(1, 12, **order)
    assert union_over_ranks(2, 12, **order) == one
    assert union_over_ranks(4, 12, **order) == one


@given(rows=st.integers(1, 60), batch=st.integers(1, 16), seed=st.integers(-(2**70), 2**70), epochs=st.integers(1, 4))
def test_every_row_once_in_every_epoch(rows: int, batch: int, seed: int, epochs: int) -> None:
    order = StepOrder(seed=seed, domain="target", rows=rows, global_batch=batch)
    steps = -(-rows * epochs // batch)
    stream = np.concatenate([order.batch_rows(step) for step in range(steps)])
    for epoch in range(epochs):
        assert sorted(stream[epoch * rows : (epoch + 1) * rows]) == list(range(rows))


def test_position_in_the_stream_is_the_step_number() -> None:
    order = StepOrder(seed=0, domain="source", rows=10, global_batch=4, rank=1, world_size=2)
    from_start = order.steps()
    for _ in range(7):
        next(from_start)
    resumed = order.steps(start_step=7)
    for _ in range(9):
        np.testing.assert_array_equal(next(from_start), next(resumed))


def test_shorter_domain_repeats_while_the_longer_continues() -> None:
    short = StepOrder(seed=0, domain="target", rows=5, global_batch=4)
    counts = np.bincount(np.concatenate([short.batch_rows(step) for step in range(25)]), minlength=5)
    np.testing.assert_array_equal(counts, [20] * 5)


def test_batch_larger_than_the_domain_wraps_into_the_next_epoch() -> None:
    rows = sample_positions(1, "source", 3, 0, 8)
    assert sorted(rows[:3]) == sorted(rows[3:6]) == [0, 1, 2]
    np.testing.assert_array_equal(rows[6:], epoch_permutation(1, "source", 2, 3)[:2])


def test_order_changes_with_seed_domain_and_epoch() -> None:
    base = epoch_permutation(0, "source", 0, 100)
    for other in (
        epoch_permutation(1, "source", 0, 100),
        epoch_permutation(0, "target", 0, 100),
        epoch_permutation(0, "source", 1, 100),
    ):
        assert np.count_nonzero(base == other) < 10


def test_order_is_frozen_for_all_time() -> None:
    """A run resumed by a later version must see the same order."""
    assert epoch_permutation(0, "source", 0, 8).tolist() == [1, 3, 2, 4, 5, 6, 0, 7]
    assert sample_keys(0, "target", 0, 2).tolist() == [8599678855072798564, 12015907974334490986]


def test_permutations_are_uniform() -> None:
    """Each row is equally likely at each position: 4000 permutations of 5, each cell 800 +- 25 (1 sd)."""
    table = np.zeros((5, 5), dtype=int)
    for epoch in range(4000):
        table[np.arange(5), epoch_permutation(9, "source", epoch, 5)] += 1
    assert abs(table - 800).max() < 130


def test_augmentation_keys_belong_to_the_position_only() -> None:
    order = {"seed": 5, "domain": "source", "rows": 3, "global_batch": 4}
    one = StepOrder(**order).batch_keys(6)
    two = [StepOrder(rank=rank, world_size=2, **order).batch_keys(6) for rank in (0, 1)]
    np.testing.assert_array_equal(one, np.concatenate(two))
    assert np.unique(sample_keys(5, "source", 0, 10_000)).size == 10_000
    assert not np.isin(sample_keys(5, "target", 0, 1000), sample_keys(5, "source", 0, 1000)).any()


def test_hash_of_two_positions_has_no_visible_correlation() -> None:
    bits = np.unpackbits(splitmix64(np.arange(4096), derive_seed("a")).view(np.uint8).reshape(4096, 8), axis=1)
    assert abs(bits.mean(axis=0) - 0.5).max() < 0.05
    assert abs((bits[1:] ^ bits[:-1]).mean(axis=0) - 0.5).max() < 0.05


def test_batch_that_does_not_divide_is_refused_with_both_numbers() -> None:
    with pytest.raises(ConfigError, match=r"6 source slices .* 4 workers"):
        StepOrder(seed=0, domain="source", rows=10, global_batch=6, rank=0, world_size=4)
    with pytest.raises(ConfigError, match="target domain has no slices"):
        StepOrder(seed=0, domain="target", rows=0, global_batch=4)


@given(count=st.integers(0, 50), world_size=st.integers(1, 9))
def test_shards_cover_everything_once(count: int, world_size: int) -> None:
    parts = [shard_range(count, rank, world_size) for rank in range(world_size)]
    assert [i for part in parts for i in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(
    share=st.floats(0.001, 1),
    shown=st.integers(1, 30),
    others=st.integers(1, 30),
    batch=st.sampled_from([4, 8, 12]),
)
def test_the_share_of_rows_with_a_structure_is_exact_and_even(
    share: float, shown: int, others: int, batch: int
) -> None:
    """Each kind is a stream of its own, every row of it once in an epoch."""
    rows = np.sort(np.random.default_rng(shown).permutation(shown + others)[:shown])
    order = StepOrder(3, "source", shown + others, batch, foreground=Foreground(share, rows, shown + others))
    stream = np.concatenate([order.batch_rows(step) for step in range(240 // batch)])
    shows = np.isin(stream, rows)
    exact = np.arange(1, 241) * round(share, 6)
    assert (np.abs(np.cumsum(shows) - exact)[batch - 1 :: batch] < 1 + 1e-9).all()
    for kind, count in ((stream[shows], shown), (stream[~shows], others)):
        epochs = [kind[first : first + count] for first in range(0, len(kind) - count + 1, count)]
        assert all(len(set(epoch.tolist())) == count for epoch in epochs)


def test_rows_with_a_structure_do_not_depend_on_the_workers_and_resume() -> None:
    options = {
        "seed": 3,
        "domain": "source",
        "rows": 37,
        "global_batch": 8,
        "foreground": Foreground(0.9, np.arange(5, 20), 37),
    }
    one = union_over_ranks(1, 12, **options)
    assert union_over_ranks(2, 12, **options) == union_over_ranks(4, 12, **options) == one
    resumed = StepOrder(**options).steps(7)
    assert [next(resumed).tolist() for _ in range(5)] == one[7:]
    assert one != union_over_ranks(1, 12, **{**options, "seed": 4})


def test_slices_with_a_structure_are_at_every_place_of_a_batch_alike() -> None:
    order = StepOrder(3, "source", 100, 8, foreground=Foreground(0.5, np.arange(50), 100))
    shows = np.array([order.batch_rows(step) < 50 for step in range(400)])
    assert (shows.sum(axis=1) == 4).all()
    assert np.abs(shows.mean(axis=0) - 0.5).max() < 0.1, "so neither half of a batch lacks them"
    assert 0.05 < np.mean(shows[:, ::2].sum(axis=1) == 3) < 0.5, "and they alternate by chance alone"


def test_where_all_rows_or_none_show_a_structure() -> None:
    order = StepOrder(0, "source", 6, 6, foreground=Foreground(0.5, np.arange(6), 6))
    assert sorted(order.batch_rows(3)) == list(range(6)), "there are no others to take"
    only = StepOrder(0, "source", 9, 8, foreground=Foreground(1, np.array([2, 5]), 9))
    assert np.bincount(only.batch_rows(1), minlength=9).tolist() == [0, 0, 4, 0, 0, 4, 0, 0, 0]
    with pytest.raises(ConfigError, match=r"data\.foreground_share=0\.9 .* no labelled training slice"):
        Foreground(0.9, np.array([], dtype=np.int64), 6)
