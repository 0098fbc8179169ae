"""Every view of a pattern against its mask, with `check_pattern`."""

import dataclasses
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax.errors import InputError
from sparsejax.patterns import Globals, Pattern, PatternError, TileGrid, from_ranges, parse, register
from sparsejax.patterns.layout import TILES_AT_ONCE
from sparsejax.patterns.testing import check_layout, check_pattern
from tests.messages import rejects
from tests.patterns.strategies import NIGHTLY, patterns, shared_patterns

LENGTHS = st.integers(20, 45)
TILES = st.sampled_from([(4, 4), (3, 7), (8, 5), (5, 13), (2, 9), (1, 1), (64, 64)])
DRAWS = given(patterns(longest=45), LENGTHS, LENGTHS, TILES)


@settings(max_examples=100)
@DRAWS
def test_views_agree_with_the_mask(pattern, t, s, tile):
    check_pattern(pattern, [(t, s)], [tile], shifts=())


@pytest.mark.nightly
@NIGHTLY
@DRAWS
def test_views_agree_with_the_mask_nightly(pattern, t, s, tile):
    check_pattern(pattern, [(t, s)], [tile], shifts=())


@settings(max_examples=25)
@given(shared_patterns(longest=10))
def test_views_of_tiny_sequences(pattern):
    check_pattern(pattern, [(0, 0), (0, 9), (9, 0), (1, 1), (1, 9), (9, 1), (8, 8)], [(4, 3)], shifts=())


@settings(max_examples=15)
@given(patterns(longest=700), st.integers(1, 700), st.integers(1, 700))
def test_views_in_the_default_tiles(pattern, t, s):
    check_pattern(pattern, [(t, s)], [(128, 128)], shifts=())


def test_more_undecided_tiles_than_are_counted_at_once():
    # Both terms touch all 400 tiles at different positions: every tile is undecided.
    pattern = Globals(tuple(range(0, 120, 6))) & Globals(tuple(range(1, 120, 6)))
    layout = pattern.layout(120, tile=(6, 6))
    assert len(layout.columns) == 400 > TILES_AT_ONCE
    check_layout(layout, pattern.dense(120), (6, 6))


@pytest.mark.parametrize("text", ["globals(5)", "globals([5, -2])", "sink(5)", "window(200)", "chunk(150) | sink(5)"])
def test_pairs_of_truncated_tiles(text):
    # The last row and column of the default tiles are truncated and hold fewer pairs than the whole tiles like them.
    for t, s in [(300, 290), (270, 400), (400, 260)]:
        assert parse(text).pairs(t, s) == parse(text).dense(t, s).sum()


@given(patterns(longest=200), st.integers(0, 200))
def test_keys_default_to_queries(pattern, t):
    np.testing.assert_array_equal(pattern.dense(t), pattern.dense(t, t))
    np.testing.assert_equal(pattern.edges(t), pattern.edges(t, t))
    assert pattern.pairs(t) == pattern.pairs(t, t)
    assert all(layout.grid.s == t for layout in pattern.layouts(t))


def test_equal_heads_share_layouts_and_edges():
    pattern = parse("per_head(window(3), causal, window(3)) & full")
    for first, second, third in (pattern.layout(300), pattern.edges(300)):
        assert first is third
        assert first is not second


@pytest.mark.parametrize(
    ("argument", "arguments"), [("t", (-1,)), ("s", (4, -1)), ("tile", (4, 4, (0, 8))), ("tile", (4, 4, (8, -1)))]
)
def test_invalid_lengths_and_tiles(argument, arguments):
    with rejects(PatternError, argument):
        parse("causal").layout(*arguments)


def test_edges_of_a_negative_length():
    with rejects(PatternError, "t"):
        parse("causal").edges(-1)


def test_layout_of_a_long_sequence():
    length, left, sink, tile = 131_072, 4095, 128, 128
    pattern = parse(f"causal & (window({left}) | sink({sink}))")
    layout, peak = measured(lambda: pattern.layout(length))
    # The window of query tile r starts at key 128 r - 4095, in tile r - 32. In the first 33 rows the window contains
    # the tile of the sinks; the other 991 rows have it besides.
    rows, near = length // tile, (left + 1) // tile
    assert len(layout.columns) == (near + 1) * (near + 2) // 2 + (rows - near - 1) * (near + 2) == 34_255
    # Partial are the tile on the diagonal and, from row 33 on, the tile in which the window starts; in row 32 that is
    # the tile of the sinks.
    assert (~layout.full).sum() == rows + (rows - near - 1)
    assert peak < 400 * len(layout.columns) < length * length // 1000
    # Each query has itself, up to 4095 keys before it, and the sinks before those.
    query = np.arange(length)
    expected = np.minimum(query, left) + 1 + np.clip(query - left, 0, sink)
    assert pattern.pairs(length) == expected.sum()


def test_edges_of_a_long_sequence():
    # Proportional to live tiles: neither all pairs nor the million pairs of the globals are visited.
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


def test_memory_does_not_grow_with_the_number_of_globals():
    pattern = parse("globals(1000000) & window(3)")
    _, peak = measured(lambda: (pattern.layout(1024), pattern.lookahead(), pattern.last_query(np.arange(1024))))
    assert peak < 1_000_000


def measured(call):
    """The result and the peak memory of a call in bytes."""
    tracemalloc.start()
    try:
        return call(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@dataclasses.dataclass(frozen=True)
class Past(Pattern):
    """A correct pattern, from which the faulty ones below differ in one method."""

    name = "past"
    left: int = 3

    def allows(self, q, k, t=None, s=None):
        return (k <= q) & (k >= q - self.left)

    def bounds(self, grid):
        first, last = grid.row_bounds()
        return from_ranges(grid, any_key=(first - self.left, last + 1), every_key=(last - self.left, first + 1))

    def signature(self, grid, q0, k0):
        return [k0 - q0]

    def last_query(self, k):
        return k + self.left

    def lookahead(self):
        return 0


def touches_too_little(self, grid):
    first, last = grid.row_bounds()
    return from_ranges(grid, any_key=(first - self.left + 1, last + 1), every_key=(last - self.left, first + 1))


def fills_too_much(self, grid):
    first, last = grid.row_bounds()
    return from_ranges(grid, any_key=(first - self.left, last + 1), every_key=(last - self.left, first + 2))


def ignores_shifts(self, grid):
    return Past.bounds(self, TileGrid(grid.t, grid.s, grid.tile))


def ignores_query_offsets(self, grid):
    first, stop = grid.covered_queries
    return Past.bounds(self, dataclasses.replace(grid, queries=(0, stop - first)))


FAULTS = {
    "live": ("bounds.live_upper", {"bounds": touches_too_little}),
    "full": ("bounds.full_lower", {"bounds": fills_too_much}),
    "shift": ("bounds.", {"bounds": ignores_shifts}),
    "query offset": ("bounds.", {"bounds": ignores_query_offsets}),
    "signature": ("signature", {"signature": lambda self, grid, q0, k0: [k0]}),
    "last_query": ("last_query", {"last_query": lambda self, k: k + self.left - 1}),
    "last_query_shape": ("last_query", {"last_query": lambda self, k: self.left}),
    "lookahead": ("lookahead", {"lookahead": lambda self: -1}),
    "counts": ("counts", {"counts": lambda self, q, k, t=None, s=None: 2 * self.allows(q, k)}),
    "allows": ("allows", {"allows": lambda self, q, k, t=None, s=None: 1 * Past.allows(self, q, k)}),
    "for_head": (
        "for_head",
        {
            "heads": property(lambda self: 1),
            "allows": lambda self, q, k, t=None, s=None: Past.allows(self, q, k)[None],
            "for_head": lambda self, index: Past(2),
        },
    ),
    "text": ("text form", {"__str__": lambda self: "past(4)"}),
}


@pytest.mark.usefixtures("registries")
def test_a_correct_pattern_passes():
    register(Past)
    check_pattern(Past())
    check_pattern(parse("per_head(past(5), causal) - sink(2)"))


@pytest.mark.usefixtures("registries")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_pattern_is_named(fault):
    view, methods = FAULTS[fault]
    faulty = dataclasses.dataclass(frozen=True)(type("Faulty", (Past,), {"__module__": __name__} | methods))
    register(faulty)
    with pytest.raises(AssertionError) as caught:
        check_pattern(faulty())
    assert str(caught.value).startswith(("past", "shift(past", "offset_queries(past"))
    assert view in str(caught.value)


def test_an_unregistered_name():
    with rejects(PatternError, "past"):
        check_pattern(Past())
    check_pattern(Past(), text=False)


@pytest.mark.parametrize(("text", "length"), [("full", 2**22), ("causal & window(5)", 2**31), ("causal", 2**40)])
def test_lengths_whose_layout_exceeds_memory(text, length):
    with rejects(InputError, str(length)):
        parse(text).pairs(length)
    assert parse("causal & window(5)").pairs(2**22) == 6 * 2**22 - 15
