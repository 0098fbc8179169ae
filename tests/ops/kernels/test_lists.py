"""Tile lists agree with the masks of their patterns, however they are merged, split or computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax.ops.kernels.lists import EMPTY, FULL, PARTIAL, TileLists, mark_ends, plan_pattern, plan_selection
from sparsejax.patterns import parse
from tests.patterns.strategies import patterns_with_heads, shared_patterns

TILE = (16, 8)


def tile_kinds(launches, heads: int, shape: tuple[int, int], sequence: int = 0, group_size: int = 1) -> np.ndarray:
    """The kind of each tile of each head [heads * group_size, rows, columns]; no tile is listed twice."""
    kinds = np.full((heads * group_size, *shape), -1)
    written = np.zeros((heads, shape[0]), int)
    for kernel_slice, (list_ids, lists) in launches:
        lists = TileLists(*map(np.asarray, lists))
        first, last = mark_ends(lists.rows)
        ids = np.asarray(list_ids)[sequence if len(list_ids) > 1 else 0]
        for head, index in zip(kernel_slice.heads, ids, strict=True):
            row, column, kind, member, _ = (x[index] for x in lists)
            assert (np.diff(row) >= 0).all()
            np.testing.assert_array_equal(np.unique(row), np.arange(kernel_slice.rows))
            assert (row[first[index]] == np.arange(kernel_slice.rows)).all()
            assert (row[last[index]] == np.arange(kernel_slice.rows)).all()
            written[head, kernel_slice.start : kernel_slice.stop] += 1
            live = kind != EMPTY
            tiles = head * group_size + member[live], kernel_slice.start + row[live], column[live]
            assert (kinds[tiles] == -1).all()
            kinds[tiles] = kind[live]
    assert (written == 1).all()
    return np.where(kinds < 0, EMPTY, kinds)


def expected_kinds(pattern, t: int, s: int, heads: int) -> np.ndarray:
    """The same from the dense masks; pairs with keys past the end are not allowed."""
    rows, columns = -(-t // TILE[0]), -(-s // TILE[1])
    kinds = np.zeros((heads, rows, columns), int)
    for head in range(heads):
        mask = np.zeros((rows * TILE[0], columns * TILE[1]), bool)
        mask[:t, :s] = pattern.for_head(head).dense(t, s)
        for row in range(rows):
            stop = min(t, (row + 1) * TILE[0])  # queries past the end do not count
            for column in range(columns):
                tile = mask[row * TILE[0] : stop, column * TILE[1] : (column + 1) * TILE[1]]
                kinds[head, row, column] = FULL if tile.all() else PARTIAL if tile.any() else EMPTY
    return kinds


@settings(max_examples=60)
@given(
    pattern=shared_patterns(longest=90) | patterns_with_heads(4, longest=90),
    lengths=st.sampled_from([(1, 1), (64, 64), (61, 90), (90, 61)]),
    max_entries=st.sampled_from([None, 40, 7]),
    g=st.sampled_from([1, 2, 4]),
)
def test_lists_agree_with_masks(pattern, lengths, max_entries, g):
    t, s = lengths
    expected = expected_kinds(pattern, t, s, 4)
    rows, columns = expected.shape[1:]
    plan = plan_pattern(pattern, t, s, TILE, (4, g), evaluated=False, max_entries=max_entries, max_cached_masks=4)
    np.testing.assert_array_equal(tile_kinds(plan.rows, 4, (rows, columns)), expected)
    by_column = tile_kinds(plan.columns, g, (columns, rows), group_size=4 // g)
    np.testing.assert_array_equal(by_column.swapaxes(1, 2), expected)
    check_masks(plan, pattern, t, s)


def check_masks(plan, pattern, t, s):
    """Compares the mask of each partial tile with the pattern."""
    for kernel_slice, (list_ids, lists) in plan.rows:
        for head, index in zip(kernel_slice.heads, list_ids[0], strict=True):
            allows = pattern.for_head(head).allows
            for row, column, kind, _, mask in zip(*(x[index] for x in lists), strict=True):
                if kind == PARTIAL:
                    q = (kernel_slice.start + row) * TILE[0] + np.arange(TILE[0])[:, None]
                    k = column * TILE[1] + np.arange(TILE[1])
                    inside = (q < t) & (k < s)
                    expected = np.where(inside, allows(np.minimum(q, t - 1), np.minimum(k, s - 1), t, s), False)
                    np.testing.assert_array_equal(plan.bits[mask], expected)


def test_one_entry_per_live_tile():
    pattern = parse("per_head(causal, causal, window(20), window(20))")
    plan = plan_pattern(pattern, 128, 128, (16, 16), (4, 2), evaluated=False, max_entries=None, max_cached_masks=4)
    steps = {kernel_slice.heads: schedule.lists.rows.shape[1] for kernel_slice, schedule in plan.rows}
    assert steps == {(0, 1): 36, (2, 3): 8 + 7 + 6}
    assert (
        sum(len(kernel_slice.heads) * steps[kernel_slice.heads] for kernel_slice, _ in plan.rows)
        == pattern.tiles(128, 128, (16, 16))[0]
    )
    assert (
        sum(len(kernel_slice.heads) * schedule.lists.rows.shape[1] for kernel_slice, schedule in plan.columns)
        == 2 * 36 + 2 * 21
    )


def test_launches_are_split_at_the_maximum_of_entries():
    plan = plan_pattern(
        parse("causal"), 1024, 1024, (16, 16), (1, 1), evaluated=True, max_entries=200, max_cached_masks=4
    )
    assert len(plan.rows) > 1
    for launches in (plan.rows, plan.columns):
        assert all(schedule.lists.rows.size <= 200 for _, schedule in launches)
        assert [kernel_slice.start for kernel_slice, _ in launches[1:]] == [
            kernel_slice.stop for kernel_slice, _ in launches[:-1]
        ]


@pytest.mark.parametrize("b", [1, 2])
@pytest.mark.parametrize("pattern", ["full", "causal & window(40)"])
def test_selections_are_intersected_with_the_pattern(pattern, b):
    (t, s), pattern, g = (61, 90), parse(pattern), 2
    rows, columns = -(-t // TILE[0]), -(-s // TILE[1])
    random = np.random.default_rng(b)
    selected = random.permuted(np.broadcast_to(np.arange(columns), (b, 4, rows, columns)), axis=-1)[..., :5]
    selected = np.where(random.random(selected.shape) < 0.3, -1, selected)
    selected[:, 1, 2] = -1  # a row without tiles

    def schedules(selected):
        plan = plan_selection(selected, pattern, t, s, TILE, g)
        return [[schedule for _, schedule in launches] for launches in (plan.rows, plan.columns)]

    plan = plan_selection(jnp.asarray(selected), pattern, t, s, TILE, g)
    by_row, by_column = (
        [(kernel_slice, schedule) for (kernel_slice, _), schedule in zip(launches, traced, strict=True)]
        for launches, traced in zip((plan.rows, plan.columns), jax.jit(schedules)(selected), strict=True)
    )
    for sequence in range(b):
        picked = np.zeros((4, rows, columns + 1), bool)
        np.put_along_axis(picked, selected[sequence], True, axis=-1)
        expected = np.where(picked[..., :-1], expected_kinds(pattern, t, s, 4), EMPTY)
        np.testing.assert_array_equal(tile_kinds(by_row, 4, (rows, columns), sequence), expected)
        kinds = tile_kinds(by_column, g, (columns, rows), sequence, group_size=2)
        np.testing.assert_array_equal(kinds.swapaxes(1, 2), expected)


@settings(max_examples=40)
@given(shared_patterns(longest=90), st.sampled_from([(64, 64), (61, 90), (90, 61)]))
def test_cached_masks_are_those_of_the_tiles(pattern, lengths):
    plan = plan_pattern(pattern, *lengths, TILE, (2, 1), evaluated=True, max_entries=None, max_cached_masks=4)
    masks = [evaluate(pattern, *tile, *lengths) for tile in plan.cached_masks]
    for kernel_slice, (_, lists) in plan.rows if plan.cached_masks else ():
        for row, column, kind, _, mask in zip(*(x[0] for x in lists), strict=True):
            if kind == PARTIAL:
                stop = min(TILE[0], lengths[0] - (kernel_slice.start + row) * TILE[0])
                expected = evaluate(pattern, kernel_slice.start + row, column, *lengths)
                np.testing.assert_array_equal(masks[mask][:stop], expected[:stop])


def evaluate(pattern, row: int, column: int, t: int, s: int) -> np.ndarray:
    q, k = row * TILE[0] + np.arange(TILE[0])[:, None], column * TILE[1] + np.arange(TILE[1])
    return np.broadcast_to(pattern.allows(q, k, t, s) & (k < s), TILE)
