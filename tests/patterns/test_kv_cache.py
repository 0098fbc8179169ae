"""KV caches: no key is overwritten before the last query that attends to it, and no slot is wasted."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax.patterns import Causal, Pattern, parse, plan_cache
from tests.patterns.strategies import patterns

pytestmark = pytest.mark.quick


def lost_keys(pattern: Pattern, length: int) -> list[tuple[int, int]]:
    """Decodes token by token: the (query, key) pairs whose key was overwritten before the query."""
    plan = plan_cache(pattern, length)
    slots, count = plan.slots, plan.count
    mask = pattern.dense(length)
    mask = mask.any(axis=0) if pattern.heads else mask
    cache, lost = np.full(count, -1), []
    for query in range(length):
        cache[slots[query]] = query
        past = np.flatnonzero(mask[query, : query + 1])
        lost += [(query, int(key)) for key in past if cache[slots[key]] != key]
    return lost


@settings(max_examples=100)
@given(patterns(longest=30), st.integers(0, 60))
def test_no_key_is_lost(pattern, length):
    plan = plan_cache(pattern, length)
    slots, count = plan.slots, plan.count
    assert slots.shape == (length,)
    assert slots.dtype == np.int32
    assert 0 <= count <= length
    assert ((slots >= 0) & (slots < count)).all()
    assert lost_keys(pattern, length) == []


@given(st.integers(0, 30), st.lists(st.integers(0, 30), min_size=1, max_size=4), st.integers(1, 40))
def test_no_key_is_lost_around_pinned_keys(left, ids, length):
    assert lost_keys(parse(f"causal & (window({left}) | globals({ids}))"), length) == []


@pytest.mark.parametrize(
    ("text", "length", "count"),
    [
        ("window(7)", 100, 8),
        ("window(0)", 100, 1),
        ("window(7, 3)", 100, 8),
        ("causal & window(7)", 100, 8),
        ("window(7)", 5, 5),
        ("window(99)", 100, 100),
        ("causal & (window(7) | sink(4))", 100, 4 + 7 + 1),
        ("causal & (sink(1) | window(0))", 100, 1 + 0 + 1),
        ("causal & (window(7) | sink(4))", 10, 10),
        ("causal & (window(7) | sink(40))", 10, 10),
        ("causal", 100, 100),
        ("full", 100, 100),
        ("causal & chunk(16)", 100, 16),
        ("causal & (window(7) | globals([50]))", 100, 1 + 51),
        ("per_head(window(7), window(3) | sink(2)) & causal", 100, 2 + 7 + 1),
        ("causal", 0, 0),
        ("window(3)", 0, 0),
        ("window(3)", 1, 1),
    ],
)
def test_slot_count(text, length, count):
    plan = plan_cache(parse(text), length)
    assert plan.count == count
    assert len(plan.slots) == length


@settings(max_examples=100)
@given(patterns(longest=30), st.integers(0, 40))
def test_the_plan_states_what_each_slot_holds(pattern, length):
    plan = plan_cache(pattern, length)
    cache = np.full(plan.count, -1)
    overwritten = np.full(length, length)
    for key in range(length):
        np.testing.assert_array_equal(plan.held(np.int32(key)), cache)
        if cache[plan.slots[key]] >= 0:
            overwritten[cache[plan.slots[key]]] = key
        cache[plan.slots[key]] = key
    np.testing.assert_array_equal(plan.held(np.array([length, 0])), [cache, np.full(plan.count, -1)])
    np.testing.assert_array_equal(plan.overwritten, overwritten)


class NewerHalf(Causal):
    """A query attends to the newer half of its past: the older a key, the longer it stays."""

    def allows(self, q, k, t=None, s=None):
        return (k <= q) & (k >= q // 2)

    def last_query(self, k):
        return 2 * k + 1


def test_the_ring_is_no_longer_than_the_sequence_needs():
    assert plan_cache(NewerHalf(), 1024).count == 513  # the keys of query 1022 or 1023
    assert lost_keys(NewerHalf(), 1024) == []
