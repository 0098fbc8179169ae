"""Edge lists, against the oracle mask pair by pair."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax.patterns import PatternError, parse
from tests.patterns.strategies import patterns
from tests.patterns.test_layout import measured


@settings(max_examples=60)
@given(patterns(longest=300), st.integers(0, 300), st.integers(0, 300))
def test_edges_are_the_pairs_of_the_mask_in_order(pattern, t, s):
    q, k = np.arange(t)[:, None], np.arange(s)[None, :]
    counts, lists = pattern.counts(q, k, t, s), pattern.edges(t, s)
    for times, edges in zip(counts, lists, strict=True) if pattern.heads else [(counts, lists)]:
        assert [positions.dtype for positions in edges] == [np.int32, np.int32]
        places = np.nonzero(np.broadcast_to(times, (t, s)))
        np.testing.assert_array_equal(edges, [np.repeat(place, times[places]) for place in places])


@given(patterns(longest=200), st.integers(0, 200))
def test_edges_are_square_unless_said(pattern, t):
    np.testing.assert_equal(pattern.edges(t), pattern.edges(t, t))


def test_equal_heads_share_their_edges():
    first, second, third = parse("per_head(window(3), causal, window(3)) & full").edges(300)
    assert first is third
    assert first is not second


def test_edges_refuse_lengths_that_cannot_be():
    with pytest.raises(PatternError, match="lengths >= 0"):
        parse("causal").edges(-1)


def test_edges_of_a_long_sequence():
    # By tiles: neither all pairs nor the million pairs of the globals are looked at, of which the window leaves few.
    length = 131_072
    pattern = parse("window(3) & globals([5, 70000, -1])")
    (queries, keys), peak = measured(lambda: pattern.edges(length))
    assert list(zip(queries.tolist(), keys.tolist(), strict=True)) == [
        *[(5, k) for k in (2, 3, 4, 5)],
        *[(q, 5) for q in (6, 7, 8)],
        *[(70_000, k) for k in range(69_997, 70_001)],
        *[(q, 70_000) for q in range(70_001, 70_004)],
        *[(length - 1, k) for k in range(length - 4, length)],
    ]
    assert peak < 4_000_000
