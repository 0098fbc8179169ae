"""Tile layouts: a pattern at the resolution of a kernel, in time proportional to the live tiles.

A pattern states bounds on the tiles that it touches and fills (`Pattern.bounds`). The few tiles that the bounds leave
undecided are counted pair by pair, once per distinct signature (`Pattern.signature`).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Protocol

import numpy as np

from sparsejax.errors import InputError
from sparsejax.patterns.spans import Bounds, Spans, merge_intervals

MAX_LIVE_TILES = 2**26  # a few GiB of indices; causal attention over 1.4 million tokens in tiles of 128
TILES_AT_ONCE = 256  # tiles counted together: 256 tiles of 128 x 128 are 4 MiB of booleans


class Tileable(Protocol):
    """The methods of `Pattern` from which a layout is built."""

    def __hash__(self) -> int: ...
    @property
    def repeats(self) -> bool: ...
    def allows(self, q: Any, k: Any, t: int | None = None, s: int | None = None) -> Any: ...
    def counts(self, q: Any, k: Any, t: int | None = None, s: int | None = None) -> Any: ...
    def bounds(self, grid: TileGrid) -> Bounds: ...
    def signature(self, grid: TileGrid, q0: np.ndarray, k0: np.ndarray) -> list[np.ndarray]: ...


@dataclasses.dataclass(frozen=True)
class TileGrid:
    """The tiles of a score matrix: `t` queries by `s` keys, cut into tiles of `tile = (queries, keys)` tokens.

    Inside `shift`, `offset` and `keys` differ from their defaults: the grid's first key is key `offset` of the
    inner pattern, and only the keys `[first, stop)` in `keys` exist. Inside `OffsetQueries`, the rows are those of
    the queries `[first, stop)` in `queries`.
    """

    t: int
    s: int
    tile: tuple[int, int]
    offset: int = 0
    keys: tuple[int, int] | None = None
    queries: tuple[int, int] | None = None

    @property
    def rows(self) -> int:
        """Number of query tiles."""
        first, stop = self.covered_queries
        return -(-(stop - first) // self.tile[0])

    @property
    def columns(self) -> int:
        """Number of key tiles."""
        return -(-self.s // self.tile[1])

    @property
    def existing_keys(self) -> tuple[int, int]:
        """First and stop of the keys that exist, in positions of the pattern."""
        return (0, self.s) if self.keys is None else self.keys

    @property
    def covered_queries(self) -> tuple[int, int]:
        """First and stop of the queries of the rows, in positions of the pattern."""
        return (0, self.t) if self.queries is None else self.queries

    def row_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """First and last query of each query tile, int64 [rows]."""
        start, stop = self.covered_queries
        first = start + np.arange(self.rows) * self.tile[0]
        return first, np.minimum(first + self.tile[0], stop) - 1

    def shift(self, by: int) -> TileGrid:
        """The same tiles for a pattern whose key `k + by` is key `k` of this grid."""
        first, stop = self.existing_keys
        keys = max(0, first + by), min(self.s, stop + by)
        return dataclasses.replace(self, offset=self.offset + by, keys=keys)

    def offset_queries(self, by: int, t: int) -> TileGrid:
        """The same tiles for a pattern of `t` queries whose query `q + by` is query `q` of this grid."""
        first, stop = self.covered_queries
        return dataclasses.replace(self, t=t, queries=(first + by, stop + by))

    def touched(self, start: np.ndarray, stop: np.ndarray, rows: np.ndarray | None = None) -> Spans:
        """The tiles of row `rows[i]` that contain a key of `[start[i], stop[i])`.

        Args:
          start: int64 [n]. Intervals may be empty and may extend past the ends of the sequence.
          stop: int64 [n].
          rows: int64 [n]; defaults to 0, 1, ...
        """
        rows, start, stop = self._clip(start, stop, rows)
        return self._spans(rows, start // self.tile[1], -(-stop // self.tile[1]))

    def filled(self, start: np.ndarray, stop: np.ndarray, rows: np.ndarray | None = None) -> Spans:
        """The tiles of row `rows[i]` whose keys all lie in `[start[i], stop[i])`; arguments as `touched`.

        Intervals of one row must not touch: a tile that only two of them fill together is missed.
        """
        rows, start, stop = self._clip(start, stop, rows)
        last = np.where(stop == self.s, self.columns, stop // self.tile[1])
        return self._spans(rows, -(-start // self.tile[1]), last)

    def in_every_row(self, start: np.ndarray, stop: np.ndarray) -> Bounds:
        """Bounds of a pattern in which every query attends to the keys of the intervals `[start, stop)`, [n]."""
        start, stop = merge_intervals(start, stop)
        row = dataclasses.replace(self, t=min(self.rows, 1), queries=None)
        zeros = np.zeros(len(start), np.int64)
        return Bounds.exact(self._repeat(row.touched(start, stop, zeros)), self._repeat(row.filled(start, stop, zeros)))

    def _repeat(self, row: Spans) -> Spans:
        """The spans of one row in every row."""
        shifts = np.arange(self.rows)[:, None] * self.columns
        starts, stops = ((row.edges[None, :, i] + shifts).ravel() for i in (0, 1))
        return Spans.union(starts, stops, self.rows * self.columns)

    def _clip(
        self, start: np.ndarray, stop: np.ndarray, rows: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows, starts and stops of the intervals within the existing keys, relative to the grid's first key."""
        first, end = self.existing_keys
        start = np.maximum(start, max(first, self.offset)) - self.offset
        stop = np.minimum(stop, min(end, self.offset + self.s)) - self.offset
        start, stop = np.broadcast_arrays(start, stop)
        rows = np.arange(self.rows) if rows is None else rows
        keep = stop > start
        return rows[keep], start[keep], stop[keep]

    def _spans(self, rows: np.ndarray, first: np.ndarray, last: np.ndarray) -> Spans:
        shift = rows * self.columns
        return Spans.union(first + shift, last + shift, self.rows * self.columns)


Interval = tuple[np.ndarray, np.ndarray]


def from_ranges(grid: TileGrid, any_key: Interval, every_key: Interval) -> Bounds:
    """Bounds of a pattern in which the keys of a query tile form an interval.

    Args:
      grid: The tiles.
      any_key: Start and stop, int64 [rows], of the keys to which at least one query of the tile attends, without gaps.
      every_key: Start and stop of the keys to which all queries of the tile attend.
    """
    return Bounds.exact(live=grid.touched(*any_key), full=grid.filled(*every_key))


@dataclasses.dataclass(frozen=True, eq=False)
class TileLayout:
    """The live key tiles of each query tile in ascending order, each full or partial (compressed sparse rows).

    The key tiles of query tile `r` are `columns[starts[r]:starts[r + 1]]`. A full tile holds only allowed pairs.
    """

    grid: TileGrid
    starts: np.ndarray  # int64 [rows + 1]
    columns: np.ndarray  # int32 [live]
    full: np.ndarray  # bool [live]

    @property
    def degrees(self) -> np.ndarray:
        """Number of live key tiles per query tile, int64 [rows]."""
        return np.diff(self.starts)

    @property
    def rows(self) -> np.ndarray:
        """Query tile of each live tile, int32 [live]."""
        return np.repeat(np.arange(self.grid.rows, dtype=np.int32), self.degrees)

    @property
    def density(self) -> float:
        """Live tiles as a fraction of all tiles."""
        return len(self.columns) / max(1, self.grid.rows * self.grid.columns)

    def transpose(self) -> TileLayout:
        """The live query tiles of each key tile: the order in which dk and dv are accumulated."""
        order = np.argsort(self.columns, kind="stable")
        counts = np.bincount(self.columns, minlength=self.grid.columns)
        grid = TileGrid(self.grid.s, self.grid.t, (self.grid.tile[1], self.grid.tile[0]))
        starts = np.concatenate([[0], np.cumsum(counts)])
        return TileLayout(grid, starts, self.rows[order], self.full[order])

    def dense(self) -> np.ndarray:
        """Tile states as int8 [rows, columns]: 0 dead, 1 partial, 2 full. For tests and pictures."""
        states = np.zeros((self.grid.rows, self.grid.columns), np.int8)
        states[self.rows, self.columns] = 1 + self.full
        return states

    def coarsen(self, factor: int) -> np.ndarray:
        """Tile states as in `dense`, of cells of `factor` x `factor` tiles; the last cells may hold fewer."""
        heights, widths = (
            np.minimum(factor, size - np.arange(0, size, factor)) for size in (self.grid.rows, self.grid.columns)
        )
        cell = self.rows // factor * np.int64(len(widths)) + self.columns // factor
        live, full = (np.bincount(tiles, minlength=len(heights) * len(widths)) for tiles in (cell, cell[self.full]))
        states = (live > 0) + (full == np.outer(heights, widths).ravel()).astype(np.int8)
        return states.reshape(len(heights), len(widths)).astype(np.int8)

    def _repr_svg_(self) -> str:
        from sparsejax.patterns import drawing

        return drawing.panels_to_svg([drawing.draw_layout(self)])


@functools.lru_cache(maxsize=256)  # 12 layers of 12 heads that all differ, as of BigBird
def build_layout(pattern: Tileable, t: int, s: int, tile: tuple[int, int]) -> TileLayout:
    """The layout of a pattern that all heads share; see `Pattern.layout`. The most recent layouts are cached."""
    grid = TileGrid(t, s, tile)
    bounds = pattern.bounds(grid)
    count = bounds.live_upper.size
    if count > MAX_LIVE_TILES:
        raise InputError("t", f"{t} queries and {s} keys give {count} live tiles, more than {MAX_LIVE_TILES}")
    tiles = bounds.live_upper.members()
    full = np.zeros(len(tiles), bool)
    full[np.searchsorted(tiles, bounds.full_lower.members())] = True
    undecided = np.searchsorted(tiles, bounds.undecided().members())
    counts, areas = count_in_tiles(pattern, grid, tiles[undecided])
    full[undecided] = counts == areas
    live = np.ones(len(tiles), bool)
    live[undecided] = counts > 0
    rows, columns = np.divmod(tiles[live], grid.columns)
    starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=grid.rows))])
    layout = TileLayout(grid, starts, columns.astype(np.int32), full[live])
    for array in (layout.starts, layout.columns, layout.full):
        array.setflags(write=False)  # the cache returns the same arrays to every caller
    return layout


@functools.lru_cache(maxsize=256)
def count_pairs(pattern: Tileable, t: int, s: int) -> int:
    """Number of allowed pairs of a pattern that all heads share. Cached: every trace of `attend` needs it."""
    layout = build_layout(pattern, t, s, (128, 128))
    tiles = layout.rows.astype(np.int64) * layout.grid.columns + layout.columns
    partial, _ = count_in_tiles(pattern, layout.grid, tiles[~layout.full])
    height = np.minimum(layout.grid.tile[0], t - layout.rows * layout.grid.tile[0])
    width = np.minimum(layout.grid.tile[1], s - layout.columns * layout.grid.tile[1])
    return int(partial.sum()) + int((height.astype(np.int64) * width)[layout.full].sum())


def list_edges(pattern: Tileable, t: int, s: int) -> tuple[np.ndarray, np.ndarray]:
    """The allowed pairs of a pattern that all heads share, sorted: queries and keys, int32 [pairs] each."""
    layout = build_layout(pattern, t, s, (128, 128))
    grid = layout.grid
    queries, keys = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
    for row in range(grid.rows):  # the live tiles of a row are in order, so that the pairs need no sorting
        columns = layout.columns[layout.starts[row] : layout.starts[row + 1]]
        q = np.arange(row * grid.tile[0], min((row + 1) * grid.tile[0], t))
        k = (columns[:, None] * np.int64(grid.tile[1]) + np.arange(grid.tile[1])).ravel()
        k = k[k < s]
        i, j = np.nonzero(pattern.allows(q[:, None], k[None, :], t, s))
        queries.append(q[i].astype(np.int32))
        keys.append(k[j].astype(np.int32))
    q, k = np.concatenate(queries), np.concatenate(keys)
    if not pattern.repeats:
        return q, k
    counts = pattern.counts(q, k, t, s)
    return np.repeat(q, counts), np.repeat(k, counts)


def count_in_tiles(pattern: Tileable, grid: TileGrid, tiles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Allowed pairs and all pairs of the tiles with these numbers, int64 [n] each."""
    rows, columns = np.divmod(tiles, max(1, grid.columns))
    q0, k0 = rows * grid.tile[0], columns * grid.tile[1]
    areas = np.minimum(grid.tile[0], grid.t - q0) * np.minimum(grid.tile[1], grid.s - k0)
    first, group = group_tiles(pattern, grid, rows, columns)
    counts = np.empty(len(first), np.int64)
    for start in range(0, len(first), TILES_AT_ONCE):
        batch = first[start : start + TILES_AT_ONCE]
        counts[start : start + TILES_AT_ONCE] = tile_masks(pattern, grid, rows[batch], columns[batch]).sum(axis=(1, 2))
    return counts[group], areas


def group_tiles(
    pattern: Tileable, grid: TileGrid, rows: np.ndarray, columns: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Groups tiles (rows and columns, int [n]) that hold the same pairs, by their `Pattern.signature`.

    Returns:
      The index of one tile per group, int64 [groups], and the group of each tile, int64 [n].
    """
    if not len(rows):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    q0, k0 = rows.astype(np.int64) * grid.tile[0], columns.astype(np.int64) * grid.tile[1]
    height, width = np.minimum(grid.tile[0], grid.t - q0), np.minimum(grid.tile[1], grid.s - k0)
    keys = np.stack([height, width, *pattern.signature(grid, q0, k0)])
    _, first, group = np.unique(keys, axis=1, return_index=True, return_inverse=True)
    return first, group.ravel()


def tile_masks(pattern: Tileable, grid: TileGrid, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """The masks of tiles (rows and columns, int [n]), bool [n, queries, keys]; False beyond the lengths."""
    q = rows[:, None, None] * grid.tile[0] + np.arange(grid.tile[0])[:, None]
    k = columns[:, None, None] * grid.tile[1] + np.arange(grid.tile[1])
    return pattern.allows(q, k, grid.t, grid.s) & (q < grid.t) & (k < grid.s)
