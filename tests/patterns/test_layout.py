"""Tile layouts and pair counts, against the oracle mask cut into tiles."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax.patterns import Globals, PatternError, TileGrid, TileLayout, parse
from sparsejax.patterns.layout import COUNT_AT_ONCE
from tests.patterns.strategies import patterns, shared_patterns

LENGTHS = st.integers(20, 45)
TILES = st.sampled_from([(4, 4), (3, 7), (8, 5), (5, 13), (2, 9), (1, 1), (64, 64)])


def tile_states(mask: np.ndarray, tile: tuple[int, int]) -> np.ndarray:
    """0 dead, 1 partial, 2 full for each tile of a mask [t, s]."""
    t, s = mask.shape
    rows, columns = range(0, t, tile[0]), range(0, s, tile[1])
    parts = [mask[i : i + tile[0], j : j + tile[1]] for i in rows for j in columns]
    return np.array([int(part.any()) + int(part.all()) for part in parts], int).reshape(len(rows), len(columns))


def check(layout: TileLayout, mask: np.ndarray, tile: tuple[int, int]):
    expected = tile_states(mask, tile)
    assert (layout.grid.t, layout.grid.s, layout.grid.tile) == (*mask.shape, tile)
    assert (layout.grid.rows, layout.grid.columns) == expected.shape
    # The arrays themselves, not only the picture: a repeated or unsorted column would not show in it.
    rows, columns = np.nonzero(expected)
    np.testing.assert_array_equal(layout.rows, rows)
    np.testing.assert_array_equal(layout.columns, columns)
    np.testing.assert_array_equal(layout.full, expected[rows, columns] == 2)
    np.testing.assert_array_equal(layout.degrees, (expected > 0).sum(axis=1))
    np.testing.assert_array_equal(layout.starts, np.searchsorted(rows, range(expected.shape[0] + 1)))
    np.testing.assert_array_equal(layout.dense(), expected)
    assert layout.density == pytest.approx((expected > 0).mean() if expected.size else 0)
    assert layout.full.dtype == np.bool_
    assert layout.columns.dtype == np.int32


@settings(max_examples=2000)
@given(patterns(longest=45), LENGTHS, LENGTHS, TILES)
def test_layout_is_the_oracle_mask_in_tiles(pattern, t, s, tile):
    masks, layouts = pattern.dense(t, s), pattern.layout(t, s, tile)
    if pattern.heads is None:
        masks, layouts = masks[None], (layouts,)
    assert len(layouts) == len(masks)
    for mask, layout in zip(masks, layouts, strict=True):
        check(layout, mask, tile)
        check(layout.transpose(), mask.T, tile[::-1])
        check(layout.transpose().transpose(), mask, tile)


@pytest.mark.parametrize(("t", "s"), [(0, 0), (0, 9), (9, 0), (1, 1), (1, 9), (9, 1), (8, 8)])
@given(pattern=shared_patterns(longest=10))
def test_layout_of_next_to_nothing(t, s, pattern):
    check(pattern.layout(t, s, (4, 3)), pattern.dense(t, s), (4, 3))
    assert pattern.pairs(t, s) == pattern.dense(t, s).sum()


@settings(max_examples=15)
@given(patterns(longest=700), st.integers(1, 700), st.integers(1, 700))
def test_layout_in_the_default_tiles(pattern, t, s):
    masks, layouts = pattern.dense(t, s), pattern.layout(t, s)
    for mask, layout in zip(masks, layouts, strict=True) if pattern.heads else [(masks, layouts)]:
        check(layout, mask, (128, 128))


def test_layout_counts_more_tiles_than_fit_at_once():
    # Both terms touch each of the 400 tiles, at positions of their own: every tile has to be looked at.
    pattern = Globals(tuple(range(0, 120, 6))) & Globals(tuple(range(1, 120, 6)))
    layout = pattern.layout(120, tile=(6, 6))
    assert len(layout.columns) == 400 > COUNT_AT_ONCE
    check(layout, pattern.dense(120), (6, 6))


@settings(max_examples=100)
@given(shared_patterns(longest=45), LENGTHS, LENGTHS, TILES)
def test_tiles_of_equal_signature_hold_the_same_pairs(pattern, t, s, tile):
    # Such tiles are counted once for all. Only whole tiles: cut ones differ by their shape anyway.
    q0, k0 = (np.arange(n // size) * size for n, size in zip((t, s), tile, strict=True))
    q0, k0 = (x.ravel() for x in np.meshgrid(q0, k0))
    mask, seen, grid = pattern.dense(t, s), {}, TileGrid(t, s, tile)
    for i, j, *signature in np.stack([q0, k0, *pattern.signature(grid, q0, k0)], axis=1).tolist():
        pairs = mask[i : i + tile[0], j : j + tile[1]]
        np.testing.assert_array_equal(seen.setdefault(tuple(signature), pairs), pairs)


@settings(max_examples=100)
@given(patterns(longest=300), st.integers(150, 300), st.integers(150, 300))
def test_pairs_are_counted_exactly(pattern, t, s):
    count = pattern.pairs(t, s)
    assert type(count) is int
    assert count == pattern.dense(t, s).sum()


@pytest.mark.parametrize("text", ["globals(5)", "globals([5, -2])", "sink(5)", "window(200)", "chunk(150) | sink(5)"])
def test_pairs_of_cut_tiles_are_counted_exactly(text):
    # The last row and column of the default tiles are cut, and cut tiles count less than the whole ones like them.
    for t, s in [(300, 290), (270, 400), (400, 260)]:
        assert parse(text).pairs(t, s) == parse(text).dense(t, s).sum()


@given(patterns(longest=200), st.integers(0, 200))
def test_pairs_and_layout_are_square_unless_said(pattern, t):
    assert pattern.pairs(t) == pattern.pairs(t, t)
    layouts = pattern.layout(t) if pattern.heads else [pattern.layout(t)]
    assert all(layout.grid.s == t for layout in layouts)


def test_equal_heads_share_their_layout():
    first, second, third = parse("per_head(window(3), causal, window(3)) & full").layout(300)
    assert first is third
    assert first is not second


def test_layout_refuses_lengths_and_tiles_that_cannot_be():
    for arguments in [(-1,), (4, -1), (4, 4, (0, 8)), (4, 4, (8, -1))]:
        with pytest.raises(PatternError, match="layout needs"):
            parse("causal").layout(*arguments)


def test_layout_of_a_long_sequence():
    length, left, sink, tile = 131_072, 4095, 128, 128
    pattern = parse(f"causal & (window({left}) | sink({sink}))")
    layout, peak = measured(lambda: pattern.layout(length))
    # The window of query tile r starts at key 128 r - 4095, in tile r - 32. The first 33 rows reach the tile of
    # the sinks with their window; the other 991 have it besides.
    rows, near = length // tile, (left + 1) // tile
    assert len(layout.columns) == (near + 1) * (near + 2) // 2 + (rows - near - 1) * (near + 2) == 34_255
    # Partial are the tile on the diagonal and, from row 33 on, the one in which the window starts; in row 32 that
    # is the tile of the sinks.
    assert (~layout.full).sum() == rows + (rows - near - 1)
    assert peak < 400 * len(layout.columns) < length * length // 1000
    # Each query has itself and up to 4095 before it, and the sinks that lie before those.
    query = np.arange(length)
    expected = np.minimum(query, left) + 1 + np.clip(query - left, 0, sink)
    assert pattern.pairs(length) == expected.sum()


def test_memory_does_not_grow_with_the_number_of_globals():
    pattern = parse("globals(1000000) & window(3)")
    _, peak = measured(lambda: (pattern.layout(1024), pattern.lookahead(), pattern.last_query(np.arange(1024))))
    assert peak < 1_000_000


def measured(call):
    """The result and the most bytes that were held on the way."""
    tracemalloc.start()
    try:
        return call(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
