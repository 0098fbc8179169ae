"""Tile lists agree with the masks of their patterns, however they are merged, split or computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax.ops.blocks import make_blocks
from sparsejax.ops.exchange import _list_tiles
from sparsejax.ops.kernels.choice import choose_chunk, pack_choice
from sparsejax.ops.kernels.lists import (
    CHOSEN,
    EMPTY,
    FULL,
    PARTIAL,
    TileLists,
    mark_ends,
    plan_pattern,
    plan_shards,
    restrict_plan,
    take_shard,
)
from sparsejax.ops.selection import Selection, choose
from sparsejax.patterns import parse
from sparsejax.patterns.exchange import plan_exchange
from tests.patterns.strategies import patterns_with_heads, shared_patterns

TILE = (16, 8)


def tile_kinds(launches, heads: int, shape: tuple[int, int], sequence: int = 0, group_size: int = 1) -> np.ndarray:
    """The kind of each tile of each head [heads * group_size, rows, columns]; no tile is listed twice."""
    kinds = np.full((heads * group_size, *shape), -1)
    written = np.zeros((heads, shape[0]), int)
    for kernel_slice, (list_ids, lists, _) in launches:
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
    for kernel_slice, (list_ids, lists, _) in plan.rows:
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


@pytest.mark.parametrize("max_entries", [None, 9])
@pytest.mark.parametrize("text", ["causal", "causal & window(70)", "window(30, 30) | sink(4)"])
def test_shards_have_the_tiles_of_the_sequence(text, max_entries):
    """However the tiles are exchanged and the launches split, the shards together compute every live tile once."""
    pattern, length, shards, side = parse(text), 192, 4, 8
    plan = plan_exchange(pattern, length, shards, tile=side)
    tiles = _list_tiles(plan)
    kernels = plan_shards(pattern, tiles, (4, 2), max_entries)
    layout = pattern.layout(length, length, (side, side))
    expected = np.zeros((layout.grid.rows, layout.grid.columns), int)
    expected[layout.rows, layout.columns] = np.where(layout.full, FULL, PARTIAL)
    assert (max_entries is None) == (len(kernels.rows) == 1)
    by_row, by_column = np.zeros_like(expected), np.zeros((4, *expected.shape), int)
    for shard in range(shards):
        of_shard = take_shard(kernels, jnp.int32(shard))
        at, keys = plan.queries[shard], plan.keys[shard]
        held = keys >= 0
        kinds = tile_kinds(of_shard.rows, 4, tiles.positions)
        assert (kinds == kinds[0]).all()
        assert (kinds[0][:, ~held] == EMPTY).all()
        np.add.at(by_row, np.ix_(at, keys[held]), kinds[0][:, held])
        columns = tile_kinds(of_shard.columns, 2, tiles.positions[::-1], group_size=2)
        for head in range(4):
            np.add.at(by_column[head], np.ix_(at, keys[held]), columns[head].T[:, held])
    np.testing.assert_array_equal(by_row, expected)
    np.testing.assert_array_equal(by_column, np.broadcast_to(expected, by_column.shape))


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


@pytest.mark.parametrize("scopes", [1, 2, 4])
@pytest.mark.parametrize("pattern", ["full", "causal & window(40)"])
def test_plans_are_restricted_to_a_choice(pattern, scopes):
    (t, s), pattern, (h, g), b = (61, 90), parse(pattern), (4, 2), 2
    expected = expected_kinds(pattern, t, s, 1)
    rows, columns = expected.shape[1:]
    chosen = np.random.default_rng(scopes).choice([EMPTY, PARTIAL, CHOSEN, FULL], (b, scopes, rows, columns))
    chosen[:, :, 2], chosen[:, 0, :, 3] = EMPTY, EMPTY
    options = {"evaluated": True, "max_entries": 10, "max_cached_masks": 4}
    plan = plan_pattern(pattern, t, s, TILE, (h, g), **options)
    assert len(plan.rows) > 1

    @jax.jit
    def schedules(chosen):
        restricted = restrict_plan(plan, chosen, (h, g))
        return [[schedule for _, schedule in launches] for launches in (restricted.rows, restricted.columns)]

    by_row, by_column = (
        [(kernel_slice, schedule) for (kernel_slice, _), schedule in zip(launches, traced, strict=True)]
        for launches, traced in zip((plan.rows, plan.columns), schedules(jnp.asarray(chosen)), strict=True)
    )
    for sequence in range(b):
        kinds = np.minimum(chosen[sequence].repeat(h // scopes, axis=0), expected)
        np.testing.assert_array_equal(tile_kinds(by_row, h, (rows, columns), sequence), kinds)
        transposed = tile_kinds(by_column, g, (columns, rows), sequence, group_size=h // g)
        np.testing.assert_array_equal(transposed.swapaxes(1, 2), kinds)
    for _, (_, lists, steps) in by_row + by_column:
        assert (np.asarray(lists.kinds)[:, int(steps) :] == EMPTY).all()
        last = np.asarray(lists.rows)[:, int(steps) - 1]
        assert (last == np.asarray(lists.rows).max()).all()


@pytest.mark.parametrize(("size", "packed", "chunk"), [(16, False, 128), (2, False, 64), (1, False, 64), (5, True, 64)])
def test_bits_of_a_choice_are_its_mask(size, packed, chunk):
    (b, t, s), random = (2, 150, 200), np.random.default_rng(size)
    segments = jnp.asarray(np.sort(random.integers(0, 60, (b, s)), axis=1)) if packed else None
    blocks = make_blocks(s, size, segments)
    scores = random.random((b, 2, t, blocks.count))
    visible = np.broadcast_to(random.random((b, 2, t, 1)) < 0.9, scores.shape)
    groups = choose(jnp.asarray(scores, jnp.float32), jnp.asarray(visible), 3)
    selection = Selection(groups, blocks)
    assert choose_chunk(blocks, (128, 64), 128) == chunk
    (words, numbers), kinds = pack_choice(selection, (128, 128), chunk)
    parts = words.shape[3] // (128 // chunk)
    numbers = np.broadcast_to(np.asarray(numbers), (b, numbers.shape[1]))
    key = np.arange(s)
    index = key % 128 // chunk * parts + numbers[:, :s] // 32
    bits = np.stack([np.asarray(words)[i, :, key // 128, index[i]] for i in range(b)])  # [b, s, scopes, t]
    chosen = bits >> (numbers[:, :s] % 32)[:, :, None, None] & 1
    mask = np.asarray(selection.mask)
    np.testing.assert_array_equal(chosen[..., :t].transpose(0, 2, 3, 1), mask)
    padded = np.pad(mask, ((0, 0), (0, 0), (0, 256 - t), (0, 256 - s))).reshape(b, 2, 2, 128, 2, 128)
    np.testing.assert_array_equal(np.asarray(kinds) != EMPTY, padded.any(axis=(3, 5)))


def test_a_tile_of_which_all_queries_chose_all_blocks_is_full():
    blocks = make_blocks(256, 64)
    groups = jnp.tile(jnp.asarray([[[[0, 1]]]]), (1, 1, 128, 1)).at[0, 0, 5, 1].set(2)
    kinds = [pack_choice(Selection(x, blocks), (128, 128), 128)[1] for x in (groups, groups.at[0, 0, 5, 1].set(1))]
    np.testing.assert_array_equal(np.stack(kinds)[:, 0, 0, 0], [[CHOSEN, CHOSEN], [FULL, EMPTY]])


@settings(max_examples=40)
@given(shared_patterns(longest=90), st.sampled_from([(64, 64), (61, 90), (90, 61)]))
def test_cached_masks_are_those_of_the_tiles(pattern, lengths):
    plan = plan_pattern(pattern, *lengths, TILE, (2, 1), evaluated=True, max_entries=None, max_cached_masks=4)
    masks = [evaluate(pattern, *tile, *lengths) for tile in plan.cached_masks]
    for kernel_slice, (_, lists, _) in plan.rows if plan.cached_masks else ():
        for row, column, kind, _, mask in zip(*(x[0] for x in lists), strict=True):
            if kind == PARTIAL:
                stop = min(TILE[0], lengths[0] - (kernel_slice.start + row) * TILE[0])
                expected = evaluate(pattern, kernel_slice.start + row, column, *lengths)
                np.testing.assert_array_equal(masks[mask][:stop], expected[:stop])


def evaluate(pattern, row: int, column: int, t: int, s: int) -> np.ndarray:
    q, k = row * TILE[0] + np.arange(TILE[0])[:, None], column * TILE[1] + np.arange(TILE[1])
    return np.broadcast_to(pattern.allows(q, k, t, s) & (k < s), TILE)
