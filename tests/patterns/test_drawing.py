"""Panels against the mask and the tile layout."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsejax.patterns import Multiset, draw_mask, draw_pattern, format_numbers, parse
from sparsejax.patterns.drawing import COUNTED_TILE, MAX_HEADS
from tests.patterns.strategies import shared_patterns

pytestmark = pytest.mark.quick


@given(shared_patterns(), st.integers(1, 45), st.integers(2, 9))
def test_panels_are_the_mask_and_the_layout(pattern, length, tile):
    mask = pattern.dense(length)
    (tokens,) = draw_pattern(pattern, length)
    states = tokens.states if not pattern.repeats else 2 * (tokens.states > 0)
    np.testing.assert_array_equal(states, 2 * mask)
    assert tokens.caption == f"{100 * mask.mean():.3g}% of pairs"
    (tiles,) = draw_pattern(pattern, length, tile)
    np.testing.assert_array_equal(tiles.states, pattern.layout(length, tile=(tile, tile)).dense())
    assert tiles.caption.endswith(f"of tiles of {tile}, {tokens.caption}")
    # A mask gives the same picture as the pattern.
    np.testing.assert_array_equal(draw_mask("", mask, tile).states, tiles.states)
    assert tokens.states.dtype == tiles.states.dtype == np.int8
    assert tokens.title == tiles.title == str(pattern)


@pytest.mark.parametrize("text", ["causal & (window(300) | sink(4))", "globals([7, -1])", "full"])
def test_large_cells_are_composed_of_tiles(text):
    pattern, length, tile = parse(text), 1100, 2 * COUNTED_TILE
    (panel,) = draw_pattern(pattern, length, tile)
    np.testing.assert_array_equal(panel.states, draw_mask("", pattern.dense(length), tile).states)


@given(shared_patterns(), st.integers(1, 45), st.integers(1, 9), st.integers(1, 5))
def test_coarse_layouts_are_layouts_of_larger_tiles(pattern, length, tile, factor):
    layout = pattern.layout(length, tile=(tile, tile))
    larger = pattern.layout(length, tile=(tile * factor, tile * factor))
    np.testing.assert_array_equal(layout.coarsen(factor), larger.dense())
    assert layout.coarsen(1).dtype == np.int8


@given(shared_patterns(), st.integers(1, 45))
def test_repeated_keys_have_their_own_states(pattern, length):
    (panel,) = draw_pattern(Multiset.of(pattern, parse("window(2)"), parse("window(9, 9)")), length)
    q, k = np.arange(length)[:, None], np.arange(length)
    counts = pattern.counts(q, k, length, length) + (abs(k - q) <= 9) + ((k <= q) & (k >= q - 2))
    np.testing.assert_array_equal(panel.states, np.where(counts, np.minimum(counts + 1, 5), 0))


def test_equal_heads_share_a_panel():
    pattern = parse("per_head(window(1), causal, window(1), window(1)) & sink(3)")
    first, second = draw_pattern(pattern, 6)
    assert (first.title, second.title) == ("heads 0, 2-3: window(1) & sink(3)", "head 1: causal & sink(3)")
    np.testing.assert_array_equal(first.states, 2 * pattern.dense(6)[3])
    np.testing.assert_array_equal(second.states, 2 * pattern.dense(6)[1])
    assert [panel.title for panel in draw_pattern(pattern, 6, title="A")] == ["A, heads 0, 2-3", "A, head 1"]


def test_omitted_heads_are_counted():
    panels = draw_pattern(parse(f"per_head({', '.join(f'window({n})' for n in range(MAX_HEADS + 3))})"), 4)
    assert len(panels) == MAX_HEADS
    assert "(3 more " in panels[-1].title


def test_captions():
    assert draw_pattern(parse("causal"), 4)[0].caption == "62.5% of pairs"
    assert draw_pattern(parse("causal"), 4, tile=2)[0].caption == "75% of tiles of 2, 62.5% of pairs"


def test_numbers_as_ranges():
    assert format_numbers([3]) == "3"
    assert format_numbers([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert format_numbers(list(range(0, 40, 2))) == "0, 2, 4, 6, 8, ..., 38"
