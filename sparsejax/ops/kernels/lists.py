"""Tile lists: layouts as arrays that a kernel walks tile by tile, known beforehand or computed from data."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from sparsejax.patterns import Pattern, TileLayout
from sparsejax.patterns.pattern import array_module
from sparsejax.patterns.tiles import group_tiles, tile_masks

EMPTY, PARTIAL, FULL = 0, 1, 2  # nothing to do; some pairs are allowed; all are


class TileLists(NamedTuple):
    """Lists of tiles, each sorted by row: of a row first the full ones, then the partial ones.

    Rows are query tiles and columns key tiles, or the other way round in the lists for dk and dv. Every row has an
    entry, an empty one if it has no live tile, so that its output is written.
    """

    rows: Int[Array, "lists n"]
    columns: Int[Array, "lists n"]
    kinds: Int[Array, "lists n"]
    heads: Int[Array, "lists n"]  # for dk and dv: which of the query heads that share the key/value head
    masks: Int[Array, "lists n"]  # of a partial tile, which of the distinct masks is its own; 0 where none is kept


@dataclasses.dataclass(frozen=True)
class Part:
    """What one kernel call computes: these heads, these rows of tiles. Heads are key/value heads for dk and dv."""

    heads: tuple[int, ...]
    start: int
    stop: int


class Walk(NamedTuple):
    """The lists of one call. `which` says which list a head of the part uses, for all sequences or for each."""

    which: Int[Array, "#b heads"]
    lists: TileLists


class Plan(NamedTuple):
    """All calls that make up one attention: for the output and dq by rows, for dk and dv by columns."""

    rows: tuple[tuple[Part, Walk], ...]
    columns: tuple[tuple[Part, Walk], ...]
    bits: np.ndarray | None  # bool [distinct, queries, keys] of partial tiles; None: the pattern's own formula serves
    kept: tuple[tuple[int, int], ...] = ()  # or where (query tile, key tile) each distinct mask can be computed, once


def plan_pattern(
    pattern: Pattern,
    t: int,
    s: int,
    tile: tuple[int, int],
    heads: tuple[int, int],
    formula: bool,
    most: int | None,
    most_kept: int,
) -> Plan:
    """The calls for a pattern.

    Args:
      pattern: whose layout it is.
      t: number of queries.
      s: number of keys.
      tile: queries and keys of a tile.
      heads: number of query heads and of key/value heads.
      formula: whether the kernel evaluates the pattern in partial tiles, which all heads must share then; if not,
        it looks masks up.
      most: how many entries one call can have, over all its lists.
      most_kept: how many distinct masks a kernel can compute once and keep, where it evaluates the pattern.
    """
    h, g = heads
    layouts = [pattern.for_head(i).layout(t, s, tile) for i in range(h)]
    distinct = list({id(layout): layout for layout in layouts}.values())
    of_head = [next(i for i, one in enumerate(distinct) if one is layout) for layout in layouts]
    patterns = {i: pattern.for_head(head) for head, i in enumerate(of_head)}
    bits, kept, masks = None, (), [np.zeros(len(one.columns), np.int32) for one in distinct]
    if not formula:
        bits, masks = collect_masks([(patterns[i], one) for i, one in enumerate(distinct)])
    elif len(distinct) == 1:
        kept, masks[0] = _place_masks(pattern.for_head(0), distinct[0], most_kept)
    entries = [_by_row(layout, mask) for layout, mask in zip(distinct, masks, strict=True)]
    grid, share = distinct[0].grid, h // g
    shared = [tuple(of_head[i * share : (i + 1) * share]) for i in range(g)]
    merged = {group: _by_column([entries[i] for i in group], grid.columns) for group in shared}
    return Plan(
        _group_calls(of_head, dict(enumerate(entries)), grid.rows, most),
        _group_calls(shared, merged, grid.columns, most),
        bits,
        kept,
    )


def _group_masks(pattern: Pattern, layout: TileLayout) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The partial tiles, of each group with the same mask one of them, and the group of each; indices, int64."""
    partial = np.flatnonzero(_tile_kinds(layout) == PARTIAL)
    first, same = group_tiles(pattern, layout.grid, layout.rows[partial], layout.columns[partial])
    return partial, partial[first], same


def _place_masks(pattern: Pattern, layout: TileLayout, most: int) -> tuple[tuple[tuple[int, int], ...], np.ndarray]:
    """A place of each distinct mask, and which of them each tile has; none if there are too many."""
    masks = np.zeros(len(layout.columns), np.int32)
    partial, first, same = _group_masks(pattern, layout)
    if len(first) > most:
        return (), masks
    masks[partial] = same
    return tuple(zip(layout.rows[first].tolist(), layout.columns[first].tolist(), strict=True)), masks


def _tile_kinds(layout: TileLayout) -> np.ndarray:
    """Of the live tiles. One at the end of keys that no tile divides is never full: what is beyond is masked there."""
    grid = layout.grid
    ragged = (layout.columns == grid.columns - 1) & (grid.s % grid.tile[1] != 0)
    return np.where(layout.full & ~ragged, FULL, PARTIAL)


def _group_calls(of_head: Sequence, entries: dict, rows: int, most: int | None) -> tuple[tuple[Part, Walk], ...]:
    """Heads whose lists are equally long share a call; calls with too many entries are cut between rows."""
    groups: dict[int, list[int]] = {}
    for head, key in enumerate(of_head):
        groups.setdefault(entries[key].rows.shape[1], []).append(head)
    calls = []
    for heads in groups.values():
        keys = list(dict.fromkeys(of_head[head] for head in heads))
        which = np.array([[keys.index(of_head[head]) for head in heads]], np.int32)
        lists = TileLists(*(np.concatenate(arrays) for arrays in zip(*(entries[key] for key in keys), strict=True)))
        for start, stop in _cut_rows(lists.rows, rows, most):
            calls.append((Part(tuple(heads), start, stop), Walk(which, _take_rows(lists, start, stop))))
    return tuple(calls)


def _cut_rows(row: np.ndarray, rows: int, most: int | None) -> list[tuple[int, int]]:
    """Ranges of rows with at most `most` entries each, over all lists; a row is never cut."""
    if most is None or row.size <= most:
        return [(0, rows)]
    before = np.concatenate([[0], np.cumsum(np.bincount(row.ravel(), minlength=rows))])
    cuts = [0]
    while cuts[-1] < rows:
        stop = int(np.searchsorted(before, before[cuts[-1]] + most, side="right")) - 1
        cuts.append(max(stop, cuts[-1] + 1))
    return list(itertools.pairwise(cuts))


def _take_rows(lists: TileLists, start: int, stop: int) -> TileLists:
    """The entries between two rows. Lists that have fewer there than others get empty ones, at their last row."""
    inside = (lists.rows >= start) & (lists.rows < stop)
    counts = inside.sum(axis=1)
    slot = np.minimum(np.arange(counts.max()), counts[:, None] - 1) + (lists.rows < start).sum(axis=1, keepdims=True)
    part = TileLists(*(np.take_along_axis(x, slot, axis=1) for x in lists))
    more = np.arange(counts.max()) >= counts[:, None]
    return part._replace(rows=part.rows - start, kinds=np.where(more, EMPTY, part.kinds))


def _by_row(layout: TileLayout, masks: np.ndarray) -> TileLists:
    """One list."""
    none = np.zeros_like(layout.columns)
    return _fill_rows(layout.grid.rows, TileLists(layout.rows, layout.columns, _tile_kinds(layout), none, masks))


def _by_column(lists: Sequence[TileLists], columns: int) -> TileLists:
    """The lists of the query heads that share a key/value head as one, sorted by key tile."""
    live = [TileLists(*(x[0][one.kinds[0] != EMPTY] for x in one)) for one in lists]
    heads = np.concatenate([np.full(len(one.rows), i) for i, one in enumerate(live)])
    joined = TileLists(*(np.concatenate(x) for x in zip(*live, strict=True)))
    return _fill_rows(columns, joined._replace(rows=joined.columns, columns=joined.rows, heads=heads))


def _fill_rows(rows: int, entries: TileLists) -> TileLists:
    """Entries [n] as one sorted list, with an empty one for each row that has none."""
    missing = np.setdiff1d(np.arange(rows), entries.rows)
    more = TileLists(missing, *(np.zeros_like(missing),) * 4)
    return sort_lists(TileLists(*(np.concatenate(x)[None].astype(np.int32) for x in zip(entries, more, strict=True))))


def sort_lists(lists: TileLists) -> TileLists:
    """By row; of a row the fuller kinds first; of these by head and column."""
    xp = array_module(*lists)
    order = xp.lexsort((lists.columns, lists.heads, -lists.kinds, lists.rows), axis=-1)
    return TileLists(*(xp.take_along_axis(x, order, axis=-1) for x in lists))


def collect_masks(layouts: Sequence[tuple[Pattern, TileLayout]]) -> tuple[np.ndarray, list[np.ndarray]]:
    """The distinct masks of partial tiles, each once.

    Returns:
      bool [distinct, queries, keys]; and for each layout which of them each of its tiles has, int32 [live], 0 for a
      full tile that needs none.
    """
    seen: dict[bytes, int] = {}
    found = []
    for pattern, layout in layouts:
        index = np.zeros(len(layout.columns), np.int32)
        partial, first, same = _group_masks(pattern, layout)
        numbers = np.zeros(len(first), np.int32)
        for i, tile in enumerate(first):
            (mask,) = tile_masks(pattern, layout.grid, layout.rows[tile : tile + 1], layout.columns[tile : tile + 1])
            numbers[i] = seen.setdefault(np.packbits(mask).tobytes(), len(seen))
        index[partial] = numbers[same]
        found.append(index)
    size = layouts[0][1].grid.tile
    packed = [np.frombuffer(mask, np.uint8) for mask in seen] or [np.zeros(size[0] * size[1] // 8, np.uint8)]
    return np.unpackbits(np.stack(packed), axis=1).reshape(-1, *size).astype(bool), found


def pack_words(masks: Bool[np.ndarray, "distinct n m"]) -> Int[np.ndarray, "distinct n/32 m"]:
    """Masks as bits: bit i of a word is of the i-th of its 32 rows."""
    groups = masks.reshape(len(masks), -1, 32, masks.shape[-1]).astype(np.uint32)
    return (groups << np.arange(32, dtype=np.uint32)[:, None]).sum(axis=2, dtype=np.uint32).view(np.int32)


def plan_selection(
    columns: Int[Array, "#b h rows k"], pattern: Pattern, t: int, s: int, tile: tuple[int, int], g: int
) -> Plan:
    """The calls for tiles that the data select; of these, what a pattern without heads allows.

    Args:
      columns: for each query tile of each query head its key tiles, none twice; -1 for none. For all sequences, or
        for each.
      pattern: evaluated by the kernel in the tiles that it does not fill.
      t: number of queries.
      s: number of keys.
      tile: queries and keys of a tile.
      g: number of key/value heads.
    """
    layout = pattern.layout(t, s, tile)
    (b, h, rows, _), keys = columns.shape, layout.grid.columns
    states = np.full((rows, keys), EMPTY, np.int32)
    states[layout.rows, layout.columns] = _tile_kinds(layout)
    row = jnp.broadcast_to(jnp.arange(rows)[:, None], columns.shape)
    head = jnp.broadcast_to((jnp.arange(h) % (h // g))[:, None, None], columns.shape)
    kinds = jnp.where(columns < 0, EMPTY, jnp.asarray(states)[row, columns])
    columns, none = jnp.maximum(columns, 0), jnp.zeros_like(columns)
    by_row = TileLists(*(x.reshape(b * h, -1) for x in (row, columns, kinds, none, none)))
    by_column = TileLists(*(x.reshape(b * g, -1) for x in (columns, row, kinds, head, none)))
    empty = jnp.broadcast_to(jnp.arange(keys, dtype=columns.dtype), (b * g, keys))  # one for each key tile
    more = TileLists(empty, *(jnp.zeros_like(empty),) * 4)
    by_column = TileLists(*(jnp.concatenate(x, axis=1) for x in zip(by_column, more, strict=True)))
    which = [jnp.arange(b * n).reshape(b, n) for n in (h, g)]
    return Plan(
        ((Part(tuple(range(h)), 0, rows), Walk(which[0], sort_lists(by_row))),),
        ((Part(tuple(range(g)), 0, keys), Walk(which[1], sort_lists(by_column))),),
        None,
    )


def mark_ends(rows: Int[Array, "lists n"]) -> tuple[Array, Array]:
    """Which entries are the first and which the last of their row, bool [lists, n] each."""
    xp = array_module(rows)
    turn = rows[:, 1:] != rows[:, :-1]
    edge = xp.ones((rows.shape[0], 1), bool)
    return xp.concatenate([edge, turn], axis=1), xp.concatenate([turn, edge], axis=1)
