"""Tile lists: layouts as arrays that a kernel traverses tile by tile, static or computed from data."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from sparsejax.patterns import Pattern, TileLayout
from sparsejax.patterns.base import array_module
from sparsejax.patterns.layout import group_tiles, tile_masks

# Kind of a tile: no pair is allowed; some are; those that the data choose are, as the pattern allows all; all are.
EMPTY, PARTIAL, CHOSEN, FULL = 0, 1, 2, 3


class TileLists(NamedTuple):
    """Lists of tiles. Each is sorted by row; within a row, full tiles come before partial ones.

    Rows are query tiles and columns are key tiles; in the lists for dk and dv it is the other way round. A row without
    live tiles has one empty entry, so that its output is written.
    """

    rows: Int[Array | np.ndarray, "lists n"]
    columns: Int[Array | np.ndarray, "lists n"]
    kinds: Int[Array | np.ndarray, "lists n"]
    heads: Int[Array | np.ndarray, "lists n"]  # for dk and dv: index of the query head within its group; else 0
    masks: Int[Array | np.ndarray, "lists n"]  # index of a tile's mask if distinct masks are looked up or cached


@dataclasses.dataclass(frozen=True)
class KernelSlice:
    """The heads and the range of tile rows that one kernel launch computes. For dk and dv, key/value heads."""

    heads: tuple[int, ...]
    start: int
    stop: int

    @property
    def rows(self) -> int:
        return self.stop - self.start


class TileSchedule(NamedTuple):
    """The lists of one kernel launch. `list_ids` selects the list of each head, per sequence or for all of them."""

    list_ids: Int[Array | np.ndarray, "#b heads"]
    lists: TileLists
    steps: Int[Array, ""] | None = None  # number of entries before the padding of all lists; None: all entries


class Plan(NamedTuple):
    """All kernel launches of one attention."""

    rows: tuple[tuple[KernelSlice, TileSchedule], ...]  # for the output and dq
    columns: tuple[tuple[KernelSlice, TileSchedule], ...]  # for dk and dv
    bits: Bool[np.ndarray, "distinct queries keys"] | None  # as in `collect_masks`; None: kernels evaluate the pattern
    cached_masks: tuple[tuple[int, int], ...] = ()  # a (query tile, key tile) per distinct mask; () if there are many


@dataclasses.dataclass(frozen=True, eq=False)
class ShardedTiles:
    """The live tiles of a layout as the shards of a sequence hold them, which is in positions of their own.

    Attributes:
      layout: The live tiles of the whole sequence.
      positions: Number of query tiles and of key tiles that a shard holds.
      rows: By shard, the position of the query tile of each live tile.
      columns: By shard, the position of its key tile.
      indices: By shard, its index in the layout.
    """

    layout: TileLayout
    positions: tuple[int, int]
    rows: list[np.ndarray]
    columns: list[np.ndarray]
    indices: list[np.ndarray]


def plan_pattern(
    pattern: Pattern,
    t: int,
    s: int,
    tile: tuple[int, int],
    heads: tuple[int, int],
    evaluated: bool,
    max_entries: int | None,
    max_cached_masks: int,
) -> Plan:
    """Plans the kernel launches for a pattern.

    Args:
      pattern: The pattern.
      t: Number of queries.
      s: Number of keys.
      tile: Queries and keys per tile.
      heads: Number of query heads and of key/value heads.
      evaluated: Whether kernels evaluate the pattern in partial tiles, which requires one pattern for all heads.
        Otherwise they look masks up.
      max_entries: Maximum number of entries of one launch, over all its lists; None for no limit.
      max_cached_masks: Number of distinct masks that a kernel can cache if it evaluates the pattern.
    """
    h, g = heads
    layouts = [pattern.for_head(i).layout(t, s, tile) for i in range(h)]
    distinct = list({id(layout): layout for layout in layouts}.values())
    layout_of_head = [next(i for i, other in enumerate(distinct) if other is layout) for layout in layouts]
    patterns = {i: pattern.for_head(head) for head, i in enumerate(layout_of_head)}
    bits, cached, masks = None, (), [np.zeros(len(layout.columns), np.int32) for layout in distinct]
    if not evaluated:
        bits, masks = collect_masks([(patterns[i], layout) for i, layout in enumerate(distinct)])
    elif len(distinct) == 1:
        cached, masks[0] = _choose_cached_masks(pattern.for_head(0), distinct[0], max_cached_masks)
    entries = [_list_by_row(layout, mask) for layout, mask in zip(distinct, masks, strict=True)]
    grid, group_size = distinct[0].grid, h // g
    groups = [tuple(layout_of_head[i * group_size : (i + 1) * group_size]) for i in range(g)]
    merged = {group: _list_by_column([entries[i] for i in group], grid.columns) for group in groups}
    return Plan(
        _group_launches(layout_of_head, dict(enumerate(entries)), grid.rows, max_entries),
        _group_launches(groups, merged, grid.columns, max_entries),
        bits,
        cached,
    )


@functools.lru_cache(maxsize=64)
def plan_shards(pattern: Pattern, tiles: ShardedTiles, heads: tuple[int, int], max_entries: int | None) -> Plan:
    """Plans the kernel launches for the shards of a sequence, with one list per shard; see `take_shard`.

    Args:
      pattern: The pattern, without heads.
      tiles: The live tiles of each shard.
      heads: Number of query heads and of key/value heads.
      max_entries: Maximum number of entries of one launch on a shard; None for no limit.
    """
    (h, g), kinds = heads, _tile_kinds(tiles.layout)
    bits, (masks,) = collect_masks([(pattern, tiles.layout)])
    by_row, by_column = [], []
    for rows, columns, index in zip(tiles.rows, tiles.columns, tiles.indices, strict=True):
        entries = TileLists(rows, columns, kinds[index], np.zeros_like(rows), masks[index])
        by_row.append(_fill_rows(tiles.positions[0], entries))
        by_column.append(_list_by_column([by_row[-1]] * (h // g), tiles.positions[1]))
    launches = (
        _launch_shards(_stack_lists(lists), count, positions, max_entries)
        for lists, count, positions in zip((by_row, by_column), heads, tiles.positions, strict=True)
    )
    return Plan(*launches, bits)


def _stack_lists(lists: Sequence[TileLists]) -> TileLists:
    """Joins lists, in small integers; shorter ones are padded with empty entries in their last row."""
    longest = max(entries.rows.shape[1] for entries in lists)
    padded = []
    for entries in lists:
        padding = ((0, 0), (0, longest - entries.rows.shape[1]))
        wide = TileLists(*(np.pad(x, padding, mode="edge") for x in entries))
        padded.append(wide._replace(kinds=np.pad(entries.kinds, padding, constant_values=EMPTY)))
    joined = (np.concatenate(arrays) for arrays in zip(*padded, strict=True))
    return TileLists(*(x.astype(np.min_scalar_type(x.max())) for x in joined))  # constants of the program of all shards


def _launch_shards(
    lists: TileLists, heads: int, rows: int, max_entries: int | None
) -> tuple[tuple[KernelSlice, TileSchedule], ...]:
    """Launches for all heads, each with the entries of some rows on every shard."""
    counts = np.max([np.bincount(row, minlength=rows) for row in lists.rows], axis=0)
    every = tuple(range(heads))
    return tuple(
        (KernelSlice(every, *bounds), TileSchedule(np.zeros((1, heads), np.int32), _select_rows(lists, *bounds)))
        for bounds in _split_rows(counts, max_entries)
    )


def take_shard(plan: Plan, shard: Int[Array, ""]) -> Plan:
    """The plan of one shard, of those of `plan_shards`."""

    def take_list(x: np.ndarray) -> Int[Array, "1 n"]:
        return jnp.asarray(x)[shard][None].astype(jnp.int32)

    def take(
        launches: tuple[tuple[KernelSlice, TileSchedule], ...],
    ) -> tuple[tuple[KernelSlice, TileSchedule], ...]:
        return tuple(
            (rows, schedule._replace(lists=TileLists(*(take_list(x) for x in schedule.lists))))
            for rows, schedule in launches
        )

    return plan._replace(rows=take(plan.rows), columns=take(plan.columns))


def _group_masks(pattern: Pattern, layout: TileLayout) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Groups partial tiles by mask: indices of partial tiles, one representative per group, and each tile's group."""
    partial = np.flatnonzero(_tile_kinds(layout) == PARTIAL)
    first, groups = group_tiles(pattern, layout.grid, layout.rows[partial], layout.columns[partial])
    return partial, partial[first], groups


def _choose_cached_masks(
    pattern: Pattern, layout: TileLayout, max_masks: int
) -> tuple[tuple[tuple[int, int], ...], np.ndarray]:
    """A representative (query tile, key tile) per distinct mask, and each tile's mask; () if there are too many."""
    masks = np.zeros(len(layout.columns), np.int32)
    partial, first, groups = _group_masks(pattern, layout)
    if len(first) > max_masks:
        return (), masks
    masks[partial] = groups
    return tuple(zip(layout.rows[first].tolist(), layout.columns[first].tolist(), strict=True)), masks


def _tile_kinds(layout: TileLayout) -> np.ndarray:
    """Kinds of the live tiles. A tile that extends past the last key is never full: its mask excludes the padding."""
    grid = layout.grid
    ragged = (layout.columns == grid.columns - 1) & (grid.s % grid.tile[1] != 0)
    return np.where(layout.full & ~ragged, FULL, PARTIAL)


def _group_launches(
    key_of_head: Sequence, entries: dict, rows: int, max_entries: int | None
) -> tuple[tuple[KernelSlice, TileSchedule], ...]:
    """Heads with lists of equal length share a launch. A launch with too many entries is split between rows."""
    groups: dict[int, list[int]] = {}
    for head, key in enumerate(key_of_head):
        groups.setdefault(entries[key].rows.shape[1], []).append(head)
    launches = []
    for heads in groups.values():
        keys = list(dict.fromkeys(key_of_head[head] for head in heads))
        list_ids = np.array([[keys.index(key_of_head[head]) for head in heads]], np.int32)
        lists = TileLists(*(np.concatenate(arrays) for arrays in zip(*(entries[key] for key in keys), strict=True)))
        for start, stop in _split_rows(np.bincount(lists.rows.ravel(), minlength=rows), max_entries):
            schedule = TileSchedule(list_ids, _select_rows(lists, start, stop))
            launches.append((KernelSlice(tuple(heads), start, stop), schedule))
    return tuple(launches)


def _split_rows(counts: np.ndarray, max_entries: int | None) -> list[tuple[int, int]]:
    """Ranges of rows with at most `max_entries` entries each, given those of each row. A single row is never split."""
    rows, before = len(counts), np.concatenate([[0], np.cumsum(counts)])
    if max_entries is None or before[-1] <= max_entries:
        return [(0, rows)]
    bounds = [0]
    while bounds[-1] < rows:
        stop = int(np.searchsorted(before, before[bounds[-1]] + max_entries, side="right")) - 1
        bounds.append(max(stop, bounds[-1] + 1))
    return list(itertools.pairwise(bounds))


def _select_rows(lists: TileLists, start: int, stop: int) -> TileLists:
    """The entries of a range of rows. Shorter lists are padded with empty entries in their last row."""
    inside = (lists.rows >= start) & (lists.rows < stop)
    counts = inside.sum(axis=1)
    index = np.minimum(np.arange(counts.max()), counts[:, None] - 1) + (lists.rows < start).sum(axis=1, keepdims=True)
    selected = TileLists(*(np.take_along_axis(x, index, axis=1) for x in lists))
    padding = np.arange(counts.max()) >= counts[:, None]
    return selected._replace(rows=selected.rows - start, kinds=np.where(padding, EMPTY, selected.kinds))


def _list_by_row(layout: TileLayout, masks: np.ndarray) -> TileLists:
    zeros = np.zeros_like(layout.columns)
    return _fill_rows(layout.grid.rows, TileLists(layout.rows, layout.columns, _tile_kinds(layout), zeros, masks))


def _list_by_column(lists: Sequence[TileLists], columns: int) -> TileLists:
    """Merges the lists of the query heads of one group into one list, sorted by key tile."""
    live = [TileLists(*(x[0][entries.kinds[0] != EMPTY] for x in entries)) for entries in lists]
    heads = np.concatenate([np.full(len(entries.rows), i) for i, entries in enumerate(live)])
    joined = TileLists(*(np.concatenate(x) for x in zip(*live, strict=True)))
    return _fill_rows(columns, joined._replace(rows=joined.columns, columns=joined.rows, heads=heads))


def _fill_rows(rows: int, entries: TileLists) -> TileLists:
    """Entries [n] as one sorted list [1, n'] in which each row without entries has an empty one."""
    missing = np.setdiff1d(np.arange(rows), entries.rows)
    empty = TileLists(missing, *(np.zeros_like(missing),) * 4)
    return sort_lists(TileLists(*(np.concatenate(x)[None].astype(np.int32) for x in zip(entries, empty, strict=True))))


def sort_lists(lists: TileLists) -> TileLists:
    """Sorts each list by row; within a row, full tiles first; within a kind, by head and column."""
    xp = array_module(*lists)
    order = xp.lexsort((lists.columns, lists.heads, -lists.kinds, lists.rows), axis=-1)
    return TileLists(*(xp.take_along_axis(x, order, axis=-1) for x in lists))


def collect_masks(layouts: Sequence[tuple[Pattern, TileLayout]]) -> tuple[np.ndarray, list[np.ndarray]]:
    """The distinct masks of partial tiles, followed by that of a full tile.

    Returns:
      The masks, bool [distinct, queries, keys]; and per layout the index of each live tile's mask, int32 [live].
    """
    seen: dict[bytes, int] = {}
    indices = []
    for pattern, layout in layouts:
        index = np.full(len(layout.columns), -1, np.int32)
        partial, first, groups = _group_masks(pattern, layout)
        numbers = np.zeros(len(first), np.int32)
        for i, tile in enumerate(first):
            (mask,) = tile_masks(pattern, layout.grid, layout.rows[tile : tile + 1], layout.columns[tile : tile + 1])
            numbers[i] = seen.setdefault(np.packbits(mask).tobytes(), len(seen))
        index[partial] = numbers[groups]
        indices.append(index)
    size = layouts[0][1].grid.tile
    packed = [*(np.frombuffer(mask, np.uint8) for mask in seen), np.full(size[0] * size[1] // 8, 255, np.uint8)]
    masks = np.unpackbits(np.stack(packed), axis=1).reshape(-1, *size).astype(bool)
    return masks, [np.where(index < 0, len(seen), index) for index in indices]


def pack_words(masks: Bool[np.ndarray, "distinct n m"]) -> Int[np.ndarray, "distinct n/32 m"]:
    """Packs 32 consecutive rows of each mask into one word, the first row in the lowest bit."""
    groups = masks.reshape(len(masks), -1, 32, masks.shape[-1]).astype(np.uint32)
    return (groups << np.arange(32, dtype=np.uint32)[:, None]).sum(axis=2, dtype=np.uint32).view(np.int32)


def restrict_plan(plan: Plan, kinds: Int[Array, "b scopes rows columns"], heads: tuple[int, int]) -> Plan:
    """Restricts the lists of a pattern to tiles that the data choose.

    Args:
      plan: The plan of a pattern that is the same for all heads.
      kinds: Kind of each tile under the choice alone, per query tile and key tile.
      heads: Number of query heads and of key/value heads.
    """
    (h, g), scopes = heads, kinds.shape[1]
    rows = (_restrict_launch(*launch, kinds, (h, h), scopes) for launch in plan.rows)
    by_row = kinds.swapaxes(2, 3)
    columns = (_restrict_launch(*launch, by_row, (h, g), min(scopes, g)) for launch in plan.columns)
    return plan._replace(rows=tuple(rows), columns=tuple(columns))


def _restrict_launch(
    kernel_slice: KernelSlice,
    schedule: TileSchedule,
    kinds: Int[Array, "b scopes rows columns"],
    heads: tuple[int, int],
    count: int,
) -> tuple[KernelSlice, TileSchedule]:
    """Makes `count` lists per sequence. `heads`: number of query heads, and of heads that have a list."""
    (h, owners), (b, scopes), lists = heads, kinds.shape[:2], schedule.lists
    query_heads = np.arange(count)[:, None] * (h // count) + lists.heads
    kinds = kinds[:, query_heads * scopes // h, kernel_slice.start + lists.rows, lists.columns]
    list_ids = np.arange(b)[:, None] * count + np.array(kernel_slice.heads) * count // owners
    kinds = jnp.minimum(kinds, lists.kinds).reshape(b * count, -1)
    return kernel_slice, TileSchedule(list_ids.astype(np.int32), *_drop_empty(lists, kinds))


def _drop_empty(lists: TileLists, kinds: Int[Array, "lists n"]) -> tuple[TileLists, Int[Array, ""]]:
    """The entries of one list whose kind is not EMPTY, per row of `kinds`, and the length of the longest result.

    A row without entries keeps an empty one, and the last row is padded with empty entries.
    """
    rows, n = lists.rows[0], lists.rows.shape[1]
    first = np.flatnonzero(mark_ends(lists.rows)[0][0])
    live = kinds != EMPTY
    before = jnp.pad(jnp.cumsum(live, axis=1), ((0, 0), (1, 0)))
    missing = before[:, np.append(first[1:], n)] == before[:, first]
    keep = live.at[:, first].set(live[:, first] | missing)
    order = jnp.argsort(jnp.where(keep, rows * (FULL + 1) + FULL - kinds, np.iinfo(np.int32).max), axis=1)
    counts = keep.sum(axis=1, keepdims=True)
    order = jnp.take_along_axis(order, jnp.minimum(jnp.arange(n), counts - 1), axis=1)
    kinds = jnp.where(jnp.arange(n) < counts, jnp.take_along_axis(kinds, order, axis=1), EMPTY)
    result = TileLists(*(jnp.asarray(x[0])[order] for x in lists))._replace(kinds=kinds)
    return result, counts.max().astype(jnp.int32)


def mark_ends(
    rows: Int[Array | np.ndarray, "lists n"],
) -> tuple[Bool[Array | np.ndarray, "lists n"], Bool[Array | np.ndarray, "lists n"]]:
    """Marks the first and the last entry of each row."""
    xp = array_module(rows)
    change = rows[:, 1:] != rows[:, :-1]
    edge = xp.ones((rows.shape[0], 1), bool)
    return xp.concatenate([edge, change], axis=1), xp.concatenate([change, edge], axis=1)
