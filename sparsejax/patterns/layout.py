"""Tile layouts: a pattern at the resolution of a kernel, in time proportional to the tiles that matter.

The tiles of a `t x s` score matrix are numbered row by row. A set of tiles is then a set of integers, kept
as a few disjoint spans (`Spans`), and the algebra of patterns becomes an algebra of spans: no step ever
touches all `t * s` pairs. Each pattern states exactly which tiles it touches and which it fills; `&` and
`|` combine those statements into bounds (`Bounds`), and the few tiles that the bounds leave open are
counted pair by pair, each distinct one once.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from sparsejax.patterns.base import Pattern

COUNT_AT_ONCE = 256  # tiles counted together: 256 tiles of 128 x 128 are 4 MiB of booleans


@dataclasses.dataclass(frozen=True, eq=False)
class Spans:
    """A set of integers below `limit`: sorted, disjoint, half-open `[start, stop)` rows of an int64 [n, 2]."""

    edges: np.ndarray
    limit: int

    @classmethod
    def union(cls, starts: np.ndarray, stops: np.ndarray, limit: int) -> Spans:
        """The union of any spans `[start, stop)`; empty ones (`stop <= start`) are dropped."""
        keep = stops > starts
        return cls(overlaps(starts[keep], stops[keep], depth=1), limit)

    def __and__(self, other: Spans) -> Spans:
        both = np.concatenate([self.edges, other.edges])
        return Spans(overlaps(both[:, 0], both[:, 1], depth=2), self.limit)

    def __or__(self, other: Spans) -> Spans:
        both = np.concatenate([self.edges, other.edges])
        return Spans(overlaps(both[:, 0], both[:, 1], depth=1), self.limit)

    def __invert__(self) -> Spans:
        stops = np.append(self.edges[:, 0], self.limit)
        starts = np.insert(self.edges[:, 1], 0, 0)
        return Spans.union(starts, stops, self.limit)

    def members(self) -> np.ndarray:
        """All integers of the set, ascending, int64 [n]."""
        lengths = self.edges[:, 1] - self.edges[:, 0]
        before = np.cumsum(lengths) - lengths
        return np.arange(lengths.sum()) + np.repeat(self.edges[:, 0] - before, lengths)


def overlaps(starts: np.ndarray, stops: np.ndarray, depth: int) -> np.ndarray:
    """The places that at least `depth` of the spans cover, as sorted disjoint spans [n, 2]."""
    places, index = np.unique(np.concatenate([starts, stops]), return_inverse=True)
    change = np.bincount(index[: len(starts)], minlength=len(places))
    change = change - np.bincount(index[len(starts) :], minlength=len(places))
    inside = np.cumsum(change) >= depth
    turns = np.flatnonzero(np.diff(inside, prepend=False))
    return places[turns].reshape(-1, 2)


@dataclasses.dataclass(frozen=True)
class TileGrid:
    """The tiles of a score matrix: `t` queries by `s` keys, cut into `tile = (queries, keys)` squares.

    `moved` is for patterns inside `shift`: their keys run from `moved` to `moved + s`, of which those outside of
    `keys = (first, stop)` do not exist.
    """

    t: int
    s: int
    tile: tuple[int, int]
    moved: int = 0
    keys: tuple[int, int] | None = None

    @property
    def rows(self) -> int:
        """Number of query tiles."""
        return -(-self.t // self.tile[0])

    @property
    def columns(self) -> int:
        """Number of key tiles."""
        return -(-self.s // self.tile[1])

    def row_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """First and last query of each query tile, int64 [rows]."""
        first = np.arange(self.rows) * self.tile[0]
        return first, np.minimum(first + self.tile[0], self.t) - 1

    def move(self, by: int) -> TileGrid:
        """The same tiles, for a pattern whose key k + `by` is this grid's key k."""
        first, stop = self.keys or (0, self.s)
        keys = max(0, first + by), min(self.s, stop + by)
        return dataclasses.replace(self, moved=self.moved + by, keys=keys)

    def touched(self, start: np.ndarray, stop: np.ndarray, rows: np.ndarray | None = None) -> Spans:
        """Tiles of row `rows[i]` that contain a key of `[start[i], stop[i])`; rows 0, 1, ... if not given.

        All are int64 [n]. Intervals may be empty, and reach past the ends.
        """
        rows, start, stop = self._inside(start, stop, rows)
        return self._spans(rows, start // self.tile[1], -(-stop // self.tile[1]))

    def filled(self, start: np.ndarray, stop: np.ndarray, rows: np.ndarray | None = None) -> Spans:
        """Tiles of row `rows[i]` whose keys all lie in `[start[i], stop[i])`; as `touched`.

        Intervals of one row must not touch one another: a tile that only two of them fill together is missed.
        """
        rows, start, stop = self._inside(start, stop, rows)
        last = np.where(stop == self.s, self.columns, stop // self.tile[1])
        return self._spans(rows, -(-start // self.tile[1]), last)

    def in_every_row(self, start: np.ndarray, stop: np.ndarray) -> Bounds:
        """Bounds of a pattern all of whose queries see the keys of the disjoint intervals `[start, stop)`, [n]."""
        start, stop = merge_intervals(start, stop)
        row = dataclasses.replace(self, t=min(self.t, 1))
        same = np.zeros(len(start), np.int64)
        return Bounds.exact(self._repeat(row.touched(start, stop, same)), self._repeat(row.filled(start, stop, same)))

    def _repeat(self, row: Spans) -> Spans:
        """The spans of one row, in every row."""
        shifts = np.arange(self.rows)[:, None] * self.columns
        starts, stops = ((row.edges[None, :, i] + shifts).ravel() for i in (0, 1))
        return Spans.union(starts, stops, self.rows * self.columns)

    def _inside(self, start: Any, stop: Any, rows: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Intervals cut to the keys there are, counted from this grid's first; empty ones left out."""
        first, end = self.keys or (0, self.s)
        start = np.maximum(start, max(first, self.moved)) - self.moved
        stop = np.minimum(stop, min(end, self.moved + self.s)) - self.moved
        start, stop = np.broadcast_arrays(start, stop)
        rows = np.arange(self.rows) if rows is None else rows
        keep = stop > start
        return rows[keep], start[keep], stop[keep]

    def _spans(self, rows: np.ndarray, first: np.ndarray, last: np.ndarray) -> Spans:
        shift = rows * self.columns
        return Spans.union(first + shift, last + shift, self.rows * self.columns)


def merge_intervals(start: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The union of intervals `[start, stop)` (int64 [n]) as disjoint ones that do not touch one another."""
    keep = stop > start
    return tuple(overlaps(start[keep], stop[keep], depth=1).T)


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What is known of a pattern's tiles: `least` and `most` tiles that are live (touched) and full."""

    live_least: Spans
    live_most: Spans
    full_least: Spans
    full_most: Spans

    @classmethod
    def exact(cls, live: Spans, full: Spans) -> Bounds:
        """Nothing left open."""
        return cls(live, live, full, full)

    def __and__(self, other: Bounds) -> Bounds:
        # A tile that both fill is filled; one that is touched by one and filled by the other is touched;
        # one that both only touch may still have no pair in common.
        return Bounds(
            live_least=(self.live_least & other.full_least) | (self.full_least & other.live_least),
            live_most=self.live_most & other.live_most,
            full_least=self.full_least & other.full_least,
            full_most=self.full_most & other.full_most,
        )

    def __invert__(self) -> Bounds:
        return Bounds(~self.full_most, ~self.full_least, ~self.live_most, ~self.live_least)

    def __or__(self, other: Bounds) -> Bounds:
        return ~(~self & ~other)

    def open(self) -> Spans:
        """Tiles that may be live and are not known to be dead, partial or full."""
        return self.live_most & (~self.live_least | (self.full_most & ~self.full_least))


@dataclasses.dataclass(frozen=True, eq=False)
class TileLayout:
    """Per query tile the ascending list of its live key tiles, each full or partial (compressed rows).

    The key tiles of query tile r are `columns[starts[r]:starts[r + 1]]`; `full` says which of them hold
    only allowed pairs. `grid` gives lengths and tile sizes. `t`, `s` and `tile` are in tokens.
    """

    grid: TileGrid
    starts: np.ndarray  # int64 [rows + 1]
    columns: np.ndarray  # int32 [live]
    full: np.ndarray  # bool [live]

    @property
    def degrees(self) -> np.ndarray:
        """Number of live key tiles of each query tile, int64 [rows]."""
        return np.diff(self.starts)

    @property
    def rows(self) -> np.ndarray:
        """Query tile of each live tile, int32 [live]."""
        return np.repeat(np.arange(self.grid.rows, dtype=np.int32), self.degrees)

    @property
    def density(self) -> float:
        """Live tiles over all tiles."""
        return len(self.columns) / max(1, self.grid.rows * self.grid.columns)

    def transpose(self) -> TileLayout:
        """Per key tile the list of its live query tiles: the order in which dk and dv are summed."""
        order = np.argsort(self.columns, kind="stable")
        counts = np.bincount(self.columns, minlength=self.grid.columns)
        grid = TileGrid(self.grid.s, self.grid.t, self.grid.tile[::-1])
        starts = np.concatenate([[0], np.cumsum(counts)])
        return TileLayout(grid, starts, self.rows[order], self.full[order])

    def dense(self) -> np.ndarray:
        """Tile states as int8 [rows, columns]: 0 dead, 1 partial, 2 full. For tests and pictures."""
        states = np.zeros((self.grid.rows, self.grid.columns), np.int8)
        states[self.rows, self.columns] = 1 + self.full
        return states


@functools.lru_cache(maxsize=64)
def build_layout(pattern: Pattern, t: int, s: int, tile: tuple[int, int]) -> TileLayout:
    """The layout of a pattern that is the same for all heads, see `Pattern.layout`; the latest are kept."""
    grid = TileGrid(t, s, tile)
    bounds = pattern.bounds(grid)
    tiles = bounds.live_most.members()
    full = np.zeros(len(tiles), bool)
    full[np.searchsorted(tiles, bounds.full_least.members())] = True
    unsure = np.searchsorted(tiles, bounds.open().members())
    counts, areas = count_pairs(pattern, grid, tiles[unsure])
    full[unsure] = counts == areas
    live = np.ones(len(tiles), bool)
    live[unsure] = counts > 0
    rows, columns = np.divmod(tiles[live], grid.columns)
    starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=grid.rows))])
    arrays = starts, columns.astype(np.int32), full[live]
    for array in arrays:
        array.setflags(write=False)  # whoever asks again gets the same ones
    return TileLayout(grid, *arrays)


def count_pairs(pattern: Pattern, grid: TileGrid, tiles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Allowed pairs and all pairs of the given tiles (flat tile numbers), int64 [n] each."""
    rows, columns = np.divmod(tiles, max(1, grid.columns))
    q0, k0 = rows * grid.tile[0], columns * grid.tile[1]
    areas = np.minimum(grid.tile[0], grid.t - q0) * np.minimum(grid.tile[1], grid.s - k0)
    first, same = group_tiles(pattern, grid, rows, columns)
    counts = np.empty(len(first), np.int64)
    for start in range(0, len(first), COUNT_AT_ONCE):
        part = first[start : start + COUNT_AT_ONCE]
        counts[start : start + COUNT_AT_ONCE] = tile_masks(pattern, grid, rows[part], columns[part]).sum(axis=(1, 2))
    return counts[same], areas


def group_tiles(
    pattern: Pattern, grid: TileGrid, rows: np.ndarray, columns: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Groups of tiles (rows and columns, int [n]) that hold the same pairs, by their `Pattern.signature`.

    Returns:
      The index of one tile of each group, int64 [groups], and each tile's group, int64 [n].
    """
    if not len(rows):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    q0, k0 = rows.astype(np.int64) * grid.tile[0], columns.astype(np.int64) * grid.tile[1]
    height, width = np.minimum(grid.tile[0], grid.t - q0), np.minimum(grid.tile[1], grid.s - k0)
    keys = np.stack([height, width, *pattern.signature(grid, q0, k0)])
    _, first, same = np.unique(keys, axis=1, return_index=True, return_inverse=True)
    return first, same.ravel()


def tile_masks(pattern: Pattern, grid: TileGrid, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """The pairs that the given tiles (int [n] each) allow, bool [n, queries, keys]; nothing beyond the lengths."""
    q = rows[:, None, None] * grid.tile[0] + np.arange(grid.tile[0])[:, None]
    k = columns[:, None, None] * grid.tile[1] + np.arange(grid.tile[1])
    return pattern.allows(q, k, grid.t, grid.s) & (q < grid.t) & (k < grid.s)


def list_pairs(pattern: Pattern, layout: TileLayout) -> tuple[np.ndarray, np.ndarray]:
    """The allowed pairs of a layout's live tiles, sorted: queries int32 [n] and keys int32 [n]."""
    grid = layout.grid
    queries, keys = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
    for row in range(grid.rows):  # the live tiles of a row side by side are in order: nothing is left to sort
        columns = layout.columns[layout.starts[row] : layout.starts[row + 1]]
        q = np.arange(row * grid.tile[0], min((row + 1) * grid.tile[0], grid.t))
        k = (columns[:, None] * np.int64(grid.tile[1]) + np.arange(grid.tile[1])).ravel()
        k = k[k < grid.s]
        i, j = np.nonzero(pattern.allows(q[:, None], k[None, :], grid.t, grid.s))
        queries.append(q[i].astype(np.int32))
        keys.append(k[j].astype(np.int32))
    return np.concatenate(queries), np.concatenate(keys)
