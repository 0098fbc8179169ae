"""Tile lists say what the layouts say, however they are merged, cut or computed."""

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


def states_of(calls, heads: int, shape: tuple[int, int], sequence: int = 0, share: int = 1) -> np.ndarray:
    """What the calls say of each head's tiles, int8 [heads * share, rows, columns]; nothing is said twice."""
    found = np.full((heads * share, *shape), -1)
    written = np.zeros((heads, shape[0]), int)
    for part, (which, lists) in calls:
        lists = TileLists(*map(np.asarray, lists))
        first, last = mark_ends(lists.rows)
        own = np.asarray(which)[sequence if len(which) > 1 else 0]
        for head, index in zip(part.heads, own, strict=True):
            row, column, kind, other, _ = (x[index] for x in lists)
            assert (np.diff(row) >= 0).all()
            np.testing.assert_array_equal(np.unique(row), np.arange(part.stop - part.start))
            assert (row[first[index]] == np.arange(part.stop - part.start)).all()
            assert (row[last[index]] == np.arange(part.stop - part.start)).all()
            written[head, part.start : part.stop] += 1
            live = kind != EMPTY
            place = head * share + other[live], part.start + row[live], column[live]
            assert (found[place] == -1).all()
            found[place] = kind[live]
    assert (written == 1).all()
    return np.where(found < 0, EMPTY, found)


def expected_states(pattern, t: int, s: int, heads: int) -> np.ndarray:
    """From the masks themselves; what lies beyond the keys is no allowed pair."""
    rows, columns = -(-t // TILE[0]), -(-s // TILE[1])
    found = np.zeros((heads, rows, columns), int)
    for head in range(heads):
        mask = np.zeros((rows * TILE[0], columns * TILE[1]), bool)
        mask[:t, :s] = pattern.for_head(head).dense(t, s)
        mask[t:] = mask[:t].all(axis=0) if t == 1 else mask[t - 1 : t]  # queries beyond the end count for nothing
        for row in range(rows):
            stop = min(t, (row + 1) * TILE[0])
            for column in range(columns):
                part = mask[row * TILE[0] : stop, column * TILE[1] : (column + 1) * TILE[1]]
                found[head, row, column] = FULL if part.all() else PARTIAL if part.any() else EMPTY
    return found


@settings(max_examples=60)
@given(
    pattern=shared_patterns(longest=90) | patterns_with_heads(4, longest=90),
    lengths=st.sampled_from([(1, 1), (64, 64), (61, 90), (90, 61)]),
    most=st.sampled_from([None, 40, 7]),
    g=st.sampled_from([1, 2, 4]),
)
def test_lists_say_what_the_masks_say(pattern, lengths, most, g):
    t, s = lengths
    expected = expected_states(pattern, t, s, 4)
    rows, columns = expected.shape[1:]
    plan = plan_pattern(pattern, t, s, TILE, (4, g), formula=False, most=most, most_kept=4)
    np.testing.assert_array_equal(states_of(plan.rows, 4, (rows, columns)), expected)
    found = states_of(plan.columns, g, (columns, rows), share=4 // g)
    np.testing.assert_array_equal(found.swapaxes(1, 2), expected)
    check_masks(plan, pattern, t, s)


def check_masks(plan, pattern, t, s):
    """Each partial tile has its own bits."""
    for part, (which, lists) in plan.rows:
        for head, index in zip(part.heads, which[0], strict=True):
            one = pattern.for_head(head)
            for row, column, kind, _, mask in zip(*(x[index] for x in lists), strict=True):
                if kind == PARTIAL:
                    q = (part.start + row) * TILE[0] + np.arange(TILE[0])[:, None]
                    k = column * TILE[1] + np.arange(TILE[1])
                    inside = (q < t) & (k < s)
                    wanted = np.where(inside, one.allows(np.minimum(q, t - 1), np.minimum(k, s - 1), t, s), False)
                    np.testing.assert_array_equal(plan.bits[mask], wanted)


def test_a_step_for_each_live_tile_and_no_more():
    pattern = parse("per_head(causal, causal, window(20), window(20))")
    plan = plan_pattern(pattern, 128, 128, (16, 16), (4, 2), formula=False, most=None, most_kept=4)
    steps = {part.heads: walk.lists.rows.shape[1] for part, walk in plan.rows}
    assert steps == {(0, 1): 36, (2, 3): 8 + 7 + 6}
    assert sum(len(part.heads) * steps[part.heads] for part, _ in plan.rows) == pattern.tiles(128, 128, (16, 16))[0]
    assert sum(len(part.heads) * walk.lists.rows.shape[1] for part, walk in plan.columns) == 2 * 36 + 2 * 21


def test_calls_have_at_most_so_many_entries():
    plan = plan_pattern(parse("causal"), 1024, 1024, (16, 16), (1, 1), formula=True, most=200, most_kept=4)
    assert len(plan.rows) > 1
    for calls in (plan.rows, plan.columns):
        assert all(walk.lists.rows.size <= 200 for _, walk in calls)
        assert [part.start for part, _ in calls[1:]] == [part.stop for part, _ in calls[:-1]]


@pytest.mark.parametrize("b", [1, 2])
@pytest.mark.parametrize("pattern", ["full", "causal & window(40)"])
def test_selections_are_cut_by_the_pattern(pattern, b):
    (t, s), pattern, g = (61, 90), parse(pattern), 2
    rows, columns = -(-t // TILE[0]), -(-s // TILE[1])
    random = np.random.default_rng(b)
    chosen = random.permuted(np.broadcast_to(np.arange(columns), (b, 4, rows, columns)), axis=-1)[..., :5]
    chosen = np.where(random.random(chosen.shape) < 0.3, -1, chosen)
    chosen[:, 1, 2] = -1  # a row without any

    def plan(chosen):
        found = plan_selection(chosen, pattern, t, s, TILE, g)
        return [[walk for _, walk in calls] for calls in (found.rows, found.columns)]

    parts = plan_selection(jnp.asarray(chosen), pattern, t, s, TILE, g)
    by_row, by_column = (
        [(part, walk) for (part, _), walk in zip(calls, walks, strict=True)]
        for calls, walks in zip((parts.rows, parts.columns), jax.jit(plan)(chosen), strict=True)
    )
    for sequence in range(b):
        picked = np.zeros((4, rows, columns + 1), bool)
        np.put_along_axis(picked, chosen[sequence], True, axis=-1)
        expected = np.where(picked[..., :-1], expected_states(pattern, t, s, 4), EMPTY)
        np.testing.assert_array_equal(states_of(by_row, 4, (rows, columns), sequence), expected)
        found = states_of(by_column, g, (columns, rows), sequence, share=2)
        np.testing.assert_array_equal(found.swapaxes(1, 2), expected)


@settings(max_examples=40)
@given(shared_patterns(longest=90), st.sampled_from([(64, 64), (61, 90), (90, 61)]))
def test_kept_masks_are_those_of_the_tiles(pattern, lengths):
    plan = plan_pattern(pattern, *lengths, TILE, (2, 1), formula=True, most=None, most_kept=4)
    masks = [evaluate(pattern, *place, *lengths) for place in plan.kept]
    for part, (_, lists) in plan.rows if plan.kept else ():
        for row, column, kind, _, mask in zip(*(x[0] for x in lists), strict=True):
            if kind == PARTIAL:
                stop = min(TILE[0], lengths[0] - (part.start + row) * TILE[0])
                wanted = evaluate(pattern, part.start + row, column, *lengths)
                np.testing.assert_array_equal(masks[mask][:stop], wanted[:stop])


def evaluate(pattern, row: int, column: int, t: int, s: int) -> np.ndarray:
    q, k = row * TILE[0] + np.arange(TILE[0])[:, None], column * TILE[1] + np.arange(TILE[1])
    return np.broadcast_to(pattern.allows(q, k, t, s) & (k < s), TILE)
