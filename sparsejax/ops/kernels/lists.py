"""Tile lists: layouts as arrays that a kernel walks tile by tile, known beforehand or computed from data."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from sparsejax.patterns import Pattern, TileLayout
from sparsejax.patterns.tiles import TileGrid, group_tiles, tile_masks

MOST_KEPT = 4  # distinct masks that a kernel computes once and keeps
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
    pattern: Pattern, t: int, s: int, tile: tuple[int, int], heads: tuple[int, int], formula: bool, most: int | None
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
        kept, masks[0] = _find_masks(pattern.for_head(0), distinct[0])
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


def _find_masks(pattern: Pattern, layout: TileLayout) -> tuple[tuple[tuple[int, int], ...], np.ndarray]:
    """A place of each distinct mask of partial tiles, and which of them each tile has; none if there are too many."""
    partial = np.flatnonzero(_is_partial(layout))
    rows, columns = layout.rows[partial], layout.columns[partial]
    first, same = group_tiles(pattern, layout.grid, rows, columns)
    masks = np.zeros(len(layout.columns), np.int32)
    if len(first) > MOST_KEPT:
        return (), masks
    masks[partial] = same
    return tuple(zip(rows[first].tolist(), columns[first].tolist(), strict=True)), masks


def _is_partial(layout: TileLayout) -> np.ndarray:
    """Tiles at the end of keys that no tile divides are partial too: what is beyond is masked there."""
    grid = layout.grid
    return ~layout.full | ((layout.columns == grid.columns - 1) & (grid.s % grid.tile[1] != 0))


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
    kinds = np.where(_is_partial(layout), PARTIAL, FULL)
    return _sort(layout.grid.rows, layout.rows, layout.columns, kinds, np.zeros_like(kinds), masks)


def _by_column(lists: Sequence[TileLists], columns: int) -> TileLists:
    """The lists of the query heads that share a key/value head as one, sorted by key tile."""
    live = [TileLists(*(x[0][one.kinds[0] != EMPTY] for x in one)) for one in lists]
    heads = [np.full(len(one.rows), i) for i, one in enumerate(live)]
    rows, keys, kinds, _, masks = (np.concatenate(x) for x in zip(*live, strict=True))
    return _sort(columns, keys, rows, kinds, np.concatenate(heads), masks)


def _sort(rows: int, row, column, kind, head, mask) -> TileLists:
    missing = np.setdiff1d(np.arange(rows), row)
    entries = [
        np.concatenate([x, fill])
        for x, fill in zip((row, column, kind, head, mask), (missing, *(np.zeros_like(missing),) * 4), strict=True)
    ]
    order = np.lexsort((entries[1], entries[3], -entries[2], entries[0]))
    return TileLists(*(x[order][None].astype(np.int32) for x in entries))


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
        for i in np.flatnonzero(_is_partial(layout)):
            (mask,) = tile_masks(pattern, layout.grid, layout.rows[i : i + 1], layout.columns[i : i + 1])
            index[i] = seen.setdefault(np.packbits(mask).tobytes(), len(seen))
        found.append(index)
    size = layouts[0][1].grid.tile
    packed = [np.frombuffer(mask, np.uint8) for mask in seen] or [np.zeros(size[0] * size[1] // 8, np.uint8)]
    return np.unpackbits(np.stack(packed), axis=1).reshape(-1, *size).astype(bool), found


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
    grid = TileGrid(t, s, tile)
    b, h, rows, k = columns.shape
    states = np.array(pattern.layout(t, s, tile).dense(), np.int32)
    if s % tile[1]:
        states[:, -1] = np.minimum(states[:, -1], PARTIAL)
    row = jnp.broadcast_to(jnp.arange(rows)[:, None], columns.shape)
    kind = jnp.where(columns < 0, EMPTY, jnp.asarray(states)[row, columns])
    column, zero = jnp.maximum(columns, 0), jnp.zeros_like(columns)
    order = functools.partial(_sort_traced, kinds=kind)
    head = jnp.broadcast_to((jnp.arange(h) % (h // g))[:, None, None], columns.shape)
    by_row = TileLists(*(x.reshape(b * h, rows * k) for x in order(row, column, zero)))
    by_column = _fill_rows(grid.columns, *(x.reshape(b * g, -1) for x in (column, row, kind, head)))
    which = [jnp.arange(b * n).reshape(b, n) for n in (h, g)]
    return Plan(
        ((Part(tuple(range(h)), 0, rows), Walk(which[0], by_row)),),
        ((Part(tuple(range(g)), 0, grid.columns), Walk(which[1], by_column)),),
        None,
    )


def _sort_traced(rows, columns, heads, kinds) -> TileLists:
    """Entries of rows that are sorted already, the fuller kinds of a row first."""
    order = jnp.argsort(-kinds, axis=-1, stable=True)
    take = functools.partial(jnp.take_along_axis, indices=order, axis=-1)
    return TileLists(rows, take(columns), take(kinds), heads, jnp.zeros_like(rows))


def _fill_rows(rows: int, row, column, kind, head) -> TileLists:
    """Entries [lists, n] sorted by row, with an empty one more for each row."""
    lists = row.shape[0]
    more = jnp.broadcast_to(jnp.arange(rows, dtype=row.dtype), (lists, rows))
    entries = [
        jnp.concatenate([x, y], axis=1)
        for x, y in zip((row, column, kind, head), (more, *(0 * more,) * 3), strict=True)
    ]
    order = jnp.lexsort((entries[1], entries[3], -entries[2], entries[0]), axis=-1)
    row, column, kind, head = (jnp.take_along_axis(x, order, axis=1) for x in entries)
    return TileLists(row, column, kind, head, jnp.zeros_like(row))


def mark_ends(rows: Int[Array, "lists n"]) -> tuple[Array, Array]:
    """Which entries are the first and which the last of their row, bool [lists, n] each."""
    xp = jnp if isinstance(rows, jax.Array) else np
    turn = rows[:, 1:] != rows[:, :-1]
    edge = xp.ones((rows.shape[0], 1), bool)
    return xp.concatenate([edge, turn], axis=1), xp.concatenate([turn, edge], axis=1)
