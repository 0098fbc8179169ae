"""The plan of an exchange gives every query its keys, and sends no more than it must."""

import numpy as np
import pytest

from sparsejax import patterns
from sparsejax.patterns.exchange import choose_tile, plan_exchange

pytestmark = pytest.mark.quick

KINDS = [  # pattern, length, shards, kind
    ("causal & window(31)", 1024, 8, "halo"),
    ("causal & window(200)", 1024, 8, "halo"),  # longer than a shard
    ("window(40, 40)", 1024, 4, "halo"),
    ("causal & chunk(128)", 1024, 8, "none"),
    ("causal & (window(31) | sink(4))", 1024, 8, "halo + pinned"),
    ("window(31, 31) | globals([0])", 2048, 8, "halo + pinned"),
    ("causal & (window(31) | random(1, tile=16, seed=0))", 4096, 4, "tiles"),
    ("causal", 1024, 8, "all-gather with mirror swap"),
    ("full", 1024, 8, "all-gather"),
]


@pytest.mark.parametrize(("pattern", "length", "shards", "kind"), KINDS)
def test_the_kind_follows_from_the_pattern(pattern, length, shards, kind):
    assert plan_exchange(patterns.parse(pattern), length, shards).kind == kind


@pytest.mark.parametrize(("pattern", "length", "shards", "kind"), KINDS)
def test_every_live_tile_is_computed_once(pattern, length, shards, kind):
    plan = plan_exchange(patterns.parse(pattern), length, shards)
    computed = np.zeros((shards * plan.rows,) * 2, int)
    for queries, keys, rows in zip(plan.queries, plan.keys, plan.live(), strict=True):
        for query, slots in zip(queries, rows, strict=True):
            assert (slots >= 0).all()
            computed[query, keys[slots]] += 1
    for shard, rows in enumerate(plan.live_pinned()):
        for query, held in zip(plan.pinned_queries, rows, strict=True):
            computed[query, held + shard * plan.rows] += 1
    np.testing.assert_array_equal(computed, plan.layout.dense() > 0)
    assert plan.tiles_per_shard.sum() == len(plan.layout.columns)


@pytest.mark.parametrize("shards", [2, 4, 8, 64])
def test_a_mirror_swap_makes_causal_work_equal(shards):
    counts = plan_exchange(patterns.parse("causal"), 256 * shards, shards).tiles_per_shard
    assert counts.min() == counts.max()


def test_a_halo_is_as_long_as_the_window():
    plan = plan_exchange(patterns.parse("causal & window(512)"), 262_144, 4)
    assert plan.key_tokens == 512
    assert plan_exchange(patterns.parse("causal"), 262_144, 4).key_tokens == 3 * 65_536


@pytest.mark.parametrize("tokens", [1, 7, 37, 64, 74, 96, 509, 1000, 1009, 4096])
def test_tiles_divide_a_shard(tokens):
    tile = choose_tile(tokens)
    assert tokens % tile == 0
    assert tile >= 16 or tokens < 16


@pytest.mark.parametrize(
    ("pattern", "length", "shards"), [("causal", 1024, 8), ("causal", 111 * 4, 4), ("full", 128, 2)]
)
def test_a_ring_visits_every_live_tile_once(pattern, length, shards):
    plan = plan_exchange(patterns.parse(pattern), length, shards, ring=True)
    assert plan.ring
    visited = set()
    for step in range(shards):
        for shard, rows in enumerate(plan.visits(step)):
            held = plan.queries[(shard - step) % shards]
            tiles = {
                (int(query), int(held[i])) for query, row in zip(plan.queries[shard], rows, strict=True) for i in row
            }
            assert not tiles & visited
            visited |= tiles
    assert visited == set(zip(plan.layout.rows.tolist(), plan.layout.columns.tolist(), strict=True))


@pytest.mark.parametrize("shards", [2, 4, 8])
def test_a_causal_ring_is_equal_work_in_every_step(shards):
    plan = plan_exchange(patterns.parse("causal"), 256 * shards, shards, ring=True)
    counts = np.array([[sum(map(len, rows)) for rows in plan.visits(step)] for step in range(shards)])
    assert (counts[0] == counts[0, 0]).all()
    assert (counts[1:] == plan.rows**2 // 2).all()


def test_a_window_has_no_ring():
    plan = plan_exchange(patterns.parse("causal & window(512)"), 16_384, 4, ring=True)
    assert not plan.ring
    assert plan.kind == "halo"
